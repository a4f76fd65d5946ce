"""Arguments of the wrong kind at the doors: one line that says what was given and what to give."""

import jaxtyping
import pytest
import torch
from torch import nn

import isthmus
from helpers.refusals import refuses
from isthmus.average.mean import Mean
from isthmus.errors import DataError, InputError, SymmetryError
from isthmus.match.weight_matching import WeightMatching
from isthmus.merging.repair import Reset


def network(seed: int, width: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3)).eval()


x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
a, b = models = [network(0), network(1)]
data = [(x, torch.arange(6) % 3)]
symmetry = isthmus.trace(a, x)
alignment = isthmus.align(models, symmetry)
three = isthmus.align([*models, network(2)], symmetry)
other = isthmus.trace(network(0, width=7), x)
merged = isthmus.merge(models, alignment)


def align(*args, **kwargs):
    return lambda: isthmus.align(*args, **kwargs)


def merge(*args, **kwargs):
    return lambda: isthmus.merge(*args, **kwargs)


def repair(*args, **kwargs):
    return lambda: isthmus.repair(*args, **kwargs)


def connect(*args, **kwargs):
    return lambda: isthmus.connect(*args, **kwargs)


REFUSED = {
    "trace: a file": (lambda: isthmus.trace("file.pt", x), InputError, "model is the text 'file.pt'.*load_module"),
    "trace: swapped": (lambda: isthmus.trace(x, a), InputError, r"model is a Tensor of shape \(6, 4\)"),
    "trace: no input": (lambda: isthmus.trace(a), InputError, "input"),
    "trace: a text as input": (lambda: isthmus.trace(a, "x"), InputError, "no tensor, but the text 'x'"),
    "trace: data as input": (lambda: isthmus.trace(a, 3), InputError, "no tensor, but the number 3"),
    "trace: kwargs": (lambda: isthmus.trace(a, x, kwargs=[x]), InputError, "kwargs is a list of 1: give a mapping"),
    "align: one model": (align(a), InputError, r"models is a model \(Sequential\): give a list"),
    "align: a state dict": (align(a.state_dict()), InputError, "models is an OrderedDict of 4: give a list"),
    "align: a generator": (align(m for m in models), InputError, "models is a generator: give a list"),
    "align: nothing": (align(None), InputError, "models is None"),
    "align: none": (align([]), InputError, "no models"),
    "align: a text among them": (align([a, "b"], symmetry), InputError, r"models\[1\] is the text 'b'.*load_module"),
    "align: a tensor as symmetry": (align(models, x), InputError, "symmetry is a Tensor.*inputs=x"),
    "align: an alignment as symmetry": (align(models, alignment), InputError, "symmetry is an Alignment"),
    "align: another symmetry": (align(models, other), SymmetryError, "not this model's"),
    "align: a class": (align(models, symmetry, WeightMatching), InputError, "the class WeightMatching.*configured"),
    "align: a number as method": (align(models, symmetry, 3), InputError, "method is the number 3"),
    "align: misspelt": (align(models, symmetry, "weight_maching"), InputError, "did you mean 'weight_matching'"),
    "align: data by name": (align(models, symmetry, data="cifar10"), DataError, "data is a str"),
    "align: a number as data": (align(models, symmetry, data=5), DataError, "cannot be iterated over"),
    "align: data read once": (align(models, symmetry, data=(d for d in data)), DataError, "only once"),
    "align: a text as seed": (align(models, symmetry, seed="x"), InputError, "seed='x': give a whole number"),
    "align: half a seed": (align(models, symmetry, seed=1.5), InputError, "seed=1.5: give a whole number"),
    "align: a negative seed": (align(models, symmetry, seed=-1), InputError, "seed=-1: give 0 or more"),
    "align: a text as module": (align(models, symmetry, module="mlp"), InputError, "module is the text 'mlp'"),
    "align: a text as inputs": (align(models, inputs="x"), InputError, "no tensor"),
    "merge: two models": (merge(a, b), InputError, "models is a model"),
    "merge: a symmetry": (merge(models, symmetry), InputError, "alignment is a Symmetry: give what isthmus.align"),
    "merge: a method": (merge(models, "weight_matching"), InputError, "alignment is the text 'weight_matching'"),
    "merge: of three": (merge(models, three), InputError, "2 models, but the alignment holds 3"),
    "merge: of others": (merge([network(0, 7)] * 2, alignment), SymmetryError, "not this model's"),
    "merge: a number as average": (merge(models, average=3), InputError, "average is the number 3"),
    "merge: a class": (merge(models, average=Mean), InputError, "average is the class Mean"),
    "merge: one coefficient": (merge(models, coefficients=0.5), InputError, "coefficients are the number 0.5"),
    "merge: coefficients as text": (merge(models, coefficients="12"), InputError, "coefficients are the text '12'"),
    "merge: a text among them": (merge(models, coefficients=[1, "a"]), InputError, "coefficients hold the text 'a'"),
    "merge: too few": (merge(models, coefficients=[1.0]), InputError, "1 coefficients for 2 models"),
    "merge: of a layer": (merge(models, coefficients={"0": 3}), InputError, "coefficients of '0' are the number 3"),
    "merge: a path as base": (merge(models, base="base.pt"), InputError, "base is the text 'base.pt'"),
    "apply: swapped": (lambda: isthmus.apply(a, alignment, 1), InputError, "alignment is a model"),
    "apply: a state dict": (lambda: isthmus.apply(alignment, a.state_dict(), 1), InputError, "model is an OrderedDict"),
    "apply: a text": (lambda: isthmus.apply(alignment, a, "1"), InputError, "index='1': give a whole number"),
    "apply: no such model": (lambda: isthmus.apply(alignment, a, 2), InputError, "index 2"),
    "repair: the models": (repair(models, data), InputError, "merged is a list of 2"),
    "repair: no data": (repair(merged), DataError, "no data"),
    "repair: None": (repair(merged, None), DataError, "no data"),
    "repair: misspelt": (repair(merged, data, "restet"), InputError, "did you mean 'reset'"),
    "repair: a class": (repair(merged, data, Reset), InputError, "method is the class Reset"),
    "repair: no parents": (repair(merged, data, "repair"), InputError, "needs parents="),
    "repair: one parent": (repair(merged, data, "repair", parents=a), InputError, "parents is a model"),
    "repair: a symmetry": (
        repair(merged, data, "repair", parents=models, alignment=symmetry), InputError, "alignment is a Symmetry",
    ),
    "connect: no data": (connect(a, b), DataError, "no data"),
    "connect: a list": (connect(models, data), InputError, "model_a is a list of 2: give two modules"),
    "connect: a file": (connect(a, "b.pt", data), InputError, "model_b is the text 'b.pt'"),
    "connect: points as text": (connect(a, b, data, "11"), InputError, "points='11': give a whole number"),
    "connect: one point": (connect(a, b, data, 1), InputError, "points=1: a line needs its two ends"),
    "connect: no points": (connect(a, b, data, 0), InputError, "points=0: a line needs its two ends"),
    "connect: misspelt": (connect(a, b, data, repair="rest"), InputError, "did you mean 'reset'"),
    "connect: a name of a loss": (connect(a, b, data, loss="mse"), InputError, "loss is the text 'mse'"),
    "collect: one model": (lambda: isthmus.collect(a, symmetry, data), InputError, "models is a model"),
    "evaluate: two models": (lambda: isthmus.evaluate(models, data), InputError, "model is a list of 2"),
}  # fmt: skip


@pytest.fixture
def unchecked_signatures():
    """Leaves out the tests' own check of every signature, which users do not have."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("unchecked_signatures")
@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_in_one_line(case):
    call, kind, match = REFUSED[case]
    with refuses(kind, match):
        call()


def test_one_example_input_needs_no_tuple():
    alone, listed = (isthmus.align(models, inputs=inputs) for inputs in (x, (x,)))
    assert alone.symmetry.hash == listed.symmetry.hash == symmetry.hash
    space = symmetry.spaces[0].name
    found, known = isthmus.collect(models, data=data, inputs=x), isthmus.collect(models, symmetry, data)
    assert torch.equal(found[space].between(0, 1), known[space].between(0, 1))
