"""Hashes of what isthmus computes on small networks, to show that a change of the code changed no number.

Run by hand on one machine, before the change and after it:

    python benchmarks/same_numbers.py -o before.json
    python benchmarks/same_numbers.py -o after.json
    python benchmarks/same_numbers.py --compare before.json after.json

Every result is a key, `JOB/STEP`, and its value: a number, a refusal's text, or the SHA-256 of all tensors and numbers
in it. Jobs are the networks of the tests, those of `isthmus.models`, a study of three trained networks, and the demo;
`--only zoo/LSTM` runs some. Times are left out. Hashes depend on the machine and on the build of torch, so none are
kept here. All jobs take some eight minutes on one core.
"""

import argparse
import copy
import dataclasses
import hashlib
import inspect
import json
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import isthmus
from helpers.zoo import ZOO
from isthmus import explain
from isthmus.average import AVERAGES
from isthmus.checkpoint import load_module, load_state
from isthmus.data import load_data
from isthmus.match import CCA, METHODS, STE, Learned, OrthogonalMatching, OTFusion, Sinkhorn, ZipIt
from isthmus.models import load_model, sample_shape, sample_tokens
from isthmus.runs.demo import run_demo

# Methods that train by gradients, in a few steps.
BRIEF = {
    "ste": STE(steps=5, learning_rate=0.03),
    "sinkhorn": Sinkhorn(steps=5, learning_rate=0.2),
    "learned": Learned(steps=5, learning_rate=0.05),
}
QUICK = {name: name for name in METHODS if name not in BRIEF}
VARIANTS = {
    "cca, pre": CCA(gamma=0.1, at="pre"),
    "learned, invertible": Learned(group="invertible", steps=5),
    "learned, orthogonal": Learned(group="orthogonal", steps=5),
    "orthogonal_matching, activations": OrthogonalMatching(start="activations"),
    "orthogonal_matching, invertible": OrthogonalMatching(invertible=True),
    "sinkhorn, l2": Sinkhorn(loss="l2", steps=5),
    "zipit, post": ZipIt(at="post"),
}
EVERY = {**QUICK, **BRIEF, **VARIANTS}
# What is averaged, mended and connected.
MERGED = ("weight_matching", "cca")

# Networks of the tests on which these run too, a few kinds of structure.
STRUCTURES = ("PlainMLP", "BatchNorm", "GroupNormResidual", "GroupedConv", "TiedEmbedding", "GroupedQueries", "LSTM")
NETWORKS = (
    "mlp?in_features=20&width=12&depth=3",
    "cnn?width=0.25",
    "vgg11_bn?width=0.0625",
    "resnet20?width=0.25",
    "resnet20?width=0.25&norm=group",
    "gpt?width=16&vocabulary=11&block=8",
    "gpt?width=16&vocabulary=11&block=8&positions=rope&norm=rms&mlp=gated&tied=true",
    "vit?width=16&depth=2&image_size=8",
)
PARENT = "cnn?width=0.5"  # of the study

# Entries that no two runs have in common.
UNSTEADY = ("seconds", "memory", "created", "path")
# What merging and repairing say of a module beside its tensors.
NOTES = ("needs_repair", "statistics_measured", "gained_biases")


def feed(into: Any, value: Any) -> None:
    """Hashes a value: the numbers in it, and the names of mappings, but not those of classes and their attributes."""
    if isinstance(value, Tensor):
        value = value.detach().contiguous()
        into.update(f"{value.dtype} {tuple(value.shape)}".encode())
        into.update(value.flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray):
        feed(into, torch.from_numpy(np.ascontiguousarray(value)))
    elif isinstance(value, isthmus.Symmetry):
        into.update(value.to_json().encode())
    elif isinstance(value, nn.Module):
        feed(into, [value.state_dict(), *(getattr(value, name, None) for name in NOTES)])
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        feed(into, [getattr(value, each.name) for each in dataclasses.fields(value) if each.name not in UNSTEADY])
    elif isinstance(value, Mapping):
        steady = {str(key): item for key, item in value.items() if key not in UNSTEADY or isinstance(item, Tensor)}
        feed(into, sorted(steady.items()))
    elif isinstance(value, list | tuple):
        into.update(f"{len(value)} entries".encode())
        for item in value:
            feed(into, item)
    elif isinstance(value, np.generic):
        feed(into, value.item())
    elif isinstance(value, str | int | float | None):
        into.update(f"{value!r};".encode())
    else:
        raise TypeError(f"a {type(value).__name__} cannot be hashed: add it to `feed`")


def shown(value: Any) -> str:
    """A number as it is, anything else as its SHA-256."""
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, int | float | None):
        return repr(value)
    digest = hashlib.sha256()
    feed(digest, value)
    return digest.hexdigest()


def parts_of(value: Any) -> dict[str, Any]:
    """The parts of a result that have keys of their own."""
    if isinstance(value, isthmus.Symmetry):
        return {"/hash": value.hash, "/json": value.to_json()}
    if isinstance(value, isthmus.Proof):
        return {"/max_error": value.max_error, "/all": value}
    if isinstance(value, isthmus.Alignment):
        return {"/transforms": value.transforms, "/objective": value.objective, "/all": value}
    if isinstance(value, isthmus.Curve):
        return {"/barrier": value.barrier, "/losses": value.losses, "/accuracies": value.accuracies, "/all": value}
    if isinstance(value, isthmus.Score):
        return {"/loss": value.loss, "/accuracy": value.accuracy}
    return {"": value}


class Record:
    """Results by key; called with a step's name and what it runs, it keeps the result and returns it."""

    def __init__(self, verbose: bool = False) -> None:
        self.values: dict[str, str] = {}
        self.job, self.verbose = "", verbose

    def __call__(self, step: str, work: Callable[..., Any], *args: Any, **options: Any) -> Any:
        key = f"{self.job}/{step}"
        torch.manual_seed(0)
        try:
            found = work(*args, **options)
            told = {f"{key}{name}": shown(part) for name, part in parts_of(found).items()}
        except isthmus.IsthmusError as error:
            found, told = None, {key: f"refused, {type(error).__name__}: {error}"}
        except Exception as error:  # no reason to lose all other numbers
            found, told = None, {key: f"failed, {type(error).__name__}: {error}"}
        again = set(told) & set(self.values)
        assert not again, f"two results of one key: {again}"
        self.values |= told
        return found

    def run(self, name: str, job: Callable[["Record"], None]) -> None:
        """All steps of a job."""
        self.job, start, before = name, time.perf_counter(), len(self.values)
        try:
            job(self)
        except Exception as error:
            self.values[name] = f"failed, {type(error).__name__}: {error}"
        if self.verbose:
            print(f"{name}: {len(self.values) - before} keys, {time.perf_counter() - start:.1f} s", flush=True)


@dataclasses.dataclass(frozen=True)
class Case:
    """Models of one architecture, the inputs to trace with, and batches."""

    models: Sequence[nn.Module]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    data: Sequence[Any]


def stir(model: nn.Module, seed: int) -> nn.Module:
    """The model with vectors away from their constant initial values, changed in place."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.ndim == 1:
            noise = torch.rand(tensor.shape, generator=generator)
            tensor.copy_(0.5 + noise if "running_var" in name else tensor + noise - 0.5)
    return model


def drawn(build: Callable[[], nn.Module], count: int) -> list[nn.Module]:
    """Networks of different seeds in general position, in `eval()`."""
    models = []
    for seed in range(count):
        torch.manual_seed(seed)
        models.append(stir(build().eval(), seed))
    return models


def classes_for(output: Any, seed: int) -> Tensor:
    """Random classes of the shape that class scores ask for."""
    if isinstance(output, Mapping):
        output = output["logits"]
    scores = output[0] if isinstance(output, tuple) else output
    return torch.randint(scores.shape[-1], scores.shape[:-1], generator=torch.Generator().manual_seed(seed))


def survey(record: Record, case: Case, methods: Mapping[str, Any]) -> None:
    """Everything on one case: symmetry, proof, moments, foldings, every method, and what is made of an alignment."""
    models, first = case.models, case.models[0]
    symmetry = record("trace", isthmus.trace, first, *case.args, kwargs=case.kwargs)
    if symmetry is None:
        return
    record("verify", isthmus.verify, first, symmetry, *case.args, kwargs=case.kwargs)
    for at in ("pre", "post"):
        record(f"collect/{at}", isthmus.collect, models, symmetry, case.data, at=at)
    for change in (isthmus.canonicalise, isthmus.fold_batch_norms, isthmus.fold_norm_gains):
        record(change.__name__, change, first, symmetry)
    for name, method in methods.items():
        found = record(f"align/{name}", isthmus.align, models, symmetry, method, case.data)
        if found is not None and name in MERGED:
            use(record, case, name, found)


def use(record: Record, case: Case, name: str, alignment: isthmus.Alignment) -> None:
    """All averages, repairs and lines of one alignment."""
    models, data = case.models, case.data
    base = stir(copy.deepcopy(models[0]), 9)
    for average in AVERAGES:
        record(f"merge/{name}/{average}", isthmus.merge, models, alignment, average, data=data, base=base)
    weights = range(1, len(models) + 1)
    merged = record(f"merge/{name}/uneven mean", isthmus.merge, models, alignment, "mean", weights)
    for repair in ("reset", "repair"):
        known = {"parents": models, "alignment": alignment, "coefficients": weights} if repair == "repair" else {}
        mended = record(f"repair/{name}/{repair}", isthmus.repair, merged, data, repair, **known)
        if mended is not None:
            record(f"evaluate/{name}/{repair}", isthmus.evaluate, mended, data)
    moved = record(f"apply/{name}", isthmus.apply, alignment, models[1], 1)
    if moved is not None:
        record(f"connect/{name}", isthmus.connect, models[0], moved, data, 3, calibration=data)


def zoo(name: str, record: Record) -> None:
    """Everything on two networks of the tests."""
    models = drawn(ZOO[name], 2)
    args, kwargs = models[0].inputs()
    names = inspect.signature(models[0].forward)
    data: list[Any] = []
    for seed in (1, 2):
        inputs, named = models[0].inputs(samples=24, seed=seed)
        with torch.no_grad():
            targets = classes_for(models[0](*inputs, **named), seed)
        everything = {**names.bind(*inputs, **named).arguments, "labels": targets}
        data.append(everything if kwargs else (inputs, targets))
    if kwargs:
        args, kwargs = (), names.bind(*args, **kwargs).arguments
    survey(record, Case(models, args, kwargs, data), EVERY if name in STRUCTURES else QUICK)


def network(spec: str, record: Record) -> None:
    """Everything on three networks of `isthmus.models`."""
    models = drawn(partial(load_model, spec), 3)
    shape, tokens = sample_shape(models[0]), sample_tokens(models[0])
    if spec.startswith("resnet20"):  # takes images of any size; small ones are quick
        shape = (shape[0], 16, 16)

    def batch(samples: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if tokens is not None:
            return torch.randint(tokens, (samples, *shape), generator=generator)
        return torch.randn(samples, *shape, generator=generator)

    with torch.no_grad():
        data = [(x, classes_for(models[0](x), seed)) for seed in (1, 2) for x in [batch(32, seed)]]
    survey(record, Case(models, (batch(2, 0),), {}, data), QUICK if "norm=group" in spec else EVERY)


@cache
def digits() -> tuple[list[Any], list[Any]]:
    """A part of the digits to fit on, and one to score on."""
    data = load_data("digits")
    return list(data.train(100, seed=0).take(400)), list(data.test(100, seed=0).take(200))


@cache
def trained() -> tuple[nn.Module, ...]:
    """Three networks after two epochs on the digits."""
    models = drawn(partial(load_model, PARENT), 3)
    for seed, model in enumerate(models):
        optimizer = torch.optim.Adam(model.train().parameters(), lr=3e-3)
        torch.manual_seed(seed)
        for x, y in digits()[0] * 2:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        optimizer.zero_grad()
        model.eval()
    return tuple(models)


def study(record: Record) -> None:
    """What takes several models: triangles, cycles, comparisons, zipping, and models of several widths."""
    (fitting, scored), models = digits(), trained()
    symmetry = isthmus.trace(models[0], fitting[0][0])
    survey(record, Case(models, (fitting[0][0][:2],), {}, fitting), EVERY)
    alignment = isthmus.align(models, symmetry, "c2m3")
    record("rebased", alignment.rebased, 1)
    record("between", alignment.between, 2, 1)
    record("keeps_function", isthmus.keeps_function, alignment)
    moved = [isthmus.apply(alignment, model, index) for index, model in enumerate(models)]
    record("cycle_error", isthmus.cycle_error, models, symmetry)
    record("cycle_error/cca", isthmus.cycle_error, models, symmetry, CCA(gamma=0.1), fitting)
    record("pairwise_barriers", isthmus.pairwise_barriers, models, alignment, scored, fitting, 3)
    record("walk_simplex", isthmus.walk_simplex, moved, scored, 3, calibration=fitting)
    record("walk_plane", isthmus.walk_plane, moved, scored, 3, calibration=fitting)
    chosen = {"methods": ["identity", "weight_matching", "cca?gamma=0.1"], "averages": ["mean", "pleas"]}
    record("compare", isthmus.compare, models[:2], scored, fitting, symmetry, **chosen)
    for method in ("weight_matching", "zipit"):
        record(f"partial_zip/{method}", zipped, models[:2], fitting, list(symmetry)[-1].name, method)
    record("merge/coefficients", isthmus.merge, models[:2], None, "mean", {"": [1.0, 1.0], "head": [1.0, 3.0]})
    several_widths(record)
    with tempfile.TemporaryDirectory() as folder:
        alignment.save(Path(folder) / "alignment.safetensors")
        record("load", isthmus.Alignment.load, Path(folder) / "alignment.safetensors", symmetry)


def several_widths(record: Record) -> None:
    """The one method that aligns them, and their merge."""
    widths = [stir(load_model(f"mlp?in_features=64&width={width}&depth=2").eval(), width) for width in (12, 15)]
    flat = [(x.flatten(1), y) for x, y in digits()[0]]
    for by in ("weights", "activations"):
        for coupling in ("hard", "soft"):
            found = record(f"widths/{by}, {coupling}", isthmus.align, widths, None, OTFusion(by, coupling), flat)
            record(f"widths/{by}, {coupling}/merge", isthmus.merge, widths, found)


def zipped(models: Sequence[nn.Module], data: Any, stop: str, method: str) -> list[Any]:
    """A trunk with its heads, and what all of them answer."""
    found = isthmus.partial_zip(models, data, stop, method=method)
    with torch.no_grad():
        return [found, found(data[0][0])]


def explained(record: Record) -> None:
    """The functions of `isthmus.explain`."""
    (fitting, scored), models = digits(), trained()[:2]
    symmetry = isthmus.trace(models[0], fitting[0][0])
    space = list(symmetry)[-1].name
    for name in MERGED:
        alignment = isthmus.align(models, symmetry, name, fitting)
        merged = isthmus.repair(isthmus.merge(models, alignment), fitting)
        naive = isthmus.repair(isthmus.merge(models), fitting)
        record(f"units/{name}", explain.measure_units, models, alignment, merged, scored, naive=naive)
        spectra = record(f"spectra/{name}", explain.measure_spectra, models, alignment, merged, fitting, symmetry)
        if alignment.is_exact:
            moved = isthmus.apply(alignment, models[1], 1)
            taylor = record("taylor_barrier", explain.taylor_barrier, models[0], moved, scored)
            barriers = {"naive": 1.0, name: 0.1}
            record("judge_claims", explain.judge_claims, spectra, taylor, barriers)
            moments = isthmus.collect(models, symmetry, scored)
            record("matched_correlations", explain.matched_correlations, moments, alignment)
    record("cka_matrix", explain.cka_matrix, models, symmetry, scored)
    record("intervene", explain.intervene, models, symmetry, [2, 0.5], scored, calibration=fitting, restarts=1)
    record("match_directions", explain.match_directions, models, symmetry, 0.5, "rest")
    record("measure_images", explain.measure_images, fitting)
    for name in ("fourier", "maco"):
        draw = partial(explain.visualise, models[0], symmetry, space, [0, 3], fitting, method=name, steps=8)
        pictures = record(f"visualise/{name}", draw)
        record(f"high_frequency_share/{name}", explain.high_frequency_share, pictures.images)
        record(f"spectrum_of/{name}", explain.spectrum_of, pictures.images)
    answers = [explain.respond(model, symmetry, space, scored).double() for model in models]
    record("respond", list, answers)
    record("debiased_cka", explain.debiased_cka, *answers)


def demo(record: Record) -> None:
    """The demo's run, entry by entry of its report, and the steps of the README on its parents."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "demo"
        run_demo(out)
        report = record("report", json.loads, (out / "report.json").read_text())
        paths = sorted((Path(folder) / "demo-parents").glob("*.safetensors"))
        parents = [load_module(path, load_model("zoo:cnn?width=3")).eval() for path in paths]
        record("model", load_state, out / "model.safetensors")
        record("alignment", isthmus.Alignment.load, out / "alignment.safetensors")
        record("features", json.loads, (out / "features.json").read_text())
    for name, entry in {**report, **{f"explain/{key}": entry for key, entry in report["explain"].items()}}.items():
        if name.rpartition("/")[2] not in UNSTEADY:
            record(f"report/{name}", dict, {name: entry})
    for index, parent in enumerate(parents):
        record(f"parent/{index}", parent.state_dict)
    fitting, scored = digits()
    survey(record, Case(parents, (fitting[0][0][:2],), {}, fitting), {**QUICK, **BRIEF})
    record("evaluate", isthmus.evaluate, parents[0], scored)


def jobs() -> dict[str, Callable[[Record], None]]:
    """All jobs by name."""
    found: dict[str, Callable[[Record], None]] = {f"zoo/{name}": partial(zoo, name) for name in ZOO}
    found |= {f"models/{spec}": partial(network, spec) for spec in NETWORKS}
    return found | {"study/steps": study, "study/explain": explained, "study/demo": demo}


def compare(before: Mapping[str, str], after: Mapping[str, str]) -> bool:
    """Prints every key of different values, and counts; returns whether there are none."""
    lost, new = sorted(set(before) - set(after)), sorted(set(after) - set(before))
    changed = [key for key in sorted(set(before) & set(after)) if before[key] != after[key]]
    for key in changed:
        print(f"changed  {key}\n  before {before[key]}\n  after  {after[key]}")
    for what, keys in (("missing", lost), ("new", new)):
        for key in keys:
            print(f"{what:8} {key}")
    same = len(set(before) & set(after)) - len(changed)
    print(f"{same} the same, {len(changed)} changed, {len(lost)} missing, {len(new)} new")
    return not (changed or lost or new)


def main() -> None:
    """Records all results, or compares two records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, help="the JSON file to write")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"), help="two such files")
    parser.add_argument("--only", default="", metavar="REGEX", help="only jobs, or compared keys, of such names")
    parser.add_argument("-v", "--verbose", action="store_true", help="print every job")
    options = parser.parse_args()
    if (options.out is None) == (options.compare is None):
        parser.error("give either -o FILE or --compare BEFORE AFTER")
    if options.compare:
        two = [json.loads(path.read_text()) for path in options.compare]
        two = [{key: value for key, value in each.items() if re.search(options.only, key)} for each in two]
        sys.exit(0 if compare(*two) else 1)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    record = Record(options.verbose)
    for name, job in jobs().items():
        if re.search(options.only, name):
            record.run(name, job)
            options.out.write_text(json.dumps(record.values, indent=0, sort_keys=True, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
