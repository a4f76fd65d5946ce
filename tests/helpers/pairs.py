"""Small networks of one architecture, freshly drawn or quickly trained on the digits, with their data and symmetry."""

import copy
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import isthmus
from helpers.zoo import ZOO
from isthmus.data import load_data
from isthmus.models import load_model, sample_shape, sample_tokens
from isthmus.symmetry.transform import move_state
from oracles import git_rebasin as oracle

MLP = "mlp?in_features=64&width=24&depth=3"
VGG_BN = "vgg11_bn?width=0.0625&in_channels=1"
RESNET20 = "resnet20?width=0.25&in_channels=1"
CNN = "cnn?width=0.5"
TRAINED = (MLP, VGG_BN, RESNET20)
# Every network of isthmus.models, and every norm and shortcut of the residual one.
NETWORKS = (
    MLP,
    "cnn?width=0.25",
    "vgg11?width=0.0625",
    "vgg11_bn?width=0.0625&image_size=64",
    "vgg16?width=0.0625",
    "vgg16_bn?width=0.0625",
    "resnet20?width=0.25",
    "resnet20?width=0.5&norm=group",
    "resnet20?width=0.25&norm=layer",
    "resnet20?width=0.25&norm=none",
    "resnet20?width=0.25&shortcut=conv3x3",
    "gpt?width=16&vocabulary=11&block=8",
    "gpt?width=16&vocabulary=11&block=8&positions=rope&norm=rms&mlp=gated&tied=true",
    "vit?width=16&depth=2&image_size=8",
)


def fresh(spec: str, seed: int) -> nn.Module:
    """A network at its initial weights."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = load_model(spec).eval()
    if spec.startswith("resnet20"):  # takes images of any size; small ones are quick
        model.sample_shape = (sample_shape(model)[0], 16, 16)
    return model


def lively(spec: str, seed: int) -> nn.Module:
    """A network whose every tensor is in general position: norms have gains, shifts and statistics of their own."""
    model = fresh(spec, seed)
    stir(model, seed)
    return model


def stir(model: nn.Module, seed: int) -> None:
    """Moves vectors away from their constant initial values, in place."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.ndim == 1:
            noise = torch.rand(tensor.shape, generator=generator)
            tensor.copy_(0.5 + noise if "running_var" in name else tensor + noise - 0.5)


def structure(name: str, seed: int = 0) -> nn.Module:
    """A network of the zoo whose every tensor is in general position; the global generator is left as it was."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = ZOO[name]().eval()
    stir(model, seed)
    return model


@cache
def structures(name: str, count: int = 2) -> tuple[list[nn.Module], isthmus.Symmetry, list[tuple[Tensor, Tensor]]]:
    """Networks of the zoo, their symmetry, and inputs with random classes; do not change them."""
    models = [structure(name, seed) for seed in range(count)]
    (x,), _ = models[0].inputs(samples=40)
    with torch.no_grad():
        *shape, classes = models[0](x).shape
    y = torch.randint(classes, shape, generator=torch.Generator().manual_seed(0))
    return models, isthmus.trace(models[0], x[:2]), [(x[:20], y[:20]), (x[20:], y[20:])]


SPECS = {MLP: oracle.mlp_spec(3), VGG_BN: oracle.vgg11_spec(bn=True), RESNET20: oracle.resnet20_spec()}
WATCHED = {MLP: oracle.mlp_watched(3), VGG_BN: oracle.vgg11_bn_watched(), RESNET20: oracle.resnet20_watched()}


@cache
def by_hand(spec: str) -> dict[str, str]:
    """For every traced space, in order, the space of the hand-written specification that has the same places."""
    trained_names = {parameter for parameter, _ in fresh(spec, 0).named_parameters()}
    named = {frozenset(places): name for name, places in SPECS[spec].items()}
    found = {}
    for space in symmetry(spec):
        places = {(site.parameter, site.dims[0]) for site in space.sites if site.parameter in trained_names}
        found[space.name] = named[frozenset(places)]
    assert len(found) == len(named)
    return found


def spec_of(spec: str) -> oracle.Spec:
    """The hand-written specification, its spaces named and ordered as the traced ones."""
    return {name: SPECS[spec][by_hand(spec)[name]] for name in by_hand(spec)}


def watched(spec: str, at: str) -> dict[str, oracle.Watched]:
    """Where hooks read each traced space."""
    return {name: WATCHED[spec][at][by_hand(spec)[name]] for name in by_hand(spec)}


@cache
def seen_by_hooks(spec: str, at: str, seed: int) -> dict[str, np.ndarray]:
    """All samples of every space of a trained network on its data, as hooks see them."""
    units = {space.name: space.size for space in symmetry(spec)}
    return oracle.activations(trained(spec, seed), [x for x, _ in data_of(spec)], watched(spec, at), units)


def planted(model: nn.Module, sym: isthmus.Symmetry, seed: int) -> tuple[nn.Module, dict[str, isthmus.Permutation]]:
    """The model with its units shuffled, and how they were."""
    rng = np.random.default_rng(seed)
    transforms = {space.name: isthmus.Permutation.random(space, rng) for space in sym}
    for name, transform in transforms.items():
        if transform.is_identity:
            transforms[name] = isthmus.Permutation(np.roll(transform.indices, 1, axis=1))
    moved = copy.deepcopy(model)
    moved.load_state_dict(move_state(model.state_dict(), transforms, sym))
    return moved, transforms


def inputs_of(model: nn.Module, samples: int, seed: int = 0) -> Tensor:
    """Normal draws, or tokens, of the shape that the network takes."""
    shape, tokens, generator = sample_shape(model), sample_tokens(model), torch.Generator().manual_seed(seed)
    assert shape is not None
    if tokens is not None:
        return torch.randint(tokens, (samples, *shape), generator=generator)
    return torch.randn(samples, *shape, generator=generator)


@cache
def symmetry(spec: str) -> isthmus.Symmetry:
    """The symmetry of a network that `load_model` builds."""
    model = fresh(spec, 0)
    return isthmus.trace(model, inputs_of(model, 2))


@cache
def digits(shape: tuple[int, ...], part: str = "train", samples: int = 400) -> tuple[tuple[Tensor, Tensor], ...]:
    """Digits in batches of 100, enlarged to the images of that shape, or flattened."""
    data = load_data("digits")
    chosen = np.random.default_rng(0).permutation(len(data.y_train))
    chosen = chosen[:samples] if part == "train" else chosen[-samples:]
    x, y = data.x_train[chosen].float() / 8 - 1, data.y_train[chosen]
    if len(shape) == 1:
        x = x.flatten(1)
    elif tuple(x.shape[1:]) != shape:
        x = F.interpolate(x, size=shape[1:], mode="bilinear")
    return tuple(zip(x.split(100), y.split(100), strict=True))


@cache
def data_of(spec: str, part: str = "train", samples: int = 400) -> tuple[tuple[Tensor, Tensor], ...]:
    """Labelled batches that a network takes."""
    shape = sample_shape(fresh(spec, 0))
    assert shape is not None
    return digits(shape, part, samples)


@cache
def trained(spec: str, seed: int, epochs: int = 2) -> nn.Module:
    """A network after a few epochs on the digits; do not change it.

    Its weights are no longer random and its units are no longer alike, but its loss may be near that of chance: where a
    test compares losses, `learnt` is needed.
    """
    model = fresh(spec, seed).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.cat(parts) for parts in zip(*data_of(spec), strict=True))
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    optimizer.zero_grad()
    return model.eval()


@cache
def learnt(spec: str, seed: int) -> nn.Module:
    """A network that has truly learnt the digits; do not change it.

    What such networks lose when they are merged, and what mending brings back, are tenths of a unit of loss; rounding
    moves these losses by thousandths where it does not change which units are matched.
    """
    model = trained(spec, seed, epochs=8)
    assert isthmus.evaluate(model, data_of(spec)).accuracy > 0.85
    return model
