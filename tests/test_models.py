import math
import sys

import pytest
import torch
from torch import nn

from isthmus.errors import ModelError
from isthmus.models import ZOO, load_model, sample_shape, sample_tokens, window
from isthmus.models.gpt import GPT
from isthmus.models.mlp import MLP
from isthmus.models.resnet import ResNet20
from isthmus.models.small_cnn import SmallCNN
from isthmus.models.vgg import VGG
from isthmus.models.vit import ViT

# Every structure the zoo can build, as small as it goes.
SPECS = [
    "mlp?width=8",
    "mlp?width=8&depth=0",
    "cnn?width=0.25",
    "cnn?width=0.25&image_size=12&in_channels=2&classes=3",
    "vgg11?width=0.03125",
    "vgg11_bn?width=0.03125",
    "vgg11_bn?width=0.03125&image_size=64",
    "vgg16?width=0.03125",
    "vgg16_bn?width=0.03125",
    "resnet20?width=0.25",
    "resnet20?width=0.25&norm=group",
    "resnet20?width=0.25&norm=layer&shortcut=conv3x3",
    "resnet20?width=0.25&norm=none",
    "gpt?width=8&heads=2&vocabulary=10&block=6",
    "gpt?width=8&heads=2&vocabulary=10&block=6&positions=rope&norm=rms&mlp=gated",
    "gpt?width=8&heads=2&vocabulary=10&block=6&tied=true&bias=true",
    "vit?width=8&depth=2&heads=2&patch=8",
    "vit?width=8&depth=2&heads=2&patch=8&norm=rms&mlp=gated",
]


def batch(model: nn.Module, samples: int = 4) -> torch.Tensor:
    shape = sample_shape(model)
    assert shape is not None
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        tokens = sample_tokens(model)
        return torch.randn(samples, *shape) if tokens is None else torch.randint(tokens, (samples, *shape))


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("spec", SPECS)
def test_a_sample_shape_gives_logits_that_depend_on_every_parameter(spec):
    model = load_model(f"zoo:{spec}")
    logits = model(batch(model))
    assert logits.shape == (4, *[6] * spec.startswith("gpt"), 3 if "classes=3" in spec else 10)
    logits = logits.flatten(0, -2)
    nn.functional.cross_entropy(logits, torch.arange(len(logits)) % 3).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), f"{name} does not matter"


@pytest.mark.parametrize("spec", SPECS)
def test_samples_do_not_see_each_other_in_evaluation(spec):
    model = load_model(spec).eval()
    x = batch(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x)[1:2], model(x[1:2]))


@pytest.mark.parametrize("spec", SPECS)
def test_every_network_can_be_exported(spec):
    model = load_model(spec).eval()
    x = batch(model)
    before = x.clone()
    exported = torch.export.export(model, (x,), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(x), model(x))
    assert torch.equal(x, before)


def test_every_name_of_the_zoo_is_built_with_and_without_prefix():
    for name in ZOO:
        with torch.device("meta"):
            bare, prefixed = load_model(name), load_model(f"zoo:{name}")
        assert bare.state_dict().keys() == prefixed.state_dict().keys()
        assert sample_shape(bare) is not None


# Counted by hand from the papers' tables: weights, biases and the two vectors of every BatchNorm.
@pytest.mark.parametrize(
    ("spec", "count"),
    [
        ("mlp", 784 * 512 + 2 * 512 * 512 + 3 * 512 + 512 * 10 + 10),
        ("vgg11", 9_220_480 + 5_130),
        ("vgg11_bn", 9_220_480 - 2_752 + 2 * 2_752 + 5_130),
        ("vgg16", 14_714_688 + 5_130),
        # 269,722 is ResNet20 with shortcuts that have no parameters.
        ("resnet20", 269_722 + (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)),
        ("resnet20?shortcut=conv3x3", 269_722 + (9 * 16 * 32 + 2 * 32) + (9 * 32 * 64 + 2 * 64)),
    ],
)
def test_the_networks_have_the_size_of_the_papers(spec, count):
    assert parameters(load_model(spec)) == count


@pytest.mark.parametrize("spec", SPECS)
def test_a_convolution_has_a_bias_where_no_normalisation_has_one(spec):
    model = load_model(spec)
    normalised = any(isinstance(module, nn.BatchNorm2d | nn.GroupNorm) for module in model.modules())
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert (module.bias is None) == normalised


def test_width_multiplies_channels_and_may_be_fractional():
    def stages(width: float) -> list[int]:
        convolutions = [m for m in ResNet20(width=width).modules() if isinstance(m, nn.Conv2d)]
        return sorted({conv.out_channels for conv in convolutions})

    assert stages(1) == [16, 32, 64]
    assert stages(0.5) == [8, 16, 32]
    assert stages(2) == [32, 64, 128]
    assert VGG(width=0.25).head.in_features == 128


@pytest.mark.parametrize(("size", "pixels"), [(32, 1), (64, 4), (70, 4), (96, 9)])
def test_vgg_flattens_whatever_map_the_image_leaves(size, pixels):
    model = VGG(width=0.03125, image_size=size)
    assert model.head.in_features == 16 * pixels
    assert model(torch.randn(1, 3, size, size)).shape == (1, 10)


def test_the_mlp_takes_a_sample_of_any_shape():
    model, x = MLP(in_features=64, width=8), torch.randn(2, 64)
    assert torch.equal(model(x), model(x.view(2, 1, 8, 8)))


def test_initial_weights_come_from_the_global_generator():
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(load_model("vgg11_bn?width=0.03125").parameters())

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


def test_initialisation_is_that_of_the_papers():
    model = VGG(width=0.25)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            window = math.prod(module.weight.shape[2:])
            bound = math.sqrt(6 / (window * (module.weight.shape[0] + module.weight.shape[1])))
            assert 0.9 * bound < module.weight.abs().max() <= bound
            assert module.bias is not None
            assert not module.bias.any()
    for name, parameter in ResNet20().named_parameters():
        if parameter.ndim == 4:
            fan_out = parameter.shape[0] * math.prod(parameter.shape[2:])
            # The sample deviation of n normal values is off by σ/√(2n); five of those.
            expected = math.sqrt(2 / fan_out)
            assert abs(parameter.std().item() - expected) < 5 * expected / math.sqrt(2 * parameter.numel()), name
        elif name.endswith("weight"):
            assert parameter.any(), f"{name} starts at zero"


def test_values_are_json_or_else_strings(tmp_path, monkeypatch):
    (tmp_path / "echo_values.py").write_text(
        "from torch import nn\n"
        "def build(**values):\n"
        "    model = nn.Linear(1, 1)\n"
        "    model.values = values\n"
        "    return model\n"
    )
    monkeypatch.chdir(tmp_path)
    spec = 'echo_values:build?a=2&b=0.5&c=true&d=[1,2]&e=group&f="7"&g=x=y&h=null&i='
    expected = {"a": 2, "b": 0.5, "c": True, "d": [1, 2], "e": "group", "f": "7", "g": "x=y", "h": None, "i": ""}
    assert load_model(spec).values == expected


def test_a_factory_is_found_in_the_current_folder_and_on_the_path(tmp_path, monkeypatch):
    package = tmp_path / "path" / "island" / "coast"
    package.mkdir(parents=True)
    (package / "nets.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Linear):\n"
        "    sample_shape = [3]\n"
        "    def __init__(self, out=2):\n"
        "        super().__init__(3, out)\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "path")
    model = load_model("island.coast.nets:Net?out=5")
    assert model.out_features == 5
    assert sample_shape(model) == (3,)

    (tmp_path / "here_only.py").write_text("from isthmus.models import MLP as make\n")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    assert isinstance(load_model("here_only:make?width=3"), MLP)
    assert sys.path == path


def test_sample_shape_is_none_or_checked():
    assert sample_shape(nn.Linear(2, 2)) is None
    assert sample_shape(SmallCNN(image_size=12)) == (1, 12, 12)
    for wrong in ((3, 0), (3, -1, 2), "3,32,32", 5, (2.5,), (True,)):
        model = nn.Linear(2, 2)
        model.sample_shape = wrong
        with pytest.raises(ModelError, match=r"Linear\.sample_shape"):
            sample_shape(model)


def test_tokens_are_known_by_their_number():
    model = GPT(width=8, heads=2, vocabulary=5, block=7)
    assert (sample_tokens(model), window(model)) == (5, 7)
    assert (sample_tokens(SmallCNN()), window(SmallCNN())) == (None, None)
    for wrong in (0, -1, 2.5, True, "5"):
        model.sample_tokens = wrong
        with pytest.raises(ModelError, match=r"GPT\.sample_tokens"):
            sample_tokens(model)


@pytest.mark.parametrize("positions", ["learned", "rope"])
def test_a_token_sees_those_before_it_and_where_they_stand(positions):
    model = GPT(width=8, heads=2, vocabulary=5, block=6, positions=positions).eval()
    for block in model.blocks:  # far from the initial weights, at which attention is nearly even
        nn.init.normal_(block.attention.query.weight)
        nn.init.normal_(block.attention.key.weight)
    x = torch.tensor([[0, 1, 2, 3, 4, 0]])
    later, swapped = x.clone(), x.clone()
    later[0, 4] = 2
    swapped[0, [0, 1]] = x[0, [1, 0]]
    with torch.no_grad():
        own, after, other = model(x), model(later), model(swapped)
    torch.testing.assert_close(own[:, :4], after[:, :4])
    assert not torch.allclose(own[:, 4:], after[:, 4:])
    assert not torch.allclose(own[:, 2:], other[:, 2:], atol=1e-5)
    with torch.no_grad():  # and a shorter text is a beginning
        torch.testing.assert_close(model(x[:, :3]), own[:, :3])


def test_attention_is_that_of_torch():
    model = ViT(width=8, depth=1, heads=2, image_size=8)
    attention = model.blocks[0].attention
    x = torch.randn(3, 4, 8)
    q, k, v = (f(x).view(3, 4, 2, 4).transpose(1, 2) for f in (attention.query, attention.key, attention.value))
    read = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(3, 4, 8)
    torch.testing.assert_close(attention(x), attention.output(read))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("resnet21", "did you mean 'resnet20'?"),
        ("zoo:vgg11_b", "did you mean 'vgg11"),
        ("zoo:", "no network ''"),
        ("", "no network ''"),
        ("mlp?widht=3", "did you mean 'width'?"),
        ("mlp?width", "'width' is not a new key=value"),
        ("mlp?width=3&width=4", "'width=4' is not a new key=value"),
        ("mlp?=3", "'=3' is not a new key=value"),
        ("mlp?width=wide", "the factory failed: Type"),
        ("mlp?width=0", "must be 1 or more"),
        ("vgg11?depth=12", "depth=12 is unknown; take one of 11, 16"),
        ("vgg11?image_size=8", "image_size=8"),
        ("cnn?image_size=3", "image_size=3"),
        ("resnet20?norm=batsch", "norm='batsch' is unknown"),
        ("resnet20?shortcut=none", "shortcut='none' is unknown"),
        ("resnet20?width=-1", "width=-1"),
        ("hf:gpt2?layers=3", "a folder takes no arguments"),
        ("pt2:nowhere", "there is no file 'nowhere'"),
        ("nowhere.pt2", "there is no file 'nowhere.pt2'"),
        ("bad_models.py.pt2", "cannot be read as an exported program"),
        ("nowhere.pt2?width=2", "takes no arguments; leave out width="),
        ("gpt?heads=3", "a positive multiple of heads=3"),
        ("gpt?block=0", "block=0"),
        ("gpt?positions=sine", "positions='sine' is unknown; take one of learned, rope"),
        ("gpt?width=12&heads=4&positions=rope", "an odd number"),
        ("gpt?norm=batch", "norm='batch' is unknown; take one of layer, rms"),
        ("vit?mlp=relu", "mlp='relu' is unknown; take one of gelu, gated"),
        ("vit?patch=5", "a multiple of patch=5"),
        ("bad_models2:linear", "did you mean 'bad_models'?"),
        ("nowhere.to.be.found:linear", "no module 'nowhere'"),
        ("bad_models:linaer", "did you mean 'linear'?"),
        ("bad_models:number", "has no factory 'number'"),
        ("bad_models:", "has no factory ''"),
        (":linear", "importing"),
        ("bad_models:text", "returned str, not a torch.nn.Module"),
        ("bad_models:fails", "ValueError: two lines"),
        ("bad_models:exits", "SystemExit"),
        ("bad_models:linear", "missing a required argument: 'size'"),
        ("bad_import:linear", "importing bad_import failed: ModuleNotFoundError: No module named 'absent_dependency'"),
        ("bad_syntax:linear", "importing bad_syntax failed: SyntaxError"),
    ],
)
def test_a_wrong_spec_gets_one_line_that_helps(spec, says, tmp_path, monkeypatch):
    (tmp_path / "bad_models.py").write_text(
        "import sys\n"
        "from torch import nn\n"
        "number = 3\n"
        "def linear(size): return nn.Linear(size, size)\n"
        "def text(): return 'text'\n"
        "def fails(): raise ValueError('two\\nlines')\n"
        "def exits(): sys.exit(1)\n"
    )
    (tmp_path / "bad_models.py.pt2").write_bytes(b"PK no archive")
    (tmp_path / "bad_import.py").write_text("import absent_dependency\n")
    (tmp_path / "bad_syntax.py").write_text("def linear(:\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError) as caught:
        load_model(spec)
    message = str(caught.value)
    assert says in message
    assert "\n" not in message
