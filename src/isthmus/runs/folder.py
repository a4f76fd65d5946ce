"""What a run folder holds beside the weights: recipe, report and page; the files of Hugging Face folders."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from isthmus.checkpoint.hashes import hash_file
from isthmus.checkpoint.writing import write_text
from isthmus.errors import ModelError
from isthmus.models import absolute_spec, parse_spec
from isthmus.models.hugging_face import CONFIG, save_weights
from isthmus.report.page import write_report
from isthmus.report.schema import RunReport
from isthmus.runs.facts import plain_json
from isthmus.runs.recipe import Recipe

# Files of tokenizers, of processors of images and sound, and of text generation.
COMPANIONS = (
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "feature_extractor_config.json",
    "generation_config.json", "merges.txt", "normalizer.json", "preprocessor_config.json", "processor_config.json",
    "sentencepiece.bpe.model", "source.spm", "special_tokens_map.json", "spiece.model", "target.spm", "tokenizer.json",
    "tokenizer.model", "tokenizer_config.json", "video_preprocessor_config.json", "vocab.json", "vocab.txt",
)  # fmt: skip


def copy_config(source: str, folder: Path) -> None:
    """Copies `config.json` from beside the first checkpoint, where there is one."""
    path = Path(source)
    config = (path if path.is_dir() else path.parent) / CONFIG
    if config.is_file():
        shutil.copyfile(config, folder / CONFIG)


def save_hugging_face(model: nn.Module, recipe: Recipe, folder: Path, gained_biases: Sequence[str] = ()) -> list[str]:
    """Writes a folder that `from_pretrained` reads; returns the companions that the parents do not agree on.

    The weights have the names of transformers' files. `config.json` is that of the architecture, with the dtype of the
    weights. Of the other files those are copied that are the same in all parents that have them.

    Raises:
        CheckpointError: The folder cannot be written.
        ModelError: A repair gave the model biases, which no `config.json` can describe.
    """
    if gained_biases:
        raise ModelError(
            f"the repair gave biases to layers that have none ({', '.join(gained_biases[:3])}), and {CONFIG} cannot "
            "describe them: use --repair reset or --repair none"
        )
    home = Path(parse_spec(recipe.architecture)[1])
    written = folder / "weights"
    save_weights(model, written)
    for path in sorted(written.glob("model*.safetensors*")):
        path.rename(folder / path.name)
    shutil.rmtree(written)
    dtype = next(str(p.dtype) for p in model.parameters() if p.is_floating_point()).removeprefix("torch.")
    config = _with_dtype(json.loads((home / CONFIG).read_text(encoding="utf-8")), dtype)
    write_text(folder / CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    left_out = []
    folders = dict.fromkeys(path for member in recipe.models if (path := Path(member.model)).is_dir())
    for name in COMPANIONS:
        found = [path / name for path in (folders or {home: None}) if (path / name).is_file()]
        if len({path.read_bytes() for path in found}) == 1:
            shutil.copyfile(found[0], folder / name)
        elif found:
            left_out.append(name)
    return left_out


def _with_dtype(config: Any, dtype: str) -> Any:
    """A configuration, and those inside it, with another dtype where they name one."""
    if not isinstance(config, dict):
        return config
    named = {key: dtype for key in ("dtype", "torch_dtype") if key in config}
    return {key: _with_dtype(value, dtype) for key, value in config.items()} | named


def write_run(folder: Path, recipe: Recipe, report: RunReport) -> None:
    """Writes the recipe with all hashes, the report and its page."""
    members = [
        member.model_copy(update={"model": str(Path(member.model).resolve()), "sha256": entry.sha256})
        for member, entry in zip(recipe.models, report.provenance.models, strict=True)
    ]
    complete = recipe.model_copy(update={"models": members, "architecture": absolute_spec(recipe.architecture)})
    if recipe.data is not None and Path(recipe.data.name).suffix == ".npz":
        path = Path(recipe.data.name).resolve()
        complete.data = recipe.data.model_copy(update={"name": str(path), "sha256": hash_file(path)})
    write_text(folder / "recipe.yaml", complete.to_yaml())
    write_text(folder / "report.json", json.dumps(plain_json(report), indent=1, ensure_ascii=False))
    write_report(folder)
