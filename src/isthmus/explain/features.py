"""Feature visualisation: for every unit of a space, the image that excites it most, found by gradient ascent.

The unit is read from the traced graph and only the part of the graph that it needs is run, so that any space of any
network on images can be drawn. The network stays as it is: the gradient reaches nothing but the pictures. Statistics of
BatchNorm are used as they are: reset those of a merged model first (`isthmus.repair`).
"""

import copy
import hashlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from isthmus.batches import Batch, check_data, read_batches
from isthmus.errors import DataError, InputError, ModelError, SymmetryError
from isthmus.explain.units import means_of_units
from isthmus.members import as_modules
from isthmus.moments import check_at, symmetry_of
from isthmus.progress import progress
from isthmus.registry import configure
from isthmus.symmetry import Site, Symmetry
from isthmus.trace.capture import Program, capture
from isthmus.trace.reader import first_float

# Square root of the covariance of red, green and blue over natural photographs (ImageNet), columns by falling variance.
# Source: the constant `color_correlation_svd_sqrt` of Lucid (github.com/tensorflow/lucid), which has two digits.
NATURAL_COLOURS = ((0.26, 0.09, 0.02), (0.27, 0.00, -0.05), (0.27, -0.09, 0.03))

# The range of inputs where no data tells it: about that of photographs normalised to mean 0 and deviation 1.
ASSUMED_RANGE = (-2.0, 2.0)

# How far the mean colour is kept from the ends of the range, where the sigmoid would have no slope left.
MARGIN = 0.02

# Bytes of node values that pictures drawn together may take; more pictures are drawn one part after the other.
MEMORY = 1 << 29

# Pairs of random images by which the images' dimension is found; one is enough but where most units are silent.
PROBES = 8

# Adam's two averages are torch's and the paper's; its ε is far below any gradient, so that the scale of a unit's
# activations does not matter.
BETAS = (0.9, 0.999)
EPSILON = 1e-12


@dataclass(frozen=True, eq=False)
class ImageStatistics:
    """What the pictures have to share with the data, in the units of the network's input.

    Attributes:
        low: The least value of every channel.
        high: The greatest value of every channel.
        mean: The mean colour.
        covariance: Of the channels, over all pixels.
        magnitude: Mean absolute value of `rfft2` of the images less their mean colour, in the colour axes `axes`; None
            where no data was given.
    """

    low: Float[Tensor, " channels"]
    high: Float[Tensor, " channels"]
    mean: Float[Tensor, " channels"]
    covariance: Float[Tensor, "channels channels"]
    magnitude: Float[Tensor, "channels height frequencies"] | None = None

    @property
    def share(self) -> Float[Tensor, " channels"]:
        """Where the mean colour lies between the least and the greatest value, kept a little inside."""
        span = self.high - self.low
        share = torch.where(span > 0, (self.mean - self.low) / torch.where(span > 0, span, 1), 0.5)
        return share.clamp(MARGIN, 1 - MARGIN)

    @property
    def axes(self) -> Float[Tensor, "channels channels"]:
        """Orthonormal axes along which colours are uncorrelated, as columns, by falling variance."""
        return colour_axes(self.covariance)[1]

    @property
    def colours(self) -> Float[Tensor, "channels channels"]:
        """A square root of the colours' covariance, scaled so that the longest column is 1."""
        variances, axes = colour_axes(self.covariance)
        root = axes * variances.clamp_min(0).sqrt()
        longest = root.norm(dim=0).max()
        return root / longest if longest > 0 else torch.eye(len(root), dtype=root.dtype)


def colour_axes(
    covariance: Float[Tensor, "channels channels"],
) -> tuple[Float[Tensor, " channels"], Float[Tensor, "channels channels"]]:
    """Variances and orthonormal axes of a covariance, by falling variance; an axis's largest entry is positive."""
    variances, axes = torch.linalg.eigh(covariance.double())
    variances, axes = variances.flip(0), axes.flip(1)
    largest = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True))
    return variances, axes * largest.sign()


@dataclass(frozen=True)
class Parametrisation(ABC):
    """How a picture is made of numbers that gradient ascent can change, and how it is shaken meanwhile.

    At every step every picture is moved, scaled and turned by a random amount, so that no picture lives off the exact
    place of single pixels. What is moved in from outside has the data's mean colour.

    Attributes:
        steps: Steps of gradient ascent.
        learning_rate: Adam's.
        jitter: Greatest shift, as a share of the height and of the width; 1/16 is 2 pixels of 32.
        scale: Greatest change of size, as a share.
        rotate: Greatest turn, in degrees.
    """

    steps: int = 128
    learning_rate: float = 0.05
    jitter: float = 0.0625
    scale: float = 0.05
    rotate: float = 5.0

    def __post_init__(self) -> None:
        if self.steps < 0 or self.learning_rate <= 0:
            raise InputError(
                f"steps={self.steps} must be 0 or more and learning_rate={self.learning_rate} greater than 0"
            )
        if min(self.jitter, self.scale, self.rotate) < 0 or self.scale >= 1:
            raise InputError(
                f"jitter={self.jitter} and rotate={self.rotate} must be 0 or more, scale={self.scale} in [0, 1)"
            )

    @abstractmethod
    def start(self, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
        """The numbers that one picture of that shape (channels, height, width) starts from."""

    @abstractmethod
    def images(
        self, numbers: Tensor, statistics: ImageStatistics, shape: tuple[int, int, int]
    ) -> Float[Tensor, "images channels height width"]:
        """The pictures that the numbers of several stand for, within the data's range."""


@dataclass(frozen=True)
class FourierImages(Parametrisation):
    """Pictures by their spectrum, in uncorrelated colours.

    The numbers are Fourier coefficients divided by a power of their frequency, so that a step changes coarse structure
    more than fine; a sigmoid around the data's mean colour keeps every channel between the data's least and greatest
    value. Colours are uncorrelated with the covariance of the data's pixels, or, for three channels and no data, with
    that of natural photographs as published with Lucid.

    Attributes:
        decay: Power of the frequency by which coefficients are divided.
        deviation: Standard deviation of the numbers at the start.
        decorrelate: Whether to use uncorrelated colours.
        contrast: How far a picture's root mean square before the sigmoid may go, in multiples of what gives the data's
            own deviation; larger pictures are scaled down to it. None is no limit: units that are nearly linear in the
            image, as those of a first layer, then end in black and white, whatever their weights.

    Source: Olah, Mordvintsev, Schubert, Feature Visualization, Distill 2017 (doi 10.23915/distill.00007); the scale of
        the coefficients follows Lucid's code, with orthonormal transforms.
    """

    decay: float = 1.0
    deviation: float = 0.01
    decorrelate: bool = True
    contrast: float | None = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.decay) or self.deviation <= 0 or (self.contrast is not None and self.contrast <= 0):
            raise InputError(
                f"deviation={self.deviation} and contrast={self.contrast} must be greater than 0 (contrast=None is no "
                f"limit), decay={self.decay} a number"
            )

    def start(self, shape: tuple[int, int, int], generator: torch.Generator) -> Float[Tensor, "channels height _ 2"]:
        """Normal numbers, a real and an imaginary one for every coefficient."""
        channels, height, width = shape
        return torch.randn(channels, height, width // 2 + 1, 2, generator=generator) * self.deviation

    def images(
        self,
        numbers: Float[Tensor, "images channels height _ 2"],
        statistics: ImageStatistics,
        shape: tuple[int, int, int],
    ) -> Float[Tensor, "images channels height width"]:
        """The pictures."""
        like = {"device": numbers.device, "dtype": numbers.dtype}
        _, height, width = shape
        radius = frequencies(height, width).clamp_min(1 / max(height, width))
        weights = (radius**-self.decay / 4).to(**like)
        z = torch.fft.irfft2(torch.view_as_complex(numbers) * weights, s=(height, width), norm="ortho")
        if self.decorrelate:
            z = torch.einsum("cd,ndhw->nchw", statistics.colours.to(**like), z)
        low, high = statistics.low.to(**like)[:, None, None], statistics.high.to(**like)[:, None, None]
        share = statistics.share
        if self.contrast is not None:
            # To first order, the sigmoid turns a deviation of z into one of pixels by its slope at the mean colour.
            span = (statistics.high - statistics.low) * share * (1 - share)
            varies = span > 0
            ratios = statistics.covariance.diagonal()[varies] / span[varies] ** 2
            limit = self.contrast * float(ratios.mean().clamp_min(0).sqrt()) if len(ratios) else 0.0
            size = z.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
            z = z * (limit / size.clamp_min(max(limit, torch.finfo(numbers.dtype).tiny)))
        return low + (high - low) * torch.sigmoid(torch.logit(share).to(**like)[:, None, None] + z)


@dataclass(frozen=True)
class Maco(Parametrisation):
    """Pictures whose spectrum has the magnitude of the data's: only the phases are free.

    The magnitude is the mean absolute value of `rfft2` over the data, measured along uncorrelated colour axes (an
    orthonormal change of colours, which keeps the power). The constant term has no phase: it is the data's mean colour.
    Coefficients that a real image has twice get opposite phases, so that every magnitude is kept exactly. Values beyond
    the data's least and greatest of a channel are clamped; this alone changes the spectrum.

    Source: Fel, Boissin, Boutin, Picard, Novello, Colin, Linsley, Rousseau, Cadène, Gardes, Serre, Unlocking Feature
        Visualization for Deeper Networks with MAgnitude Constrained Optimization (MACO), NeurIPS 2023
        (arXiv 2306.06805). The paper takes the magnitude from ImageNet and squashes by a sigmoid; its random crops and
        noise are replaced by the small shifts, scales and turns that small images bear.
    """

    learning_rate: float = 0.1

    def start(self, shape: tuple[int, int, int], generator: torch.Generator) -> Float[Tensor, "channels height _"]:
        """Phases, uniform over the circle."""
        channels, height, width = shape
        return (torch.rand(channels, height, width // 2 + 1, generator=generator) * 2 - 1) * math.pi

    def images(
        self,
        numbers: Float[Tensor, "images channels height _"],
        statistics: ImageStatistics,
        shape: tuple[int, int, int],
    ) -> Float[Tensor, "images channels height width"]:
        """The pictures."""
        like = {"device": numbers.device, "dtype": numbers.dtype}
        low, high = (each.to(**like)[:, None, None] for each in (statistics.low, statistics.high))
        return torch.minimum(torch.maximum(self.unclamped(numbers, statistics, shape), low), high)

    def unclamped(
        self,
        phases: Float[Tensor, "images channels height _"],
        statistics: ImageStatistics,
        shape: tuple[int, int, int],
    ) -> Float[Tensor, "images channels height width"]:
        """The pictures before values are clamped to the data's range.

        Raises:
            InputError: The statistics hold no magnitude.
        """
        if statistics.magnitude is None:
            raise InputError("method 'maco' takes its spectrum's magnitude from data: give data=, or use 'fourier'")
        like = {"device": phases.device, "dtype": phases.dtype}
        _, height, width = shape
        twice = torch.zeros(width // 2 + 1, dtype=torch.bool, device=phases.device)
        twice[0] = True
        twice[-1] |= width % 2 == 0
        mirrored = phases.flip(2).roll(1, 2)
        phases = torch.where(twice, (phases - mirrored) / 2, phases)
        magnitude = statistics.magnitude.to(**like).clone()
        magnitude[:, 0, 0] = 0
        spectrum = torch.polar(magnitude.expand_as(phases).contiguous(), phases)
        z = torch.fft.irfft2(spectrum, s=(height, width))
        return statistics.mean.to(**like)[:, None, None] + torch.einsum("cd,ndhw->nchw", statistics.axes.to(**like), z)


# Every parametrisation by its name.
PARAMETRISATIONS: dict[str, type[Parametrisation]] = {
    "fourier": FourierImages,
    "maco": Maco,
}


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
        seed: Of the starting noise and the shaking.
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
    wanted = units_of_models(units, len(modules), target)
    names = wanted[0] if slots is None else tuple(slots)
    if any(len(each) != len(names) for each in wanted):
        raise InputError(
            f"{', '.join(str(len(each)) for each in wanted)} units and {len(names)} slots: give as many of each"
        )
    if isinstance(data, ImageStatistics):
        statistics = data
        if len(data.low) != target.shape[0] or (
            data.magnitude is not None and data.magnitude.shape != rfft_shape(target.shape)
        ):
            raise DataError(f"these statistics are of images of another shape than {list(target.shape)}: measure again")
    else:
        statistics = assumed_statistics(target.shape[0]) if data is None else measure_images(data, target.shape)
    found = []
    for module, own in zip(modules, wanted, strict=True):
        start = time.perf_counter()
        state = target.state_of(module)
        together = math.ceil(len(own) / math.ceil(len(own) / target.most_images))
        images, activations = [], []
        for first in range(0, len(own), together):
            part, noise = list(own[first : first + together]), list(names[first : first + together])
            missing = together - len(part)  # the last part is filled up: a batch of another size is another graph
            drawing = draw(
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
    (own,) = units_of_models(units, 1, target)
    state = target.state_of(module)
    answers = []
    with torch.no_grad():
        for batch in progress(read_batches(data), "reading units", data):
            images = images_of(batch, target.shape).to(target.device, torch.float32)
            parts = images.split(target.most_images)
            answers += [target.values(state, part)[:, list(own)].cpu() for part in parts]
    return torch.cat(answers)


def chosen_method(method: str | Parametrisation) -> Parametrisation:
    """The parametrisation of that name, or the one that was given.

    Raises:
        InputError: No such name, or no parametrisation.
    """
    if isinstance(method, Parametrisation):
        return method
    if not isinstance(method, str):
        raise InputError(f"method is a {type(method).__name__}: give one of {', '.join(PARAMETRISATIONS)}")
    return configure("parametrisation", method, PARAMETRISATIONS)


def units_of_models(
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


class Forward(fx.Interpreter):
    """Runs the part of a graph that one node needs, with gradients.

    Args:
        program: The captured graph, for one batch size.
        node: Name of the node whose value is wanted.
    """

    def __init__(self, program: Program, node: str) -> None:
        super().__init__(program.exported.graph_module, garbage_collect_values=False)
        self.program = program
        order = list(program.graph.nodes)
        self.placeholders = [each for each in order if each.op == "placeholder"]
        self.target = next(each for each in order if each.name == node)
        before = order[: order.index(self.target)]
        # An operation in place changes values that other nodes hold, which the edges of the graph do not tell.
        needed = {self.target, *(each for each in before if is_mutable(each))}
        for each in reversed(before):
            if any(user in needed for user in each.users):
                needed.add(each)
        self.nodes = [each for each in order if each in needed and each.op != "placeholder"]

    def value(self, state: Mapping[str, Tensor], images: Float[Tensor, "images channels height width"]) -> Tensor:
        """The node's value on images."""
        program = self.program
        leaves = pytree.tree_leaves((program.args, dict(program.kwargs)))
        inputs = iter(images.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        self.env = {}
        for node in self.placeholders:
            if node.name in program.parameters:
                self.env[node] = state[program.parameters[node.name]]
            elif node.name in program.constants:
                constant = program.constants[node.name]
                self.env[node] = constant.to(images.device) if isinstance(constant, Tensor) else constant
            else:
                self.env[node] = next(inputs)
        for node in self.nodes:
            self.env[node] = self.run_node(node)
        value = self.env[self.target]
        self.env = {}
        return value


def is_mutable(node: fx.Node) -> bool:
    """Whether an operation writes into its input."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


class Target:
    """A space's units, as a function of images.

    Args:
        model: The architecture, on the device to work on.
        symmetry: Its symmetry, with the graph.
        space: The space's name.
        at: `"pre"` or `"post"`.
        place: Which of the space's nodes.

    Raises:
        InputError: The graph's input is no batch of images, there is no such place, or images of a batch mix.
        SymmetryError: No such space, or none that can be read.
    """

    def __init__(self, model: nn.Module, symmetry: Symmetry, space: str, at: str, place: int) -> None:
        check_at(at)
        found = symmetry[space]
        graph = symmetry.program
        if graph is None:
            raise InputError("the symmetry holds no graph to read units from: give data=, or what trace returned")
        nodes = (graph.pre if at == "pre" else graph.post).get(space) or ()
        nodes = nodes or (graph.post if at == "pre" else graph.pre).get(space) or ()
        order = {node.name: index for index, node in enumerate(graph.program.graph.nodes)}
        nodes = sorted(nodes, key=lambda name: order[name])
        if not nodes:
            raise SymmetryError(f"no activations stand for space {space}: it cannot be drawn")
        if not -len(nodes) <= place < len(nodes):
            raise InputError(f"place={place}: space {space} is read at {len(nodes)} nodes, 0 to {len(nodes) - 1}")
        self.space, self.node = space, nodes[place]
        self.units = found.copies * found.size
        self.sites: list[Site] = [site for name, site in graph.activations[self.node] if name == space]
        self.device = first_float(model.state_dict()).device
        self.program = float32_program(model, graph.program)
        self.shape = image_shape(self.program)
        self.forwards: dict[int, Forward] = {}
        self.batch_dim = -1
        traced = len(tensors_in(self.program.args, self.program.kwargs)[0])
        several = max(2, traced)  # the graph of the traced batch is at hand; one image alone mixes with none
        self.find_batch(model, several)
        sizes = (node.meta.get("val") for node in self.forward(several).nodes)
        held = sum(v.numel() * v.element_size() for v in sizes if isinstance(v, Tensor))
        self.most_images = max(1, MEMORY * several // max(1, held))

    def state_of(self, model: nn.Module) -> dict[str, Tensor]:
        """A model's tensors in float32 on the device, out of reach of any gradient."""
        return {
            name: tensor.detach().to(self.device, torch.float32 if tensor.is_floating_point() else None)
            for name, tensor in model.state_dict().items()
        }

    def forward(self, images: int) -> Forward:
        """The graph for that many images."""
        if images not in self.forwards:
            batch = torch.zeros(images, *self.shape, device=self.device)
            args, kwargs = pytree.tree_map(
                lambda leaf: batch if isinstance(leaf, Tensor) else leaf, (self.program.args, dict(self.program.kwargs))
            )
            self.forwards[images] = Forward(self.program.for_inputs(args, kwargs), self.node)
        return self.forwards[images]

    def find_batch(self, model: nn.Module, several: int) -> None:
        """Finds the dimension of the node's value along which the images lie, by changing the first of several.

        Raises:
            InputError: There is none: the value does not depend on the images, or images change one another's values.
        """
        generator = torch.Generator().manual_seed(0)
        state = self.state_of(model)
        taken = {dim for site in self.sites for dim in site.dims}
        changed, dims = torch.zeros(()), []
        for _ in range(PROBES):
            images = torch.randn(several + 1, *self.shape, generator=generator).to(self.device)
            other = torch.cat([images[-1:], images[1:-1]])
            with torch.no_grad():
                before, after = (self.forward(several).value(state, each) for each in (images[:-1], other))
            if not isinstance(before, Tensor):
                raise SymmetryError(f"node {self.node}, at which space {self.space} is read, is no tensor")
            changed = (before != after) | changed.to(before.device, torch.bool)
            dims = [
                dim
                for dim, size in enumerate(before.shape)
                if size % several == 0
                and dim not in taken
                and not changed.narrow(dim, size // several, size - size // several).any()
            ]
            if changed.any() and len(dims) <= 1:
                break
        if len(dims) != 1 or not changed.any():
            raise InputError(
                f"space {self.space} cannot be drawn: at {self.node} the images of a batch cannot be told apart "
                "(they mix, or do not arrive there)"
            )
        self.batch_dim = dims[0]

    def values(
        self, state: Mapping[str, Tensor], images: Float[Tensor, "images channels height width"]
    ) -> Float[Tensor, "images units"]:
        """Every unit's mean over its positions in every image."""
        value = self.forward(len(images)).value(state, images)
        return means_of_units(value, self.sites, self.batch_dim)


def float32_program(model: nn.Module, program: Program) -> Program:
    """The graph of a model in float32 on its own device.

    Raises:
        InputError: In float32 the model runs other operations.
    """
    own, traced = first_float(model.state_dict()), first_float(program.module.state_dict())
    if traced.dtype == torch.float32 and traced.device == own.device:
        return program
    example = Batch(program.args, program.kwargs).to(own.device, torch.float32)
    other = capture(copy.deepcopy(model).float(), example.args, example.kwargs)
    if [(n.name, n.target) for n in program.graph.nodes] != [(n.name, n.target) for n in other.graph.nodes]:
        raise InputError(
            "in float32 the model runs other operations than those traced: trace and draw model.float() instead"
        )
    return other


def tensors_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """All tensors among a model's inputs."""
    return [leaf for leaf in pytree.tree_leaves((tuple(args), dict(kwargs))) if isinstance(leaf, Tensor)]


def image_shape(program: Program) -> tuple[int, int, int]:
    """Channels, height and width of the images that a graph takes.

    Raises:
        InputError: Its input is not one batch of images.
    """
    tensors = tensors_in(program.args, program.kwargs)
    if len(tensors) != 1 or tensors[0].ndim != 4 or not tensors[0].is_floating_point():
        told = ", ".join(f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}" for x in tensors) or "no tensor"
        raise InputError(
            f"the model was traced on {told}: pictures need one input of images [batch, channels, height, width]"
        )
    channels, height, width = tensors[0].shape[1:]
    return channels, height, width


def rfft_shape(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Shape of the spectrum of real images of that shape."""
    return shape[0], shape[1], shape[2] // 2 + 1


def images_of(batch: Batch, shape: tuple[int, int, int]) -> Float[Tensor, "images channels height width"]:
    """The images of a batch.

    Raises:
        DataError: They are not images of that shape, or hold NaN or infinite values.
    """
    tensors = tensors_in(batch.args, batch.kwargs)
    if len(tensors) != 1 or tuple(tensors[0].shape[1:]) != shape or not tensors[0].is_floating_point():
        told = ", ".join(f"{str(x.dtype).removeprefix('torch.')} {list(x.shape[1:])}" for x in tensors) or "no tensor"
        raise DataError(f"the data's samples are {told}: the model was traced on images of shape {list(shape)}")
    if not tensors[0].isfinite().all():
        raise DataError("the data holds NaN or infinite pixels: remove those images")
    return tensors[0].detach()


def measure_images(data: Any, shape: tuple[int, int, int] | None = None) -> ImageStatistics:
    """Range, colours and spectrum of images, in float64; two passes over the data.

    Args:
        data: Re-iterable batches of images; labels are not used.
        shape: The channels, height and width that all must have; those of the first image if None.

    Raises:
        DataError: No data, images of another shape, or NaN or infinite pixels.
    """
    if shape is None:
        first = next(read_batches(data))
        leaves = tensors_in(first.args, first.kwargs)
        if len(leaves) != 1 or leaves[0].ndim != 4:
            raise DataError("the data holds no images [batch, channels, height, width]")
        shape = (leaves[0].shape[1], leaves[0].shape[2], leaves[0].shape[3])
    channels = shape[0]
    low, high = torch.full((channels,), math.inf).double(), torch.full((channels,), -math.inf).double()
    count, total, products = 0, torch.zeros(channels).double(), torch.zeros(channels, channels).double()
    for batch in progress(read_batches(data), "measuring images", data):
        pixels = images_of(batch, shape).cpu().double().movedim(1, 0).flatten(1)
        low, high = torch.minimum(low, pixels.amin(dim=1)), torch.maximum(high, pixels.amax(dim=1))
        count += pixels.shape[1]
        total += pixels.sum(dim=1)
        products += pixels @ pixels.T
    mean = total / count
    covariance = products / count - torch.outer(mean, mean)
    axes = colour_axes(covariance)[1]
    images, magnitude = 0, torch.zeros(rfft_shape(shape)).double()
    for batch in progress(read_batches(data), "measuring spectra", data):
        centred = images_of(batch, shape).cpu().double() - mean[:, None, None]
        turned = torch.einsum("cd,nchw->ndhw", axes, centred)
        magnitude += torch.fft.rfft2(turned).abs().sum(dim=0)
        images += len(centred)
    return ImageStatistics(low, high, mean, covariance, magnitude / images)


def assumed_statistics(channels: int) -> ImageStatistics:
    """What is taken of images without data: range [−2, 2], variance 1 and, of three channels, natural colours."""
    low, high = (torch.full((channels,), end).double() for end in ASSUMED_RANGE)
    root = torch.tensor(NATURAL_COLOURS).double() if channels == 3 else torch.eye(channels).double()
    covariance = root @ root.T
    covariance /= covariance.diagonal().mean()
    return ImageStatistics(low, high, torch.zeros(channels).double(), covariance)


def frequencies(height: int, width: int) -> Float[Tensor, "height _"]:
    """Radial frequency of every coefficient of `rfft2`, in cycles per pixel, in float64."""
    rows, columns = torch.fft.fftfreq(height, dtype=torch.float64), torch.fft.rfftfreq(width, dtype=torch.float64)
    return (rows[:, None] ** 2 + columns[None, :] ** 2).sqrt()


def generator_of(seed: int, space: str, slot: int) -> torch.Generator:
    """A generator of its own for every seed, space and slot."""
    digest = hashlib.sha256(f"{seed}\n{space}\n{slot}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def shaken(
    images: Float[Tensor, "images channels height width"],
    draws: Float[Tensor, "images 4"],
    method: Parametrisation,
    mean: Float[Tensor, " channels"],
) -> Float[Tensor, "images channels height width"]:
    """The images moved, scaled and turned; the draws in [−1, 1] say how much of what the method allows."""
    if not (method.jitter or method.scale or method.rotate):
        return images
    height, width = images.shape[2:]
    across, down, size, turn = draws.unbind(1)
    size = 1 + method.scale * size
    turn = math.radians(method.rotate) * turn
    cosine, sine = turn.cos() / size, turn.sin() / size
    rows = [
        torch.stack([cosine, -sine * (height / width), across * (2 * method.jitter)], dim=1),
        torch.stack([sine * (width / height), cosine, down * (2 * method.jitter)], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    mean = mean[:, None, None]
    return F.grid_sample(images - mean, grid, padding_mode="zeros", align_corners=False) + mean


def draw(
    target: Target,
    state: Mapping[str, Tensor],
    units: Sequence[int],
    slots: Sequence[int],
    method: Parametrisation,
    statistics: ImageStatistics,
    seed: int,
    steps: int,
) -> tuple[Float[Tensor, "units channels height width"], Float[Tensor, " units"]]:
    """The pictures of some units in one optimisation, and what the units answer to them.

    Adam works on each number alone, so that the sum of all units' objectives has the solution of each.

    Raises:
        InputError: No gradient arrives at the pictures.
        ModelError: A unit answers with NaN or infinity.
    """
    generators = [generator_of(seed, target.space, slot) for slot in slots]
    numbers = torch.stack([method.start(target.shape, g) for g in generators]).to(target.device)
    draws = torch.stack([torch.rand(steps, 4, generator=g) * 2 - 1 for g in generators], dim=1).to(target.device)
    index = torch.tensor(units, device=target.device)[:, None]
    mean = statistics.mean.to(target.device, torch.float32)
    first, second = torch.zeros_like(numbers), torch.zeros_like(numbers)
    for step in progress(range(steps), f"drawing {target.space}"):
        with torch.enable_grad():
            free = numbers.clone().requires_grad_()
            images = shaken(method.images(free, statistics, target.shape), draws[step], method, mean)
            reached = target.values(state, images).gather(1, index).sum()
            if not reached.requires_grad:
                raise InputError(f"space {target.space} cannot be drawn: no gradient arrives at the images")
            (gradient,) = torch.autograd.grad(reached, free)
        first = BETAS[0] * first + (1 - BETAS[0]) * gradient
        second = BETAS[1] * second + (1 - BETAS[1]) * gradient**2
        ahead = first / (1 - BETAS[0] ** (step + 1))
        spread = (second / (1 - BETAS[1] ** (step + 1))).sqrt()
        numbers = numbers + method.learning_rate * ahead / (spread + EPSILON)
    with torch.no_grad():
        images = method.images(numbers, statistics, target.shape)
        activations = target.values(state, images).gather(1, index)[:, 0]
    if not (images.isfinite().all() and activations.isfinite().all()):
        raise ModelError(f"units of space {target.space} answer their pictures with NaN or infinity: check the weights")
    return images.cpu(), activations.cpu()


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Power of images by spatial frequency.

    Attributes:
        frequency: Cycles per pixel in the middle of every ring; 0.5 is the Nyquist frequency.
        power: Mean over images, channels and the coefficients of the ring; white noise of variance σ² has σ² in all.
    """

    frequency: Float[Tensor, " rings"]
    power: Float[Tensor, " rings"]


def spectrum_of(images: Float[Tensor, "images channels height width"]) -> Spectrum:
    """The radially averaged power spectrum of images, in float64, from the constant term to the Nyquist frequency.

    Rings are as wide as one cycle over the shorter side.

    Raises:
        DataError: No images.
    """
    power, radius = powers(images)
    side = min(images.shape[2:])
    ring = (radius * side).round().long()
    rings = side // 2 + 1
    inside = ring < rings
    mean = power.mean(dim=(0, 1))[inside]
    total = torch.zeros(rings).double().index_add(0, ring[inside], mean)
    count = torch.zeros(rings).double().index_add(0, ring[inside], torch.ones_like(mean))
    return Spectrum(torch.arange(rings).double() / side, total / count)


def high_frequency_share(images: Float[Tensor, "images channels height width"]) -> Float[Tensor, " images"]:
    """For every image, the share of its power, less the constant term, above half the Nyquist frequency; in float64.

    A constant image has none: 0. White noise has 1 − π/16 ≈ 0.80, as corners count.

    Raises:
        DataError: No images.
    """
    power, radius = powers(images)
    power = power.sum(dim=1)
    total, high = power[:, radius > 0].sum(dim=1), power[:, radius > 0.25].sum(dim=1)
    return torch.where(total > 0, high / torch.where(total > 0, total, 1), 0.0)


def powers(
    images: Float[Tensor, "images channels height width"],
) -> tuple[Float[Tensor, "images channels height width"], Float[Tensor, "height width"]]:
    """Squared magnitude of every coefficient, for each pixel, and the coefficient's radial frequency."""
    if not images.numel():
        raise DataError("no images: give at least one")
    height, width = images.shape[2:]
    power = torch.fft.fft2(images.detach().cpu().double()).abs() ** 2 / (height * width)
    rows, columns = torch.fft.fftfreq(height, dtype=torch.float64), torch.fft.fftfreq(width, dtype=torch.float64)
    return power, (rows[:, None] ** 2 + columns[None, :] ** 2).sqrt()
