"""Feature visualisation: pictures against naive loops, and laws of what may change a picture."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import isthmus
import isthmus.explain.target
from helpers.coloured import coloured
from helpers.pairs import MLP, RESNET20, VGG_BN, data_of, lively, planted, stir, symmetry, trained
from helpers.refusals import refuses
from helpers.zoo import ZOO, Net
from isthmus.errors import DataError, InputError, ModelError, SymmetryError
from isthmus.explain.ascent import _generator_of
from isthmus.explain.features import respond, visualise, visualise_many
from isthmus.explain.images import high_frequency_share, measure_images, spectrum_of
from isthmus.explain.parametrisations import PARAMETRISATIONS, FourierImages, Maco
from isthmus.explain.target import Target
from isthmus.registry import configure

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
# Little of an image comes through all of FadingSignal, in float32 nothing, and drawing it is refused.
IMAGES = [name for name, net in ZOO.items() if len(net.sample_shape) == 3 and name != "FadingSignal"]
STILL = {"jitter": 0.0, "scale": 0.0, "rotate": 0.0}


class Small(nn.Module):
    """Two convolutions with a BatchNorm between, and a linear head."""

    def __init__(self, channels: int = 3, side: int = 8):
        super().__init__()
        self.first = nn.Conv2d(channels, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.head = nn.Linear(8, 4)
        self.side = side

    def forward(self, x):
        x = F.relu(self.norm(self.first(x)))
        x = F.relu(self.second(x))
        return self.head(x.mean(dim=(2, 3)))


def small(channels: int = 3, side: int = 8, seed: int = 0):
    torch.manual_seed(seed)
    model = Small(channels, side).eval()
    stir(model, seed)
    return model, isthmus.trace(model, torch.randn(2, channels, side, side))


@pytest.fixture(scope="module")
def digits_mlp():
    """The trained perceptron of the digits and its symmetry, on images instead of vectors."""
    model = trained(MLP, 0)
    batches = [(x.unflatten(1, (1, 8, 8)), y) for x, y in data_of(MLP)]
    return model, isthmus.trace(model, batches[0][0][:2]), batches


def test_the_first_steps_are_those_of_adam_on_one_unit_read_by_a_hook():
    model, sym = small()
    statistics = measure_images(coloured())
    method, unit, steps = FourierImages(**STILL), 5, 4
    found = visualise(model, sym, "second", [unit], statistics, method=method, seed=7, steps=steps)
    seen = {}
    hook = model.second.register_forward_hook(lambda module, args, output: seen.update(value=output))
    numbers = method.start((3, 8, 8), _generator_of(7, "second", unit))[None].requires_grad_()
    adam = torch.optim.Adam([numbers], lr=method.learning_rate, eps=1e-12, maximize=True)
    for _ in range(steps):
        adam.zero_grad()
        model(method.images(numbers, statistics, (3, 8, 8)))
        seen["value"][0, unit].mean().backward()
        adam.step()
    expected = method.images(numbers, statistics, (3, 8, 8)).detach()
    model(expected)
    hook.remove()
    # Adam divides by the size of gradients: what float32 rounds off, relative to them, is taken over by the numbers.
    torch.testing.assert_close(found.images, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.activations[0], seen["value"][0, unit].mean().detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["fourier", "maco"])
def test_a_picture_does_not_depend_on_what_is_drawn_beside_it(method):
    model, sym = small()
    statistics = measure_images(coloured())
    together = visualise(model, sym, "second", None, statistics, method=method, steps=20)
    some = visualise(model, sym, "second", [6, 2, 5], statistics, method=method, steps=20)
    alone = visualise(model, sym, "second", [2], statistics, method=method, steps=20)
    # A batch of another size sums in another order: float32 rounding, taken over by Adam in 20 steps of 0.1 or less.
    torch.testing.assert_close(together.images[[6, 2, 5]], some.images, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(some.images[1:2], alone.images, rtol=1e-3, atol=1e-3)
    assert (together.images[0] - together.images[1]).abs().max() > 0.1  # the tolerance tells pictures apart


def test_parts_that_are_drawn_one_after_the_other_give_the_same_pictures(monkeypatch):
    model, sym = small()
    statistics = measure_images(coloured())
    whole = visualise(model, sym, "second", None, statistics, steps=10)
    target = Target(model, sym, "second", "pre", -1)
    assert target.most_images > 8
    monkeypatch.setattr("isthmus.explain.target.MEMORY", isthmus.explain.target.MEMORY * 3 // target.most_images)
    assert Target(model, sym, "second", "pre", -1).most_images == 3
    parts = visualise(model, sym, "second", None, statistics, steps=10)
    assert parts.units == whole.units == tuple(range(8))
    torch.testing.assert_close(parts.images, whole.images, rtol=1e-3, atol=1e-3)  # as above
    torch.testing.assert_close(parts.activations, whole.activations, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["fourier", "maco"])
def test_the_same_call_gives_the_same_bytes_and_another_seed_others(method):
    model, sym = small()
    before, state = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    data = coloured()
    kept = [x.clone() for x in data]
    first, second, other = (
        visualise(model, sym, "first", [0, 3], data, method=method, steps=5, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.activations, second.activations)
    assert not torch.equal(first.images, other.images)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(x, y) for x, y in zip(data, kept, strict=True))
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not model.training


@pytest.mark.parametrize("at", ["pre", "post"])
def test_matched_units_of_a_shuffled_network_have_the_same_pictures(at):
    model, sym = lively(VGG_BN, 0), symmetry(VGG_BN)
    moved, transforms = planted(model, sym, 1)
    space = sym.spaces[1]
    slots = [0, 3, 5]
    units = [int(transforms[space.name].indices[0, slot]) for slot in slots]
    assert units != slots
    # Slot i of the shuffled network holds the model's unit indices[0, i].
    shuffled, own = visualise_many(
        [moved, model], sym, space.name, [slots, units], data_of(VGG_BN), at=at, steps=6, seed=3
    )
    # Reordered float32 sums of 9 · 4 terms, taken over by 6 steps of Adam.
    torch.testing.assert_close(shuffled.images, own.images, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(shuffled.activations, own.activations, rtol=1e-3, atol=1e-3)
    assert own.units == tuple(units)
    unmatched = visualise(moved, sym, space.name, units, data_of(VGG_BN), at=at, steps=6, seed=3, slots=slots)
    assert (unmatched.images - own.images).abs().max() > 0.1


def test_models_drawn_together_have_the_pictures_of_models_drawn_alone():
    model, sym = small()
    others = [small(seed=seed)[0] for seed in (1, 2)]
    data = coloured()
    together = visualise_many([model, *others], sym, "second", [1, 4], data, steps=5)
    for each, pictures in zip([model, *others], together, strict=True):
        assert torch.equal(visualise(each, sym, "second", [1, 4], data, steps=5).images, pictures.images)
        assert pictures.seconds > 0
    states = visualise_many([model, others[0].state_dict()], sym, "second", [1, 4], data, steps=5)
    assert torch.equal(states[1].images, together[1].images)


# Pictures with the data's own spectrum are less free: of 24 units one or two may stay below the loudest digits.
@pytest.mark.parametrize(("method", "units"), [("fourier", 24), ("maco", 20)])
def test_pictures_of_a_trained_perceptron_excite_their_units_more_than_its_data(digits_mlp, method, units):
    model, sym, batches = digits_mlp
    for space in (sym.spaces[0], sym.spaces[-1]):
        pictures = visualise(model, sym, space.name, None, batches, method=method)
        answers = respond(model, sym, space.name, batches)
        assert ((pictures.activations[None] > answers).float().mean(dim=0) > 0.99).sum() >= units
        torch.testing.assert_close(  # the same forward pass in float32, in other batches
            respond(model, sym, space.name, [pictures.images]).diagonal(), pictures.activations, rtol=1e-4, atol=1e-4
        )
        low, high = torch.cat([x for x, _ in batches]).aminmax()
        assert pictures.images.min() >= low
        assert pictures.images.max() <= high
        shown = pictures.pixels()
        assert shown.min() >= 0
        assert shown.max() <= 1


def test_pictures_of_a_trained_convolutional_network_excite_their_units_more_than_its_data():
    model, sym = trained(VGG_BN, 0), symmetry(VGG_BN)
    space = sym.spaces[2].name
    pictures = visualise(model, sym, space, range(4), data_of(VGG_BN), steps=40)
    answers = respond(model, sym, space, data_of(VGG_BN), range(4))
    assert ((pictures.activations[None] > answers).float().mean(dim=0) > 0.99).all()


def test_units_are_read_as_hooks_read_them_at_every_place():
    model, sym = lively(RESNET20, 0), symmetry(RESNET20)
    x = torch.cat([x for x, _ in data_of(RESNET20)])[:7]
    seen = []
    hook = model.blocks[0].conv1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(x)
    hook.remove()
    stem = sym.spaces[0].name
    assert len(sym.traced.post[stem]) > 1
    found = respond(model, sym, stem, [x[:4], x[4:]], at="post", place=0)
    torch.testing.assert_close(found, seen[0].mean(dim=(2, 3)), rtol=1e-4, atol=1e-5)  # float32, means of 256
    last = respond(model, sym, stem, [x], at="post")
    assert not torch.allclose(last, found)
    places = len(sym.traced.post[stem])
    assert torch.equal(respond(model, sym, stem, [x], at="post", place=places - 1), last)
    with refuses(InputError, f"is read at {places} nodes"):
        respond(model, sym, stem, [x], at="post", place=places)


class Patches(nn.Module):
    """Patches of an image as tokens, in one written-out attention block of two heads."""

    def __init__(self):
        super().__init__()
        self.cut, self.head = nn.Conv2d(3, 5, 4, stride=4), nn.Linear(5, 2)
        self.query, self.key, self.value = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(5, 6)
        self.out = nn.Linear(6, 5)

    def forward(self, x):
        x = self.cut(x).flatten(2).transpose(1, 2)
        n, t, _ = x.shape
        q, k, v = (layer(x).view(n, t, 2, 3).transpose(1, 2) for layer in (self.query, self.key, self.value))
        scores = F.softmax(q @ k.transpose(2, 3) / 3**0.5, -1)
        x = x + self.out((scores @ v).transpose(1, 2).reshape(n, t, 6))
        return self.head(torch.tanh(x)).mean(dim=1)


def test_units_inside_attention_heads_are_drawn_head_by_head():
    torch.manual_seed(0)
    model = Patches().eval()
    sym = isthmus.trace(model, torch.randn(2, 3, 8, 8))
    assert sorted((space.copies, space.size) for space in sym) == [(1, 2), (1, 5), (2, 3), (2, 3)]
    x = torch.cat(coloured())
    reads = {}
    model.out.register_forward_pre_hook(lambda module, args: reads.update(value=args[0].mean(dim=1)))
    with torch.no_grad():
        model(x)
    (values,) = (s for s in sym if s.copies == 2 and any(site.parameter == "out.weight" for site in s.sites))
    found = respond(model, sym, values.name, [x], at="post")
    assert found.shape == (len(x), 6)
    torch.testing.assert_close(found, reads["value"], rtol=1e-4, atol=1e-5)  # float32
    for space in sym:
        pictures = visualise(model, sym, space.name, None, [x], steps=30)
        assert pictures.units == tuple(range(space.copies * space.size))
        assert (pictures.activations > respond(model, sym, space.name, [x]).mean(dim=0)).all()


@pytest.mark.parametrize("name", IMAGES)
def test_the_mean_answers_at_all_places_average_to_the_mean_that_collect_finds(name):
    torch.manual_seed(0)
    model = ZOO[name]().eval()
    stir(model, 0)
    (x,), _ = model.inputs(samples=6)
    sym = isthmus.trace(model, x)
    for at, nodes in (("pre", sym.traced.pre), ("post", sym.traced.post)):
        moments = isthmus.collect([model], sym, [x], at=at)
        for space in sym:
            places = range(len(nodes[space.name]))
            means = torch.stack([respond(model, sym, space.name, [x], at=at, place=p).mean(dim=0) for p in places])
            expected = moments[space.name].mean[0].float()
            # A weighted mean over the places, exact where there is one; float32 means of at most 6 · 25 values.
            inside = torch.minimum(torch.maximum(expected, means.amin(dim=0)), means.amax(dim=0))
            torch.testing.assert_close(inside, expected, **CLOSE)


def test_macos_pictures_keep_the_datas_share_of_high_frequencies():
    model, sym = small()
    data = coloured()
    natural = high_frequency_share(torch.cat(data)).mean()
    maco = high_frequency_share(visualise(model, sym, "second", None, data, method="maco").images).mean()
    # Clamping adds a little, and the mean of magnitudes is not the root of the mean power, so only the order is kept.
    assert natural / 2 < maco < 2 * natural


@pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 8), (4, 12), (3, 224)])
def test_pictures_need_no_data_and_have_the_size_of_the_input(channels, side):
    model, sym = small(channels, side)
    pictures = visualise(model, sym, "second", [0, 1], steps=2)
    assert pictures.images.shape == (2, channels, side, side)
    assert pictures.images.dtype == torch.float32
    assert pictures.images.abs().max() <= 2
    torch.testing.assert_close(pictures.pixels(), pictures.images / 4 + 0.5)
    mean, std = [0.5] * channels, [0.25] * channels
    torch.testing.assert_close(pictures.pixels(mean, std), pictures.images / 4 + 0.5)
    with refuses(InputError, f"{channels} channels each"):
        pictures.pixels(mean)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_of_another_precision_is_drawn_in_float32(dtype):
    model, _ = small()
    model = model.to(dtype)
    sym = isthmus.trace(model, torch.randn(2, 3, 8, 8).to(dtype))
    single = copy.deepcopy(model).float()
    statistics = measure_images(coloured())
    expected = visualise(single, isthmus.trace(single, torch.randn(2, 3, 8, 8)), "second", [1, 2], statistics, steps=4)
    found = visualise(model, sym, "second", [1, 2], statistics, steps=4)
    assert found.images.dtype == torch.float32
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    assert torch.equal(found.images, expected.images)
    rounded = visualise(model, sym, "second", [1, 2], [x.to(dtype) for x in coloured()], steps=4)
    assert rounded.images.isfinite().all()


class InPlace(nn.Module):
    """Writes into a value through a slice of it, whose result nothing reads."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3)
        self.second = nn.Conv2d(6, 5, 3)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        x = self.first(x)
        x[:, :, 2:].relu_()
        return self.head(F.relu(self.second(x), inplace=True).mean(dim=(2, 3)))


def test_operations_in_place_are_run_though_no_edge_leads_to_them():
    torch.manual_seed(0)
    model = InPlace().eval()
    sym = isthmus.trace(model, torch.randn(2, 3, 8, 8))
    x = torch.cat(coloured())
    with torch.no_grad():
        first = model.first(x)
        first = torch.cat([first[:, :, :2], first[:, :, 2:].relu()], dim=2)
        expected = model.second(first).mean(dim=(2, 3))
    torch.testing.assert_close(respond(model, sym, "second", [x]), expected, **CLOSE)  # float32, means of 16
    pictures = visualise(model, sym, "second", None, [x], steps=30)
    assert (pictures.activations > expected.mean(dim=0)).all()


def test_a_symmetry_without_its_graph_is_traced_on_the_data():
    model, sym = small()
    bare = isthmus.Symmetry.from_json(sym.to_json())
    expected = visualise(model, sym, "second", [1], coloured(), steps=3)
    assert torch.equal(visualise(model, bare, "second", [1], coloured(), steps=3).images, expected.images)
    assert torch.equal(visualise(model, None, "second", [1], coloured(), steps=3).images, expected.images)
    with refuses(InputError, "holds no graph"):
        visualise(model, bare, "second", [1], steps=3)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_pictures_can_be_drawn_where_gradients_are_off(mode):
    model, sym = small()
    expected = visualise(model, sym, "second", [1], coloured(), steps=3)
    with mode():
        found = visualise(model, sym, "second", [1], coloured(), steps=3)
    assert torch.equal(found.images, expected.images)


def test_without_steps_the_noise_of_the_slot_is_returned():
    model, sym = small()
    pictures = visualise(model, sym, "second", [1, 2, 3], coloured(), steps=0, slots=[9, 9, 4])
    assert torch.equal(pictures.images[0], pictures.images[1])
    assert not torch.equal(pictures.images[0], pictures.images[2])


class Tokens(Net):
    """An embedding and a hidden layer."""

    def __init__(self):
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(9, 4), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(F.relu(self.hidden(self.embed(x)))).mean(dim=1)


class Mixing(Net):
    """Centres every feature over the batch."""

    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 2)

    def forward(self, x):
        x = self.hidden(x)
        return self.head(F.relu(x - x.mean(dim=0, keepdim=True)).mean(dim=(2, 3)))


def test_bad_input_is_refused_in_one_line():
    model, sym = small()
    x = coloured()
    with refuses(SymmetryError, "no space 'third'"):
        visualise(model, sym, "third", [0])
    with refuses(InputError, "its units are 0 to 7"):
        visualise(model, sym, "second", [0, 8])
    with refuses(InputError, "no unit -1"):
        visualise(model, sym, "second", [-1])
    with refuses(InputError, "no units of space second"):
        visualise(model, sym, "second", [])
    with refuses(InputError, "did you mean 'fourier'"):
        visualise(model, sym, "second", [0], method="forier")
    with refuses(InputError, "give data="):
        visualise(model, sym, "second", [0], method="maco")
    with refuses(InputError, "'post' or 'pre'"):
        visualise(model, sym, "second", [0], at="before")
    with refuses(InputError, "place=2"):
        visualise(model, sym, "second", [0], place=2)
    with refuses(InputError, "2 units and 1 slots"):
        visualise(model, sym, "second", [0, 1], slots=[0])
    with refuses(InputError, "steps=-1"):
        visualise(model, sym, "second", [0], steps=-1)
    with refuses(InputError, "for each of the 2 models"):
        visualise_many([model, model], sym, "second", [[0], [1], [2]])
    with refuses(InputError, "has no option 'step'"):
        configure("parametrisation", "maco", PARAMETRISATIONS, {"step": 3})
    with refuses(InputError, "learning_rate=0"):
        FourierImages(learning_rate=0.0)
    with refuses(InputError, "scale=1"):
        Maco(scale=1.0)
    with refuses(InputError, "contrast=0"):
        FourierImages(contrast=0.0)
    with refuses(DataError, "only once"):
        visualise(model, sym, "second", [0], iter(x))
    with refuses(DataError, r"images of shape \[3, 8, 8\]"):
        visualise(model, sym, "second", [0], [torch.randn(4, 3, 9, 9)])
    with refuses(DataError, r"images of shape \[3, 8, 8\]"):
        respond(model, sym, "second", [torch.randn(4, 192)])
    with refuses(DataError, "another shape"):
        visualise(model, sym, "second", [0], measure_images([torch.randn(4, 1, 8, 8)]))
    with refuses(DataError, "NaN or infinite pixels"):
        visualise(model, sym, "second", [0], [torch.full((2, 3, 8, 8), math.nan)])
    with refuses(DataError, "holds no images"):
        measure_images([torch.randn(4, 3)])
    with refuses(DataError, "no images"):
        spectrum_of(torch.zeros(0, 3, 8, 8))
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.second.weight[0, 0, 0, 0] = math.nan
    with refuses(ModelError, "second.weight"):
        visualise(broken, sym, "second", [0])


def test_models_of_other_inputs_are_refused():
    with refuses(InputError, r"float32 \[2, 64\].*\[batch, channels, height, width\]"):
        visualise(lively(MLP, 0), symmetry(MLP), symmetry(MLP).spaces[0].name, [0])
    tokens = Tokens().eval()
    with refuses(InputError, r"int64 \[2, 5\]"):
        visualise(tokens, isthmus.trace(tokens, torch.randint(9, (2, 5))), "hidden", [0])
    mixing = Mixing().eval()
    with refuses(InputError, "cannot be told apart"):
        visualise(mixing, isthmus.trace(mixing, torch.randn(2, 3, 8, 8)), "hidden", [0])


def test_a_model_without_spaces_says_so():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).eval()
    with refuses(SymmetryError, "the spaces are none"):
        visualise(model, isthmus.trace(model, torch.randn(2, 3, 8, 8)), "0", [0])


def test_constant_channels_stay_constant():
    model, sym = small()
    data = [torch.cat([x[:, :2], torch.full_like(x[:, 2:], 0.7)], dim=1) for x in coloured()]
    for method in ("fourier", "maco"):
        images = visualise(model, sym, "second", [0, 1], data, method=method, steps=3).images
        torch.testing.assert_close(images[:, 2], torch.full((2, 8, 8), 0.7))
        assert images[:, 0].std() > 0


@pytest.mark.gpu
def test_pictures_on_a_gpu_are_those_of_the_processor():
    model, sym = small()
    data = coloured()
    expected = visualise(model, sym, "second", [0, 1], data, steps=4)
    found = visualise(copy.deepcopy(model).cuda(), sym, "second", [0, 1], data, steps=4)
    torch.testing.assert_close(found.images, expected.images, rtol=1e-2, atol=1e-2)  # TF32 in convolutions
