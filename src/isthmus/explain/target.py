"""A space's units as a function of images: the part of the traced graph that they need, with gradients."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from isthmus.data.batches import Batch
from isthmus.errors import InputError, SymmetryError
from isthmus.explain.images import tensors_in
from isthmus.explain.units import means_of_units
from isthmus.graph.capture import Program, capture
from isthmus.graph.reader import needed_for, run
from isthmus.observe.collect import check_at
from isthmus.state import State, first_float
from isthmus.symmetry.spaces import Site
from isthmus.symmetry.symmetry import Symmetry

# Bytes of node values that pictures drawn together may take; more pictures are drawn one part after the other.
MEMORY = 1 << 29

# Pairs of random images by which the images' dimension is found; one is enough but where most units are silent.
PROBES = 8


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
        graph = symmetry.graph
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
        self.program = _float32_program(model, graph.program)
        self.shape = _image_shape(self.program)
        self.programs: dict[int, Program] = {}
        self.needed = {each.name for each in needed_for(self.program, self.node)}
        self.batch_dim = -1
        traced = len(tensors_in(self.program.args, self.program.kwargs)[0])
        several = max(2, traced)  # the graph of the traced batch is at hand; one image alone mixes with none
        self.find_batch(model, several)
        sizes = (node.meta.get("val") for node in needed_for(self.program_at(several), self.node))
        held = sum(v.numel() * v.element_size() for v in sizes if isinstance(v, Tensor))
        self.most_images = max(1, MEMORY * several // max(1, held))

    def state_of(self, model: nn.Module) -> dict[str, Tensor]:
        """A model's tensors in float32 on the device, out of reach of any gradient."""
        return {
            name: tensor.detach().to(self.device, torch.float32 if tensor.is_floating_point() else None)
            for name, tensor in model.state_dict().items()
        }

    def program_at(self, images: int) -> Program:
        """The graph for that many images."""
        if images not in self.programs:
            batch = torch.zeros(images, *self.shape, device=self.device)
            args, kwargs = pytree.tree_map(
                lambda leaf: batch if isinstance(leaf, Tensor) else leaf, (self.program.args, dict(self.program.kwargs))
            )
            self.programs[images] = self.program.for_inputs(args, kwargs)
        return self.programs[images]

    def forward(self, state: State, images: Float[Tensor, "images channels height width"]) -> Any:
        """The node's value on images, with gradients; no more of the graph is run than it needs."""
        program = self.program_at(len(images))
        batch = Batch(program.args, program.kwargs).mapped(lambda _: images)
        return run(program, state, batch, until=self.node, only=self.needed)

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
                before, after = (self.forward(state, each) for each in (images[:-1], other))
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
        """Every unit's mean over its positions in every image, and over the windows that an image may be cut into."""
        value = self.forward(state, images)
        return means_of_units(value, self.sites, self.batch_dim).unflatten(0, (len(images), -1)).mean(dim=1)


def _float32_program(model: nn.Module, program: Program) -> Program:
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


def _image_shape(program: Program) -> tuple[int, int, int]:
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
