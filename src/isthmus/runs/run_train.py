"""Training a parent from the command line: data, its split, a preset, the checkpoint and its score."""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from isthmus.checkpoint.hashes import hash_file
from isthmus.checkpoint.writing import save_state
from isthmus.data.load import BLOCK, load_data
from isthmus.data.splits import split_for_models
from isthmus.errors import CheckpointError, InputError
from isthmus.models import load_model, window
from isthmus.observe.score import evaluate
from isthmus.registry import did_you_mean
from isthmus.training.presets import PRESETS, TrainOptions
from isthmus.training.trainer import train

# The preset where the command names none: by the network of the zoo, else by the data set.
NETWORK_PRESETS = {"gpt": "cpu_gpt", "vit": "cpu_vit"}
USUAL_PRESETS = {"digits": "cpu_digits", "cifar10": "cpu_resnet20", "cifar100": "cpu_resnet20"}


def run_train(
    model: str,
    data: str,
    out: Path,
    *,
    seed: int,
    preset: str | None = None,
    changes: Mapping[str, Any] | None = None,
    split: str = "none",
    part: int = 0,
    parts: int = 2,
    folder: Path | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Trains a model, writes its checkpoint, and returns its score on the test split.

    Progress is kept beside the checkpoint and removed when it is written.

    Raises:
        CheckpointError: The checkpoint exists and `force` is not set, or it cannot be written.
        InputError: An unknown preset or split, or a part that the split does not have.
        IsthmusError: Anything else that loading the data and training raise.
    """
    if out.exists() and not force:
        raise CheckpointError(f"{out} exists: choose another -o or pass --force")
    if out.suffix != ".safetensors":
        raise InputError(f"{out}: a checkpoint is written as safetensors; choose a name that ends in .safetensors")
    network = model.partition("?")[0].removeprefix("zoo:")
    name = preset or NETWORK_PRESETS.get(network) or USUAL_PRESETS.get(data, "cpu_mlp")
    if name not in PRESETS:
        raise InputError(f"no preset {name!r}{did_you_mean(name, PRESETS)}: choose from {', '.join(PRESETS)}")
    options: TrainOptions = PRESETS[name]
    changed = {key: value for key, value in (changes or {}).items() if value is not None}
    options = dataclasses.replace(options, **changed)
    with torch.random.fork_rng([]):  # only to know its window; `train` draws the weights from the seed
        block = window(load_model(model)) or BLOCK
    loaded = load_data(data, folder, block=block)
    indices = None
    if split != "none":
        portions = split_for_models(loaded.y_train, split, models=parts, seed=0)
        if not 0 <= part < len(portions):
            raise InputError(f"--part {part}: the split has parts 0 … {len(portions) - 1}")
        indices = portions[part]
    out.parent.mkdir(parents=True, exist_ok=True)
    resume = out.with_name(out.name + ".resume")
    start = time.perf_counter()
    trained = train(model, loaded, options, seed=seed, indices=indices, resume=resume, progress=True)
    score = evaluate(trained.model, loaded.test())
    save_state(trained.model.state_dict(), out, metadata={"format": "pt"})
    resume.unlink(missing_ok=True)
    return {
        "model": model,
        "data": data,
        "seed": seed,
        "preset": name,
        "options": dataclasses.asdict(options),
        "split": {"name": split, "part": part, "parts": parts} if split != "none" else None,
        "checkpoint": {"path": str(out.resolve()), "sha256": hash_file(out)},
        "history": [dataclasses.asdict(epoch) for epoch in trained.history],
        "test": {"loss": score.loss, "accuracy": score.accuracy, "count": score.count},
        "seconds": time.perf_counter() - start,
    }
