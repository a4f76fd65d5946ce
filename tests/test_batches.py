import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from helpers.refusals import refuses
from isthmus.data import check_data, read_batches
from isthmus.data.batches import as_batch, first_batch, is_labelled
from isthmus.errors import DataError

X, Y = torch.randn(6, 3), torch.arange(6)


class Samples(Dataset):
    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        if index >= len(X):
            raise IndexError
        return X[index], Y[index]


class Rereadable:
    """Neither a list nor a DataLoader, but every iteration starts anew."""

    def __iter__(self):
        return iter([(X[:4], Y[:4]), (X[4:], Y[4:])])


FORMS = {
    "list of pairs": [(X[:4], Y[:4]), (X[4:], Y[4:])],
    "tuple of lists": ([X[:4], Y[:4]], [X[4:], Y[4:]]),
    "loader": DataLoader(TensorDataset(X, Y), batch_size=4),
    "dataset": TensorDataset(X, Y),
    "own dataset": Samples(),
    "re-iterable": Rereadable(),
    "dicts": [{"x": X[:4], "labels": Y[:4]}, {"x": X[4:], "labels": Y[4:]}],
    "pairs of a dict and targets": [({"x": X[:4]}, Y[:4]), ({"x": X[4:]}, Y[4:])],
    "pairs of several inputs and targets": [((X[:4],), Y[:4]), ([X[4:]], Y[4:])],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_inputs_and_targets_again_and_again(form):
    for _ in range(2):
        batches = list(read_batches(FORMS[form]))
        inputs = torch.cat([next(iter([*batch.args, *batch.kwargs.values()])) for batch in batches])
        assert torch.equal(inputs, X)
        assert torch.equal(torch.cat([batch.targets for batch in batches]), Y)
        assert sum(batch.size for batch in batches) == 6
    assert is_labelled(FORMS[form])


@pytest.mark.parametrize(
    "data",
    [[X], [(X,)], [[X]], [(X, None)], [{"x": X}], TensorDataset(X)],
    ids=["x", "(x)", "[x]", "x none", "dict", "set"],
)
def test_targets_may_be_absent(data):
    assert first_batch(data).targets is None
    assert not is_labelled(data)


@pytest.mark.parametrize("key", ["labels", "label", "targets"])
def test_a_dicts_targets_are_no_inputs(key):
    item = {"x": X, key: Y}
    batch = as_batch(item)
    assert list(batch.kwargs) == ["x"]
    assert torch.equal(batch.targets, Y)
    assert set(item) == {"x", key}


def test_positional_and_named_inputs_keep_their_places():
    batch = as_batch(((X, Y), None))
    assert [x is y for x, y in zip(batch.args, (X, Y), strict=True)] == [True, True]
    assert as_batch({"b": X, "a": Y}).kwargs.keys() == {"a", "b"}


def test_floats_take_the_models_precision_and_integers_keep_theirs():
    batch = as_batch({"x": X, "ids": Y, "flag": True, "labels": Y}).to(torch.device("cpu"), torch.float16)
    assert batch.kwargs["x"].dtype == torch.float16
    assert batch.kwargs["ids"].dtype == Y.dtype
    assert batch.kwargs["flag"] is True
    assert torch.equal(batch.targets, Y)


def test_a_clone_may_be_overwritten():
    before = X.clone()
    as_batch(X).clone().args[0].zero_()
    assert torch.equal(X, before)


def test_the_head_is_the_first_samples():
    assert torch.equal(as_batch((X, Y)).head(2).args[0], X[:2])


REFUSED = {
    "nothing": (None, "no data given"),
    "a tensor": (X, "is a Tensor"),
    "a name": ("digits", "is a str"),
    "a number": (3, "cannot be iterated"),
    "a generator": (((X, Y) for _ in range(2)), "only once"),
    "an iterator": (iter([(X, Y)]), "only once"),
    "a zip": (zip([X], [Y], strict=True), "only once"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_data_is_refused(what):
    data, told = REFUSED[what]
    with refuses(DataError, told):
        check_data(data)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ([], "data is empty"),
        (DataLoader(TensorDataset(X[:0], Y[:0])), "data is empty"),
        ([(X[:0], Y[:0])], "empty batch"),
        ([(X, Y, Y)], "unknown form"),
        ([3], "unknown form"),
        ([("x", "y")], "unknown form"),
        ([{}], "empty batch"),
    ],
    ids=["no batches", "empty loader", "empty batch", "three parts", "a number", "words", "an empty dict"],
)
def test_batches_that_cannot_be_used_are_refused(data, told):
    with refuses(DataError, told):
        list(read_batches(data))
