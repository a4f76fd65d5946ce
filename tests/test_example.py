"""Example inputs: what a text asks for, and what a model gets when nobody asks."""

import pytest
import torch
from torch import nn

from helpers.refusals import refuses
from isthmus.cli.arguments import parse_shape
from isthmus.cli.commands import main
from isthmus.errors import InputError
from isthmus.runs.example import InputShape, example_input, parse_input, sample_shapes
from isthmus.runs.recipe import ParentOptions, Recipe


class Reader(nn.Module):
    """Reads tokens, a flag for each, and a vector."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)
        self.positions = nn.Embedding(5, 4)

    def forward(self, ids, *, mask, vector):
        assert ids.dtype in (torch.int32, torch.int64)
        assert mask.dtype == torch.bool
        places = torch.arange(ids.shape[1])
        return self.head(((self.table(ids) + self.positions(places)) * mask.unsqueeze(-1)).sum(1) + vector)


class Odd(nn.Module):
    """Does not run on what its first weight suggests."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(7, 2)

    def forward(self, x):
        return self.layer(x[:, :3])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("3,32,32", [InputShape(None, (3, 32, 32))]),
        ("3x32x32", [InputShape(None, (3, 32, 32))]),
        ("128:int64", [InputShape(None, (128,), torch.int64)]),
        ("128:int32:1000", [InputShape(None, (128,), torch.int32, 1000)]),
        (":int64", [InputShape(None, (), torch.int64)]),
        ("4:bool", [InputShape(None, (4,), torch.bool)]),
        ("5:int64; mask = 5:bool;x=4", [
            InputShape(None, (5,), torch.int64), InputShape("mask", (5,), torch.bool), InputShape("x", (4,)),
        ]),
    ],
    ids=str,
)  # fmt: skip
def test_a_text_says_what_a_model_reads(text, found):
    assert list(parse_input(text)) == found


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "give the shape"),
        ("big", "give the shape"),
        ("3,,4", "give the shape"),
        ("0", "give the shape"),
        ("-3", "give the shape"),
        ("3;", "give the shape"),
        ("3:int64:5:6", "give the shape"),
        ("²", "give the shape"),
        ("3:int63", "no dtype 'int63'; choose from float32"),
        ("3:int64:0", "'0' is no bound"),
        ("3:int64:many", "'many' is no bound"),
        ("3:float32:5", "'5' is no bound"),
        ("a b=3", "'a b' is no name"),
        ("=3", "'' is no name"),
        ("a=3;a=4", "a name stands there twice"),
        ("a=3;4", "inputs without a name first"),
    ],
)
def test_a_wrong_text_gets_one_line(text, says):
    with refuses(InputError, f"--input .*{says}"):
        parse_input(text)
    with refuses(InputError, says):
        Recipe(models=[ParentOptions(model="a"), ParentOptions(model="b")], architecture="mlp", input=text).check()


def test_a_plain_shape_stays_a_list_in_recipes():
    assert parse_shape("3,32,32") == [3, 32, 32]
    assert parse_shape("3:int64") == "3:int64"
    assert parse_shape("x=3") == "x=3"
    assert parse_shape(None) is None


def test_inputs_are_drawn_as_asked():
    model = Reader().eval()
    state = torch.random.get_rng_state()
    batch, assumed = example_input(model, "5:int32; mask=5:bool; vector=4", None)
    again, _ = example_input(model, "5:int32; mask=5:bool; vector=4", None)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(batch.args[0], again.args[0])
    assert sample_shapes(batch) == {"0": [5], "mask": [5], "vector": [4]}
    assert batch.kwargs["vector"].dtype == torch.float32
    assert assumed == "integers from 0 to 6, the rows of the first embedding"
    many, assumed = example_input(model, "5:int64:3; mask=5:bool; vector=4", None)
    assert (int(many.args[0].max()), assumed) == (2, "")


def test_floating_point_inputs_have_the_models_precision_unless_said():
    model = nn.Linear(4, 2).to(torch.float64).eval()
    assert example_input(model, [4], None)[0].args[0].dtype == torch.float64
    with refuses(InputError, "does not run on --input 4"):
        example_input(model, "4:float32", None)


def test_a_model_that_says_it_reads_tokens_gets_some():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(12, 2)).eval()
    model.sample_shape, model.sample_tokens = (4,), 5
    for wanted in (None, [4]):
        batch, assumed = example_input(model, wanted, None)
        assert batch.args[0].dtype == torch.int64
        assert 3 <= int(batch.args[0].max()) < 5  # 8 draws: all below 3 once in 60
        assert assumed == ""


def test_what_was_tried_is_said_where_nothing_runs():
    with refuses(InputError, "no input is known .*; on 7 it does not .*: give --input, such as 3,32,32"):
        example_input(Odd().eval(), None, None)


def test_tokens_on_the_command_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "reading.py").write_text(
        "from torch import nn\n"
        "def make(): return nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", "reading:make", "--input", "5:int64"]) == 0
    printed = capsys.readouterr().out
    assert "integers from 0 to 8" in printed
    assert "14 free units" in printed
    assert main(["inspect", "reading:make", "--input", "5:int64:90"]) == 2
    assert "does not run on --input 5:int64" in capsys.readouterr().err
