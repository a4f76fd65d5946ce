"""Pictures of units: what excites them most, drawn and found, for the best, the middle and the worst of a space."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from matplotlib import colormaps
from matplotlib.image import imsave
from torch import Tensor, nn

from isthmus.data.batches import read_batches
from isthmus.errors import InputError
from isthmus.explain.features import Pictures, respond, visualise_many
from isthmus.explain.images import measure_images
from isthmus.explain.moves import matched_correlation
from isthmus.explain.units import MERGED, NAIVE, SpaceFates, UnitFates
from isthmus.graph.capture import Program
from isthmus.observe.moments import SpaceMoments
from isthmus.progress import progress
from isthmus.symmetry.symmetry import Symmetry

# How many top images stand beside a drawn picture, and the side to which larger ones are made smaller.
SHOWN, SIDE = 5, 64
# Units of a matrix of correlations that are shown, evenly spaced where there are more.
CELLS = 160
GROUPS = ("best", "median", "worst")


@dataclass(frozen=True)
class Chosen:
    """A unit that is shown.

    Attributes:
        unit: Its slot in the common frame.
        group: `"best"`, `"median"` or `"worst"` by how much of all models' features the merged unit holds.
        cross_activation: For each model, the share of images that excite the merged unit less than the picture drawn
            for that model's unit does; empty where none was drawn, NaN for a model that has no unit there.
        naive_cross_activation: The cross-activation of the naive average's unit.
    """

    unit: int
    group: str
    cross_activation: tuple[float, ...] = ()
    naive_cross_activation: tuple[float, ...] = ()


@dataclass(frozen=True)
class Gallery:
    """The units shown of every space, and their pictures.

    Attributes:
        chosen: By space.
        pictures: By space and unit, what `features.json` of a run folder holds: for every network the picture that was
            drawn and a strip of the images that excite the unit most, as data URIs.
        seconds: Time that drawing took.
    """

    chosen: Mapping[str, tuple[Chosen, ...]]
    pictures: Mapping[str, Mapping[str, object]]
    seconds: float


def _choose_units(own: SpaceFates, each: int) -> list[tuple[int, str]]:
    """The units to show: their least correlation with a model is the highest, in the middle, or the lowest."""
    order = own.merged.min(dim=0).values.argsort(descending=True, stable=True).tolist()
    middle = max(0, len(order) // 2 - each // 2)
    parts = (order[:each], order[middle : middle + each], order[max(0, len(order) - each) :])
    found: dict[int, str] = {}
    for group, part in zip(GROUPS, parts, strict=True):
        for unit in part:
            found.setdefault(unit, group)
    return list(found.items())


def spaced(names: Sequence[str], count: int) -> list[str]:
    """At most so many of the names, evenly spaced, the first and the last among them."""
    if len(names) <= count:
        return list(names)
    return [names[round(index * (len(names) - 1) / max(1, count - 1))] for index in range(count)]


def takes_images(program: Program) -> bool:
    """Whether the traced network's one input is a batch of images."""
    leaves = [leaf for leaf in [*program.args, *program.kwargs.values()] if isinstance(leaf, Tensor)]
    return len(leaves) == 1 and leaves[0].ndim == 4 and leaves[0].is_floating_point()


def draw_gallery(
    networks: Mapping[str, nn.Module],
    symmetry: Symmetry,
    units: UnitFates,
    data: Any,
    *,
    spaces: Sequence[str] | None = None,
    each: int = 2,
    method: str = "fourier",
    steps: int | None = None,
    seed: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Gallery:
    """Draws the best, the middle and the worst units of some spaces, side by side for all networks.

    Args:
        networks: The models by their letters, then the merged network and maybe the naive average, as `units` has them.
        symmetry: Their symmetry, with its graph.
        units: What `measure_units` returned for them.
        data: The images on which it was measured.
        spaces: Which spaces; all if None.
        each: How many best, middle and worst units of each.
        method: A parametrisation of `explain.features`.
        steps: Steps of gradient ascent; the method's own number if None.
        seed: Seeds the pictures' starting noise.
        mean: What the data's pixels were normalised by, per channel, for showing; with `std`.
        std: As `mean`.

    Raises:
        InputError: The networks take no images, `each` is below 1, or as `visualise`.
    """
    if each < 1:
        raise InputError(f"each={each}: show one unit of each group at least")
    if not takes_images(symmetry.traced.program):
        raise InputError("the networks take no images: there is nothing to draw")
    wanted = [name for name in spaces or units.spaces if name in units.spaces and units.spaces[name].top]
    statistics = measure_images(data)
    chosen: dict[str, tuple[Chosen, ...]] = {}
    pictures: dict[str, dict[str, Any]] = {}
    needed = {
        int(index) for name in wanted for top in units.spaces[name].top.values() for index in top[:, :SHOWN].flatten()
    }
    shown = Shown(data, needed, mean, std)
    seconds = 0.0
    for name in progress(wanted, "drawing units"):
        own = units.spaces[name]
        picked = _pick_units(own, each)
        slots, wished = [unit for unit, _ in picked.units], [picked.sources[network] for network in networks]
        drawn = visualise_many(
            list(networks.values()), symmetry, name, wished, statistics,
            method=method, steps=steps, seed=seed, slots=slots,
        )  # fmt: skip
        seconds += sum(each.seconds for each in drawn)
        by_network = dict(zip(networks, drawn, strict=True))
        chosen[name] = _judge_pictures(own, picked, networks, by_network, symmetry)
        pictures[name] = {
            str(unit): {
                "pictures": {
                    network: _picture_uri(each.pixels(mean, std)[place])
                    for network, each in by_network.items()
                    if not picked.absent[network][place]
                },
                "top": {
                    network: shown.strip(own.top[network][picked.sources[network][place] if network == NAIVE else unit])
                    for network in networks
                    if not picked.absent[network][place]
                },
            }
            for place, (unit, _) in enumerate(picked.units)
        }
    return Gallery(chosen, pictures, seconds)


@dataclass(frozen=True, eq=False)
class PickedUnits:
    """The units of one space that are drawn, and which of every network's units stand in their slots.

    Attributes:
        units: Units of the merged network, each with the group for which it was picked.
        sources: For every network, its unit in each slot; another one where there is none, so that all have as many.
        absent: For every network, where none of its units stands in the slot: what is drawn there is not shown.
    """

    units: tuple[tuple[int, str], ...]
    sources: dict[str, list[int]]
    absent: dict[str, list[bool]]


def _pick_units(own: SpaceFates, each: int) -> PickedUnits:
    """The best, middle and worst units of a space, and every network's units in their slots."""
    picked = _choose_units(own, each)
    slots = [unit for unit, _ in picked]
    sources: dict[str, list[int]] = {
        letter: own.sources[index][slots].tolist() for index, letter in enumerate(own.names)
    }
    sources |= {MERGED: slots, NAIVE: sources[own.names[0]]}
    absent = {network: [unit < 0 for unit in units] for network, units in sources.items()}
    sources = {network: [max(unit, 0) for unit in units] for network, units in sources.items()}
    return PickedUnits(tuple(picked), sources, absent)


def _judge_pictures(
    own: SpaceFates,
    picked: PickedUnits,
    networks: Mapping[str, nn.Module],
    drawn: Mapping[str, Pictures],
    symmetry: Symmetry,
) -> tuple[Chosen, ...]:
    """The picked units of a space, with how strongly averages answer to the pictures of the models' units."""
    crossed = {
        network: [
            _percentiles(
                respond(networks[network], symmetry, own.space, [drawn[letter].images], picked.sources[network]),
                own.responses[network][:, picked.sources[network]],
            )
            for letter in own.names
        ]
        for network in (MERGED, NAIVE)
        if network in networks
    }

    def row(network: str, place: int) -> tuple[float, ...]:
        return tuple(
            math.nan if picked.absent[letter][place] or picked.absent[network][place] else values[place]
            for letter, values in zip(own.names, crossed.get(network, ()), strict=False)
        )

    return tuple(
        Chosen(unit, group, row(MERGED, place), row(NAIVE, place)) for place, (unit, group) in enumerate(picked.units)
    )


def _percentiles(answers: Float[Tensor, "pictures units"], usual: Float[Tensor, "images units"]) -> list[float]:
    """For each unit, the share of images to which it answers less than to the picture of its number."""
    return (usual < answers.diagonal().double()).double().mean(dim=0).tolist()


class Shown:
    """Some of the data's images, ready to be shown.

    Args:
        data: All images, in order.
        indices: Which ones are needed.
        mean: What pixels were normalised by, per channel; with `std`. Without both, the least and the greatest value
            become black and white.
        std: As `mean`.
    """

    def __init__(self, data: Any, indices: set[int], mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
        self.images: dict[int, Tensor] = {}
        start = 0
        for batch in read_batches(data):
            images = next(leaf for leaf in (*batch.args, *batch.kwargs.values()) if isinstance(leaf, Tensor))
            for index in indices & set(range(start, start + len(images))):
                self.images[index] = images[index - start].float()
            start += len(images)
        if mean is not None and std is not None:
            scale, shift = (torch.tensor(each)[:, None, None] for each in (std, mean))
        else:
            low = min((float(each.min()) for each in self.images.values()), default=0.0)
            high = max((float(each.max()) for each in self.images.values()), default=1.0)
            scale, shift = torch.tensor(1 / max(high - low, 1e-12)), torch.tensor(-low / max(high - low, 1e-12))
        self.images = {index: (each * scale + shift).clamp(0, 1) for index, each in self.images.items()}

    def strip(self, indices: Tensor) -> str:
        """The first of these images side by side, as a data URI."""
        parts = [_smaller(self.images[int(index)]) for index in indices[:SHOWN]]
        gap = torch.ones(*parts[0].shape[:2], 1)
        return _picture_uri(torch.cat([x for part in parts for x in (part, gap)][:-1], dim=2))


def _smaller(image: Float[Tensor, "channels height width"]) -> Float[Tensor, "channels rows columns"]:
    """The image with no side above `SIDE`, by averaging."""
    factor = -(-max(image.shape[1:]) // SIDE)
    return image if factor == 1 else nn.functional.avg_pool2d(image, factor, ceil_mode=True)


def _picture_uri(image: Float[Tensor, "channels height width"]) -> str:
    """An image of values in [0, 1] as the data URI of a PNG; one channel is grey, more than three are averaged."""
    if image.shape[0] not in (1, 3):
        image = image.mean(dim=0, keepdim=True)
    levels = (image.expand(3, -1, -1).permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    return _png_uri(levels)


def _png_uri(levels: UInt8[np.ndarray, "height width channels"]) -> str:
    """Pixels as the data URI of a PNG; the same pixels give the same text."""
    buffer = io.BytesIO()
    imsave(buffer, np.ascontiguousarray(levels), format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def draw_matches(own: SpaceFates, moments: SpaceMoments, first: int = 0, second: int = 1) -> dict[str, str]:
    """Correlations of two models' units as pictures, one pixel a pair: in their own order, and matched.

    Of more than `CELLS` units, evenly spaced ones are shown. Red is +1, blue −1; a slot without a unit is empty.
    """
    correlation = moments.correlation(first, second)
    kept = np.unique(np.linspace(0, correlation.shape[0] - 1, min(CELLS, correlation.shape[0])).round().astype(int))
    if any(move.matrix is not None for move in own.moves):
        moves = own.moves[first], own.moves[second]
        after = matched_correlation(moments, first, moves[0], second, moves[1])[kept][:, kept]
    else:
        rows, columns = own.sources[first][kept], own.sources[second][kept]
        after = correlation[rows][:, columns] * torch.from_numpy((rows >= 0)[:, None] & (columns >= 0))
    parts = {"before": correlation[kept][:, kept], "after": after}
    paint = colormaps["RdBu_r"]
    return {
        name: _png_uri((paint((part.clamp(-1, 1).numpy() + 1) / 2)[..., :3] * 255).round().astype(np.uint8))
        for name, part in parts.items()
    }
