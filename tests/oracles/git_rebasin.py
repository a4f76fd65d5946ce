"""Git Re-Basin and REPAIR transcribed step by step, for comparison: float64, dense, no caching, no tracing.

A specification lists by hand what the library finds by tracing: for every hidden space the places (parameter, axis)
that its permutation moves. `permutations[space][i] = j` puts unit j of the moved model into slot i of the fixed one.

Source: Ainsworth, Hayase, Srinivasa, Git Re-Basin, ICLR 2023, sections 3.1 and 3.2 and Algorithms 1 and 3; Jordan,
    Sedghi, Saukh, Entezari, Neyshabur, REPAIR, ICLR 2023, section 3. Written from their descriptions.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

Spec = dict[str, list[tuple[str, int]]]
State = Mapping[str, np.ndarray]
Permutations = dict[str, np.ndarray]
Batches = Sequence[tuple[Tensor, Tensor]]
Watched = tuple[list[tuple[str, ...]], bool]

GAIN = 1e-12
VGG11 = (0, 3, 6, 8, 11, 13, 16, 18)
VGG11_BN = (0, 4, 8, 11, 15, 18, 22, 25)


def as_arrays(model: nn.Module) -> dict[str, np.ndarray]:
    """The floating-point tensors of a model in float64."""
    return {name: t.double().numpy().copy() for name, t in model.state_dict().items() if t.is_floating_point()}


# Specifications


def batch_norm(name: str) -> list[tuple[str, int]]:
    """Gain and shift of a normalisation layer: what is trained of it."""
    return [(f"{name}.weight", 0), (f"{name}.bias", 0)]


def mlp_spec(depth: int) -> Spec:
    """`isthmus.models.MLP`."""
    layers = [*(f"hidden.{index}" for index in range(depth)), "head"]
    return {
        before: [(f"{before}.weight", 0), (f"{before}.bias", 0), (f"{after}.weight", 1)]
        for before, after in pairwise(layers)
    }


def vgg11_spec(bn: bool) -> Spec:
    """`isthmus.models.VGG` of depth 11 on 32×32 images, where one pixel is left to flatten."""
    convolutions = VGG11_BN if bn else VGG11
    layers = [*(f"features.{index}" for index in convolutions), "head"]
    spec: Spec = {}
    for index, (before, after) in enumerate(pairwise(layers)):
        own = batch_norm(f"features.{convolutions[index] + 1}") if bn else [(f"{before}.bias", 0)]
        spec[before] = [(f"{before}.weight", 0), *own, (f"{after}.weight", 1)]
    return spec


def resnet20_spec() -> Spec:
    """`isthmus.models.ResNet20` with BatchNorm: one space a stage for the residual stream, one inside each block."""
    spec: Spec = {"stage0": [("conv.weight", 0), *batch_norm("norm")]}
    for block in range(9):
        stage, path = block // 3, f"blocks.{block}"
        into = f"stage{stage - 1}" if block in (3, 6) else f"stage{stage}"
        spec[into].append((f"{path}.conv1.weight", 1))
        spec[f"inside{block}"] = [
            (f"{path}.conv1.weight", 0),
            *batch_norm(f"{path}.norm1"),
            (f"{path}.conv2.weight", 1),
        ]
        stream = spec.setdefault(f"stage{stage}", [])
        stream += [(f"{path}.conv2.weight", 0), *batch_norm(f"{path}.norm2")]
        if block in (3, 6):
            spec[into].append((f"{path}.shortcut.0.weight", 1))
            stream += [(f"{path}.shortcut.0.weight", 0), *batch_norm(f"{path}.shortcut.1")]
    spec["stage2"].append(("head.weight", 1))
    return spec


def mlp_watched(depth: int) -> dict[str, dict[str, Watched]]:
    """Where the spaces of `mlp_spec` are read: by their consumers, and before the ReLU."""
    layers = [*(f"hidden.{index}" for index in range(depth)), "head"]
    return {
        "post": {before: ([(after,)], True) for before, after in pairwise(layers)},
        "pre": {layer: ([(layer,)], False) for layer in layers[:-1]},
    }


def vgg11_bn_watched() -> dict[str, dict[str, Watched]]:
    """Where the spaces of `vgg11_spec` are read: behind ReLU and pooling, and before the ReLU."""
    layers = [*(f"features.{index}" for index in VGG11_BN), "head"]
    return {
        "post": {before: ([(after,)], True) for before, after in pairwise(layers)},
        "pre": {f"features.{index}": ([(f"features.{index + 1}",)], False) for index in VGG11_BN},
    }


def resnet20_watched() -> dict[str, dict[str, Watched]]:
    """Where the spaces of `resnet20_spec` are read: a stream at each of its consumers, and before each of its ReLUs."""
    post: dict[str, Watched] = {}
    pre: dict[str, Watched] = {"stage0": ([("norm",)], False)}
    for block in range(9):
        stage, path = block // 3, f"blocks.{block}"
        into = f"stage{stage - 1}" if block in (3, 6) else f"stage{stage}"
        post.setdefault(into, ([], True))[0].append((f"{path}.conv1",))
        post[f"inside{block}"] = ([(f"{path}.conv2",)], True)
        pre[f"inside{block}"] = ([(f"{path}.norm1",)], False)
        pre.setdefault(f"stage{stage}", ([], False))[0].append((f"{path}.norm2", f"{path}.shortcut"))
    post["stage2"][0].append(("head",))
    return {"post": post, "pre": pre}


# Weight matching


def sizes_of(spec: Spec, state: State) -> dict[str, int]:
    """Units of every space."""
    return {space: state[places[0][0]].shape[places[0][1]] for space, places in spec.items()}


def permuted(spec: Spec, permutations: Permutations, state: State, name: str, skip: str | None = None) -> np.ndarray:
    """One tensor with all permutations but that of `skip` applied."""
    tensor = state[name]
    for space, places in spec.items():
        for parameter, axis in places:
            if parameter == name and space != skip:
                tensor = np.take(tensor, permutations[space], axis=axis)
    return tensor


def objective(spec: Spec, a: State, b: State, permutations: Permutations) -> float:
    """The inner product of A's and the permuted B's parameters, over those that some space moves."""
    names = {name for places in spec.values() for name, _ in places}
    return sum(float(np.sum(a[name] * permuted(spec, permutations, b, name))) for name in names)


def gram(spec: Spec, a: State, b: State, permutations: Permutations, space: str) -> np.ndarray:
    """The similarity of A's units (rows) with B's, all other spaces held."""
    total = None
    for name, axis in spec[space]:
        rows_a = np.moveaxis(a[name], axis, 0).reshape(a[name].shape[axis], -1)
        moved = permuted(spec, permutations, b, name, skip=space)
        rows_b = np.moveaxis(moved, axis, 0).reshape(moved.shape[axis], -1)
        product = np.einsum("if,jf->ij", rows_a, rows_b, optimize=True)
        total = product if total is None else total + product
    assert total is not None
    return total


def weight_matching(
    spec: Spec, a: State, b: State, rng: np.random.Generator, sweeps: int = 100, start: Permutations | None = None
) -> Permutations:
    """Coordinate descent: each sweep solves every space once, in the order that `rng.permutation` draws."""
    spaces = list(spec)
    permutations = start or {space: np.arange(size) for space, size in sizes_of(spec, a).items()}
    for _ in range(sweeps):
        improved = False
        for index in rng.permutation(len(spaces)):
            space = spaces[index]
            similarity = gram(spec, a, b, permutations, space)
            before = similarity[np.arange(len(similarity)), permutations[space]].sum()
            rows, columns = linear_sum_assignment(similarity, maximize=True)
            after = similarity[rows, columns].sum()
            if after > before + GAIN:
                permutations[space] = columns
                improved = True
        if not improved:
            break
    return permutations


def apply_permutations(spec: Spec, permutations: Permutations, state: State) -> dict[str, np.ndarray]:
    """All tensors of a state permuted."""
    return {name: permuted(spec, permutations, state, name) for name in state}


def merge_many(
    spec: Spec, states: Sequence[State], rng: np.random.Generator, rounds: int = 100
) -> list[dict[str, np.ndarray]]:
    """Each model in turn is matched to the mean of the others, until the summed distance stops falling."""
    moved = [dict(state) for state in states]
    best = summed_inner_product(spec, moved)
    for _ in range(rounds):
        for index in rng.permutation(len(moved)):
            others = [state for other, state in enumerate(moved) if other != index]
            mean = {name: np.mean([state[name] for state in others], axis=0) for name in moved[0]}
            permutations = weight_matching(spec, mean, moved[index], rng)
            moved[index] = apply_permutations(spec, permutations, moved[index])
        reached = summed_inner_product(spec, moved)
        if reached <= best + GAIN:
            break
        best = reached
    return moved


def summed_inner_product(spec: Spec, states: Sequence[State]) -> float:
    """The inner products of the moved parameters, summed over all pairs of models."""
    identity = {space: np.arange(size) for space, size in sizes_of(spec, states[0]).items()}
    return sum(objective(spec, a, b, identity) for i, a in enumerate(states) for b in states[i + 1 :])


# Activations


def samples_of(value: Tensor, dim: int, units: int) -> np.ndarray:
    """A value as samples of units; a flattened picture holds `units` channels of several positions each."""
    rows = value.movedim(dim, -1).reshape(-1, value.shape[dim])
    if value.shape[dim] != units:  # flattened channel by channel
        rows = rows.reshape(len(rows), units, -1).transpose(1, 2).reshape(-1, units)
    return rows.double().numpy()


def activations(
    model: nn.Module, batches: Iterable[Tensor], watched: Mapping[str, Watched], units: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """All samples of every space, stacked.

    Args:
        model: In `eval()`.
        batches: Inputs.
        watched: For every space the modules to watch, and whether their inputs (True) or outputs count; several names
            together stand for the sum of their outputs.
        units: Units of every space. A tensor that several watched modules share counts once.
    """
    found: dict[str, list[np.ndarray]] = {space: [] for space in watched}
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        module.register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: (inputs[0], output)}))
        for name, module in model.named_modules()
    ]
    for batch in batches:
        with torch.no_grad():
            model(batch)
        for space, (places, is_input) in watched.items():
            values: list[Tensor] = []
            for names in places:
                value = seen[names[0]][0] if is_input else sum((seen[name][1] for name in names[1:]), seen[names[0]][1])
                if not any(value is other for other in values):
                    values.append(value)
            found[space] += [samples_of(value, 1, units[space]) for value in values]
    for handle in handles:
        handle.remove()
    return {space: np.concatenate(rows) for space, rows in found.items()}


def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Correlations of A's units (rows) with B's; 0 where a unit never varies."""
    with np.errstate(invalid="ignore", divide="ignore"):
        joint = np.corrcoef(a, b, rowvar=False)[: a.shape[1], a.shape[1] :]
    return np.nan_to_num(joint)


def activation_matching(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> Permutations:
    """For every space the assignment of B's units to A's with the largest summed correlation."""
    return {space: linear_sum_assignment(correlation(a[space], b[space]), maximize=True)[1] for space in a}


# BatchNorm reset and REPAIR


def reset_batch_norm(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Sets running statistics to the mean of the batches' own, each batch normalised by its own; in place."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    found: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {norm: [] for norm in norms}

    def normalise(norm, inputs, _):
        x = inputs[0]
        rows = x.movedim(1, -1).reshape(-1, x.shape[1])
        found[norm].append((rows.mean(0), rows.var(0, unbiased=True)))
        shape = [1, -1] + [1] * (x.ndim - 2)
        mean, variance = rows.mean(0).view(shape), rows.var(0, unbiased=False).view(shape)
        return (x - mean) / (variance + norm.eps).sqrt() * norm.weight.view(shape) + norm.bias.view(shape)

    handles = [norm.register_forward_hook(normalise) for norm in norms]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    for norm in norms:
        norm.running_mean.copy_(torch.stack([mean for mean, _ in found[norm]]).mean(0))
        norm.running_var.copy_(torch.stack([variance for _, variance in found[norm]]).mean(0))


def statistics(model: nn.Module, batches: Iterable[Tensor], layer: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a layer's output channels over all batches, in float64."""
    kept: list[Tensor] = []
    module = dict(model.named_modules())[layer]
    handle = module.register_forward_hook(lambda m, i, out: kept.append(out.movedim(1, -1).reshape(-1, out.shape[1])))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    rows = torch.cat(kept).double()
    return rows.mean(0), rows.var(0, unbiased=False).sqrt()


def repaired(
    merged: nn.Module, parents: Sequence[nn.Module], batches: Sequence[Tensor], layers: Sequence[str]
) -> Callable[[Tensor], Tensor]:
    """The merged network as a function, its `layers` rescaled by hooks, one after the other, from the input on.

    Every layer is measured over all batches with the layers before it rescaled already.
    """
    modules = dict(merged.named_modules())
    for layer in layers:
        targets = [statistics(parent, batches, layer) for parent in parents]
        mean = torch.stack([m for m, _ in targets]).mean(0)
        deviation = torch.stack([d for _, d in targets]).mean(0)
        own_mean, own_deviation = statistics(merged, batches, layer)
        scale = deviation / own_deviation

        def rescale(module, inputs, output, scale=scale, own=own_mean, mean=mean):
            shape = [1, -1] + [1] * (output.ndim - 2)
            return ((output.double() - own.view(shape)) * scale.view(shape) + mean.view(shape)).to(output.dtype)

        modules[layer].register_forward_hook(rescale)
    return merged


# The line between two models


def barrier(losses: Sequence[float]) -> float:
    """max over λ of L(λ) − ((1 − λ) L(0) + λ L(1)), for losses at evenly spaced λ."""
    worst = -np.inf
    for index, loss in enumerate(losses):
        x = index / (len(losses) - 1)
        worst = max(worst, loss - (1 - x) * losses[0] - x * losses[-1])
    return float(worst)


def mean_loss(model: nn.Module, batches: Batches) -> float:
    """Mean cross-entropy over all samples, one at a time."""
    total, count = 0.0, 0
    with torch.no_grad():
        for x, y in batches:
            for logits, label in zip(model(x).double(), y, strict=True):
                total += float(torch.logsumexp(logits, 0) - logits[label])
                count += 1
    return total / count
