"""Feature visualisation: for every unit of a space, the image that excites it most, found by gradient ascent.

The unit is read from the traced graph and only the part of the graph that it needs is run, so that any space of any
network on images can be drawn. The network stays as it is: the gradient reaches nothing but the pictures. Statistics of
BatchNorm are used as they are: reset a merged model's first (`isthmus.repair`).
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from isthmus.data.batches import check_data, read_batches
from isthmus.errors import DataError, InputError
from isthmus.explain.ascent import ascend_images
from isthmus.explain.images import ImageStatistics, assumed_statistics, images_of, measure_images, rfft_shape
from isthmus.explain.parametrisations import Parametrisation, chosen_method
from isthmus.explain.target import Target
from isthmus.observe.given import as_modules, symmetry_of
from isthmus.progress import progress
from isthmus.symmetry.symmetry import Symmetry
from isthmus.wording.short import counted, shortened, told


@dataclass(frozen=True, eq=False)
class Pictures:
    """The images that excite units most.

    Attributes:
        images: One a unit, in the units of the network's input.
        activations: What each unit answers to its picture, unshaken: the mean over its positions.
        units: The units, counted over all copies of the space.
        space: The space's name.
        at: `"pre"` or `"post"`: where the units were read.
        low: The least value that each channel may take.
        high: The greatest.
        seconds: Time that drawing took; of models drawn together, each its own.
    """

    images: Float[Tensor, "units channels height width"]
    activations: Float[Tensor, " units"]
    units: tuple[int, ...]
    space: str
    at: str
    low: Float[Tensor, " channels"]
    high: Float[Tensor, " channels"]
    seconds: float

    def __repr__(self) -> str:
        shape = " × ".join(map(str, self.images.shape[1:]))
        return told(self, counted(len(self.units), "unit"), f"{self.at} {shortened(self.space)}", f"each {shape}")

    def pixels(
        self, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> Float[Tensor, "units channels height width"]:
        """The images as pixel values in [0, 1], for showing.

        Args:
            mean: What the data's pixels were normalised by, for each channel; together with `std`.
            std: As `mean`. Without both, the least value of each channel becomes 0 and its greatest 1.

        Raises:
            InputError: Only one is given, or not one for each channel.
        """
        channels = self.images.shape[1]
        if mean is None and std is None:
            span = self.high - self.low
            shown = torch.where(
                span[:, None, None] > 0,
                (self.images - self.low[:, None, None]) / torch.where(span > 0, span, 1)[:, None, None],
                0.5,
            )
        elif mean is None or std is None or not len(mean) == len(std) == channels:
            raise InputError(f"pixels needs mean and std of {channels} channels each, or neither")
        else:
            scale, shift = (torch.tensor(each, dtype=self.images.dtype)[:, None, None] for each in (std, mean))
            shown = self.images * scale + shift
        return shown.clamp(0, 1)


def visualise(
    model: nn.Module,
    symmetry: Symmetry | None,
    space: str,
    units: Sequence[int] | None = None,
    data: Any = None,
    *,
    at: str = "pre",
    method: str | Parametrisation = "fourier",
    seed: int = 0,
    steps: int | None = None,
    slots: Sequence[int] | None = None,
    place: int = -1,
) -> Pictures:
    """For each of the units, an image that excites it as much as can be.

    What is maximised is the mean of the unit's values over all positions of a feature map (or tokens, or other axes);
    the value at the centre alone would draw one patch on an empty ground, to which early units answer, over all
    positions, no more than to data. A unit that others are nested in, as a head, stands for the mean of these.
    All units are drawn in one optimisation and do not touch one another: a picture depends on the unit, the space, the
    seed and the slot, and only through rounding on what is drawn beside it. On a processor the same call gives the same
    bytes.

    Args:
        model: A network whose one input is a batch of images; used in `eval()`, in float32.
        symmetry: What `isthmus.trace` returned for it on images; found on the data's first batch if None.
        space: Name of one of its spaces.
        units: Which units, counted over all copies of the space; all if None.
        data: Images that tell the range, the colours and the spectrum, as re-iterable batches (labels are not used), or
            what `measure_images` returned for them. Without data, inputs are taken to lie in [−2, 2], as images
            normalised to mean 0 and deviation 1 do.
        at: `"pre"` reads what enters the unit's nonlinearity, where a silent unit has a gradient too; `"post"` what
            its consumers receive.
        method: A name in `PARAMETRISATIONS` or a configured object.
        seed: Seeds the starting noise and the shaking.
        steps: Steps of gradient ascent; the method's own number if None.
        slots: Names of the starting noise, a number for each unit; the units' own numbers if None. Units with the same
            slot start from the same noise and are shaken alike.
        place: Which of the nodes at which the space is read, in the order of the graph: a residual stream is read at
            every block; −1 is the last.

    Raises:
        DataError: The data's images have another shape than those traced, or hold NaN or infinite values.
        InputError: The input is no batch of images; an unknown unit, method, `at` or place; or no gradient arrives.
        ModelError: The model holds NaN or infinite weights, or its units answer with such.
        SymmetryError: No such space, a space that cannot be read, or a symmetry of another architecture.
        TraceError: The model runs other operations on a batch of another size.

    Source: Erhan, Bengio, Courville, Vincent, Visualizing Higher-Layer Features of a Deep Network, 2009; Olah,
        Mordvintsev, Schubert, Feature Visualization, Distill 2017.
    """
    return visualise_many(
        [model], symmetry, space, units, data, at=at, method=method, seed=seed, steps=steps, slots=slots, place=place
    )[0]


@torch.inference_mode(False)
def visualise_many(
    models: Sequence[nn.Module | Mapping[str, Tensor]],
    symmetry: Symmetry | None,
    space: str,
    units: Sequence[int] | Sequence[Sequence[int]] | None = None,
    data: Any = None,
    *,
    at: str = "pre",
    method: str | Parametrisation = "fourier",
    seed: int = 0,
    steps: int | None = None,
    slots: Sequence[int] | None = None,
    place: int = -1,
) -> tuple[Pictures, ...]:
    """As `visualise`, for several models of one architecture, such as parents in a common frame and what they became.

    The graph is captured once. The k-th pictures of all models start from the same noise, so that a difference between
    them comes from the models.

    Args:
        models: Models of one architecture, or state dicts beside at least one module.
        symmetry: As in `visualise`.
        space: As in `visualise`.
        units: The same units of all models, or a sequence of them for each model; all if None.
        data: As in `visualise`.
        at: As in `visualise`.
        method: As in `visualise`.
        seed: As in `visualise`.
        steps: As in `visualise`.
        slots: Names of the starting noise; the first model's units if None.
        place: As in `visualise`.

    Raises:
        DataError: As in `visualise`.
        InputError: As in `visualise`, or the models have different numbers of units to draw.
        ModelError: As in `visualise`, or the models are of several architectures.
        SymmetryError: As in `visualise`.
        TraceError: As in `visualise`.
    """
    drawn = chosen_method(method)
    steps = drawn.steps if steps is None else steps
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise InputError(f"steps={steps!r}: give a whole number, 0 or more")
    modules = as_modules(models)
    batches = None if isinstance(data, ImageStatistics) else data
    symmetry = symmetry_of(modules[0], symmetry, None, batches)
    target = Target(modules[0], symmetry, space, at, place)
    wanted = _units_of_models(units, len(modules), target)
    names = wanted[0] if slots is None else tuple(slots)
    if any(len(each) != len(names) for each in wanted):
        raise InputError(
            f"{', '.join(str(len(each)) for each in wanted)} units and {len(names)} slots: give as many of each"
        )
    statistics = _statistics_of(data, target)
    found = []
    for module, own in zip(modules, wanted, strict=True):
        start = time.perf_counter()
        state = target.state_of(module)
        together = math.ceil(len(own) / math.ceil(len(own) / target.most_images))
        images, activations = [], []
        for first in range(0, len(own), together):
            part, noise = list(own[first : first + together]), list(names[first : first + together])
            missing = together - len(part)  # the last part is filled up: a batch of another size is another graph
            drawing = ascend_images(
                target, state, part + part[:1] * missing, noise + noise[:1] * missing, drawn, statistics, seed, steps
            )
            images.append(drawing[0][: len(part)])
            activations.append(drawing[1][: len(part)])
        found.append(
            Pictures(
                images=torch.cat(images),
                activations=torch.cat(activations),
                units=own,
                space=space,
                at=at,
                low=statistics.low.float(),
                high=statistics.high.float(),
                seconds=time.perf_counter() - start,
            )
        )
    return tuple(found)


def _statistics_of(data: Any, target: Target) -> ImageStatistics:
    """What is known of the data's images: given, measured on batches, or assumed where there are none.

    Raises:
        DataError: The statistics are of images of another shape.
    """
    if not isinstance(data, ImageStatistics):
        return assumed_statistics(target.shape[0]) if data is None else measure_images(data, target.shape)
    if len(data.low) != target.shape[0] or (
        data.magnitude is not None and data.magnitude.shape != rfft_shape(target.shape)
    ):
        raise DataError(f"these statistics are of images of another shape than {list(target.shape)}: measure again")
    return data


def respond(
    model: nn.Module,
    symmetry: Symmetry | None,
    space: str,
    data: Any,
    units: Sequence[int] | None = None,
    *,
    at: str = "pre",
    place: int = -1,
) -> Float[Tensor, "images units"]:
    """What the units answer to images: the number that `visualise` maximises, for every image of the data.

    Args:
        model: As in `visualise`.
        symmetry: As in `visualise`.
        space: As in `visualise`.
        data: Re-iterable batches of images; labels are not used. `[pictures.images]` asks about pictures.
        units: As in `visualise`.
        at: As in `visualise`.
        place: As in `visualise`.

    Raises:
        DataError: No data, or images of another shape than those traced.
        InputError: As in `visualise`.
        ModelError: The model holds NaN or infinite weights.
        SymmetryError: As in `visualise`.
        TraceError: As in `visualise`.
    """
    check_data(data)
    module = as_modules([model])[0]
    target = Target(module, symmetry_of(module, symmetry, None, data), space, at, place)
    (own,) = _units_of_models(units, 1, target)
    state = target.state_of(module)
    answers = []
    with torch.no_grad():
        for batch in progress(read_batches(data), "reading units", data):
            images = images_of(batch, target.shape).to(target.device, torch.float32)
            parts = images.split(target.most_images)
            answers += [target.values(state, part)[:, list(own)].cpu() for part in parts]
    return torch.cat(answers)


def _units_of_models(
    units: Sequence[int] | Sequence[Sequence[int]] | None, models: int, target: "Target"
) -> list[tuple[int, ...]]:
    """The units to draw of every model.

    Raises:
        InputError: No units, units that the space does not have, or not one sequence for each model.
    """
    if units is None:
        return [tuple(range(target.units))] * models
    chosen: list[Any] = list(units)
    nested = [isinstance(each, Sequence) for each in chosen]
    if any(nested) and not (all(nested) and len(chosen) == models):
        raise InputError(f"units must be numbers, or a sequence of numbers for each of the {models} models")
    per_model = [tuple(each) for each in chosen] if any(nested) else [tuple(chosen)] * models
    for own in per_model:
        if not own:
            raise InputError(f"no units of space {target.space}: give at least one, or None for all")
        for unit in own:
            try:
                known = not isinstance(unit, bool) and 0 <= unit.__index__() < target.units
            except (AttributeError, TypeError):
                known = False
            if not known:
                raise InputError(f"no unit {unit!r} in space {target.space}: its units are 0 to {target.units - 1}")
    return [tuple(int(unit) for unit in own) for own in per_model]
