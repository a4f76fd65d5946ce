"""Hugging Face models from their folders: built from `config.json`, read and written under the names of their files.

transformers keeps weights in files under other names and in other shapes than in its modules (experts one by one, for
instance), and renames between releases; both directions are left to it. Nothing is downloaded, and no code that a
folder brings is run.
"""

import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.errors import ModelError
from isthmus.models.factory import build_from_factory as build_from
from isthmus.models.factory import not_installed, one_line
from isthmus.models.from_torchvision import import_torchvision
from isthmus.models.source import Source

CONFIG = "config.json"

# What two configurations of one architecture may differ in: none of it changes what `eval()` computes or a shape.
BOOKKEEPING = (
    "_name_or_path", "architectures", "dtype", "finetuning_task", "id2label", "initializer_factor", "initializer_range",
    "label2id", "problem_type", "task_specific_params", "torch_dtype", "transformers_version", "use_cache",
)  # fmt: skip
TRAINING_ONLY = ("dropout", "_pdrop", "layerdrop", "drop_path_rate")

# Implementations of routed experts in the order of preference: the default one counts the tokens of every expert, and
# the shapes of its products then depend on numbers, which no captured graph can hold.
EXPERTS = ("batched_mm", "eager")

TOKENS = 16  # of an example sentence, where the model can read as many
FRAMES = 16  # that an example recording has after the strides of a convolutional encoder


def _build_from_folder(spec: str, name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The model that the `config.json` in a folder describes, with random weights, in the folder's dtype.

    It is of the class that the configuration names (`architectures`), else of the one that `AutoModel` takes, and
    returns no caches of keys and values.

    Raises:
        ModelError: transformers is not installed, the folder describes no model of it, or arguments were given.
    """
    if arguments:
        raise ModelError(f"model {spec!r}: a folder takes no arguments; write {next(iter(arguments))} in its {CONFIG}")
    transformers = _import_transformers(spec)
    config = _read_config(transformers, spec, name)
    kind = _find_class(transformers, config)
    for part in (config, *_sub_configs(config)):
        if getattr(part, "use_cache", None):
            part.use_cache = False

    def create() -> nn.Module:
        model = transformers.AutoModel.from_config(config) if kind is None else kind._from_config(config)
        if getattr(config, "_experts_implementation", None) == "grouped_mm":
            _choose_experts(model)
        return model

    with _quiet(transformers):
        return build_from(spec, create, {})


def _import_transformers(spec: str) -> Any:
    """The package.

    Raises:
        ModelError: it is not installed, or does not import.
    """
    try:
        if importlib.util.find_spec("torchvision") is not None:
            import_torchvision()  # transformers imports it where it is installed
        return importlib.import_module("transformers")
    except ImportError as error:
        raise not_installed(spec, "transformers", error, "hf") from error
    except RuntimeError as error:
        raise ModelError(f"model {spec!r}: importing transformers failed: {one_line(error)}") from error


def _read_config(transformers: Any, spec: str, folder: str) -> Any:
    """The configuration in a folder, read without network and without running its code.

    Raises:
        ModelError: there is none, or it is of no model that transformers has itself.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise ModelError(f"model {spec!r}: there is no file {str(path)!r}; give the folder of a Hugging Face model")
    try:
        with _quiet(transformers):
            return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a configuration may be wrong in any way
        told = one_line(error)[:200]
        raise ModelError(
            f"model {spec!r}: {str(path)!r} describes no model of transformers {transformers.__version__} ({told}); "
            "code of its own, if it brings any, is not run"
        ) from error


def _find_class(transformers: Any, config: Any) -> Any:
    """The first class of models among a configuration's `architectures` that transformers has, or None."""
    for name in getattr(config, "architectures", None) or ():
        kind = getattr(transformers, name, None)
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
            return kind
    return None


def _sub_configs(config: Any) -> list[Any]:
    """The configurations inside a configuration, such as a text encoder's and an image encoder's."""
    return [part for part in vars(config).values() if hasattr(part, "to_dict") and hasattr(part, "model_type")]


def _choose_experts(model: Any) -> None:
    """Replaces grouped products of experts by an implementation that can be captured, where there is one."""
    for name in EXPERTS:
        try:
            return model.set_experts_implementation(name)
        except (ValueError, ImportError):  # this model, or this release, has no such implementation
            continue
    return None


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """The block reports nothing and shows no bars: what it finds wrong is raised here instead."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def is_hugging_face(model: nn.Module) -> bool:
    """Whether a module is a model of transformers; imports nothing."""
    modelling = sys.modules.get("transformers.modeling_utils")
    return modelling is not None and isinstance(model, modelling.PreTrainedModel)


# ---- configurations


def describes_model(folder: Path) -> bool:
    """Whether a folder holds the configuration of a Hugging Face model, judged without importing transformers."""
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "model_type" in content


def check_config(model: nn.Module, folder: str) -> None:
    """Refuses a folder whose `config.json` says that its model computes something else than `model`.

    Raises:
        ModelError: the configurations differ in more than bookkeeping and rates of dropout.
    """
    transformers = sys.modules["transformers"]
    theirs = _read_config(transformers, f"hf:{folder}", folder).to_dict()
    own: dict[str, Any] = getattr(model, "config").to_dict()  # noqa: B009 (transformers' attribute, unknown to nn.Module)
    differing = list(_differences(own, theirs))
    if differing:
        shown = ", ".join(f"{key} is {b!r} for {a!r}" for key, a, b in differing[:3])
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ModelError(
            f"{folder!r} is another model than the first: in its {CONFIG} {shown}{more}; "
            "only models of one configuration can be joined"
        )


def _differences(own: Mapping[str, Any], theirs: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields every setting that differs between two configurations and may matter: its name and both values."""
    for key in sorted(own.keys() | theirs.keys()):
        a, b = own.get(key), theirs.get(key)
        if key in BOOKKEEPING or key.endswith(TRAINING_ONLY) or a == b:
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from _differences(a, b, f"{path}{key}.")
        else:
            yield f"{path}{key}", a, b


# ---- weights


def from_file_names(state: Mapping[str, Tensor], model: nn.Module, where: str) -> dict[str, Tensor]:
    """A file's tensors under the names, and in the shapes, that the model has them in.

    Raises:
        ModelError: the file lacks tensors of the model, holds others, or ones of other shapes.
    """
    transformers = sys.modules["transformers"]
    config = getattr(model, "config")  # noqa: B009
    try:
        with _quiet(transformers), torch.random.fork_rng([]):
            loaded, told = type(model).from_pretrained(  # pyright: ignore[reportAttributeAccessIssue]
                None, config=config, state_dict=dict(state), output_loading_info=True
            )
    except Exception as error:  # transformers raises many types on weights that do not fit
        raise ModelError(f"{where} cannot be loaded into the model: {one_line(error)[:200]}; check --model") from error
    for key, text in (
        ("missing_keys", "lacks"),
        ("unexpected_keys", "holds, unknown to the model,"),
        ("mismatched_keys", "has in other shapes"),
    ):
        names = sorted(str(name[0] if isinstance(name, tuple) else name) for name in told[key])
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ModelError(
                f"{where} {text} {', '.join(map(repr, names[:3]))}{more}; give the model it was trained as"
            )
    return dict(loaded.state_dict())


def save_weights(model: nn.Module, folder: Path) -> None:
    """Writes a model's weights as transformers itself does, under the names that its files have."""
    transformers = sys.modules["transformers"]
    with _quiet(transformers):
        model.save_pretrained(folder)  # pyright: ignore[reportCallIssue]


# ---- example inputs


def example_for_config(model: nn.Module, samples: int, generator: torch.Generator) -> list[dict[str, Tensor]]:
    """Keyword inputs to try, best first: all kinds that the model says it reads, then its main input alone.

    Their names are those that transformers gives inputs of every kind, and their sizes those of the configuration;
    tokens avoid those that have a meaning of their own, such as padding.
    """
    config: Any = model.config
    modalities = getattr(model, "input_modalities", ())
    modalities = (modalities,) if isinstance(modalities, str) else modalities
    main: Any = getattr(model, "main_input_name", "input_ids")
    named = {"text": "input_ids", "image": "pixel_values"}
    wanted = [main, *(named[kind] for kind in modalities if kind in named)]
    if getattr(config, "is_encoder_decoder", False):
        wanted.append("decoder_input_ids")
    taken = inspect.signature(model.forward).parameters
    makers = {
        "input_ids": _tokens,
        "decoder_input_ids": _tokens,
        "pixel_values": _pixels,
        "input_features": _spectrogram,
        "input_values": _waveform,
    }
    names = [name for name in dict.fromkeys(wanted) if isinstance(name, str) and name in makers and name in taken]
    found = {name: makers[name](config, samples, generator) for name in names}
    usable = {name: value for name, value in found.items() if value is not None}
    return [usable, {main: usable[main]}] if main in usable and len(usable) > 1 else [usable] if usable else []


def _tokens(config: Any, samples: int, generator: torch.Generator) -> Tensor | None:
    """Random tokens [samples, length]; None where the configuration has no vocabulary."""
    try:
        text = config.get_text_config()
    except ValueError:  # several parts read text, and which one `input_ids` go to is not said
        return None
    vocabulary = getattr(text, "vocab_size", None)
    if not isinstance(vocabulary, int):
        return None
    special = set()
    for part in (config, *_sub_configs(config)):
        for key, value in part.to_dict().items():
            if key.endswith(("token_id", "token_index")):
                special.update(value if isinstance(value, list) else [value])
    plain = torch.tensor([token for token in range(vocabulary) if token not in special] or [0])
    most = getattr(text, "max_position_embeddings", None)
    # Some tables of positions start behind a padding token's number, which shortens what can be read by two.
    length = min(TOKENS, max(1, most - 2)) if isinstance(most, int) and most > 0 else TOKENS
    return plain[torch.randint(len(plain), (samples, length), generator=generator)]


def _pixels(config: Any, samples: int, generator: torch.Generator) -> Tensor | None:
    """A random image [samples, channels, height, width] of the size in the configuration."""
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or 224
    size = [size, size] if isinstance(size, int) else list(size.values()) if isinstance(size, Mapping) else list(size)
    channels = getattr(vision, "num_channels", None) or 3
    return torch.randn(samples, channels, *size, generator=generator)


def _spectrogram(config: Any, samples: int, generator: torch.Generator) -> Tensor | None:
    """Random features [samples, bins, frames] of a recording; None where their sizes are not given."""
    bins, frames = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", None)
    if not isinstance(bins, int) or not isinstance(frames, int):
        return None
    return torch.randn(samples, bins, 2 * frames, generator=generator)


def _waveform(config: Any, samples: int, generator: torch.Generator) -> Tensor | None:
    """A random recording [samples, length], long enough for a few frames of a convolutional encoder."""
    length = FRAMES
    kernels, strides = getattr(config, "conv_kernel", None), getattr(config, "conv_stride", None)
    if not kernels or not strides:
        return None
    for kernel, stride in reversed(list(zip(kernels, strides, strict=False))):
        length = (length - 1) * stride + kernel
    return torch.randn(samples, length, generator=generator)


SOURCE = Source(
    prefix="hf",
    example="hf:DIRECTORY",
    build=_build_from_folder,
    is_path=True,
)
