"""Checkpoints: what goes in comes out bit for bit, and whatever is wrong with a file is one line."""

import collections
import errno
import hashlib
import json
import os
import pickle
import re
import shlex
import stat
import struct
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import isthmus.checkpoint as checkpoint
from isthmus.checkpoint import (
    check_state,
    convert_trusted,
    hash_file,
    hash_state,
    load_module,
    load_state,
    new_folder,
    save_state,
    write_text,
)
from isthmus.checkpoint.names import DTYPES
from isthmus.errors import CheckpointError, InputError, IsthmusError, ModelError

SOURCE = Path(checkpoint.__file__).parents[2]


class Tied(nn.Module):
    """An embedding whose weights are the head's too, and a BatchNorm for its integer buffer."""

    def __init__(self, vocabulary=5, width=3):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.norm(self.embed(tokens)))


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def same(left, right):
    """Equal to the bit, NaN and -0.0 included."""
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and torch.equal(
            left.contiguous().reshape(-1).view(torch.uint8), right.contiguous().reshape(-1).view(torch.uint8)
        )
    )


def same_states(left, right):
    return left.keys() == right.keys() and all(same(left[name], right[name]) for name in left)


def fails(error, match, call, *args, **kwargs):
    """The call fails with one line of a deliberate error that says `match`."""
    with pytest.raises(IsthmusError, match=match) as caught:
        call(*args, **kwargs)
    assert type(caught.value) is error
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.isprintable()
    return message


@st.composite
def states(draw):
    names = draw(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=5, unique=True))
    state = {}
    for name in names:
        dtype = draw(st.sampled_from(list(DTYPES)))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        size = torch.Size(shape).numel() * torch.empty((), dtype=dtype).element_size()
        content = torch.tensor(list(draw(st.binary(min_size=size, max_size=size))), dtype=torch.uint8)
        if dtype is torch.bool:
            content %= 2
        state[name] = content.view(dtype).reshape(shape)
    return state


# ---- laws


@settings(max_examples=60)
@given(state=states())
def test_round_trip_is_bit_equal(state, tmp_path_factory):
    folder = tmp_path_factory.mktemp("round")
    save_state(state, folder / "a.safetensors")
    loaded = load_state(folder / "a.safetensors")
    assert same_states(loaded, state)
    assert hash_state(loaded) == hash_state(state)
    # The bytes depend on the state alone, not on the order of its names.
    save_state(dict(reversed(state.items())), folder / "b.safetensors")
    assert (folder / "a.safetensors").read_bytes() == (folder / "b.safetensors").read_bytes()
    assert same_states(load_file(folder / "a.safetensors"), state)  # any other tool reads it


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scalars_and_empty_tensors(tmp_path, dtype):
    state = {"scalar": torch.ones((), dtype=dtype), "empty": torch.empty((0, 3), dtype=dtype)}
    save_state(state, tmp_path / "a.safetensors")
    assert same_states(load_state(tmp_path / "a.safetensors"), state)


def test_views_are_written_as_what_they_show(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    state = {"t": base.T, "step": base[:, ::2], "row": base[1], "wide": base[:1].expand(5, 4), "real": base}
    state["conj"] = torch.randn(3, dtype=torch.complex64).conj()
    state["parameter"] = nn.Parameter(base + 1)
    before = {name: value.clone() for name, value in state.items()}
    save_state(state, tmp_path / "a.safetensors")
    loaded = load_state(tmp_path / "a.safetensors")
    assert all(torch.equal(loaded[name], before[name]) for name in state)
    assert not any(value.requires_grad for value in loaded.values())
    assert state["parameter"].requires_grad


def test_metadata_and_determinism(tmp_path):
    state, notes = net().state_dict(), {f"key{i}": str(i) for i in range(20)}
    save_state(state, tmp_path / "a.safetensors", notes)
    save_state(state, tmp_path / "b.safetensors", dict(reversed(notes.items())))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", **notes}


def test_metadata_that_happens_to_name_a_tensor_is_only_metadata(tmp_path):
    state = {"pt": torch.ones(2), "mean": torch.ones(3)}
    save_state(state, tmp_path / "a.safetensors", {"average": "mean"})
    assert same_states(load_state(tmp_path / "a.safetensors"), state)


def test_tied_weights_are_written_once_and_come_back_tied(tmp_path):
    model = Tied()
    save_state(model.state_dict(), tmp_path / "a.safetensors")
    written = load_file(tmp_path / "a.safetensors")
    assert "embed.weight" in written  # the first name, as other tools expect it
    assert "head.weight" not in written
    loaded = load_state(tmp_path / "a.safetensors")
    assert same_states(loaded, model.state_dict())
    assert loaded["embed.weight"] is loaded["head.weight"]
    save_state(loaded, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_nothing_changes_its_arguments(tmp_path):
    model = net().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    save_state(net().state_dict(), tmp_path / "a.safetensors")
    loaded = load_module(tmp_path / "a.safetensors", model)
    assert model.training
    assert not any(module.training for module in loaded.modules())
    assert same_states(dict(model.state_dict()), before)
    assert same_states(dict(loaded.state_dict()), load_state(tmp_path / "a.safetensors"))


def test_the_saved_file_may_replace_the_one_its_tensors_come_from(tmp_path):
    path = tmp_path / "a.safetensors"
    save_state({"a": torch.arange(1000.0)}, path)
    state = load_state(path)
    save_state({"a": state["a"], "b": torch.zeros(5)}, path)
    assert torch.equal(load_state(path)["a"], torch.arange(1000.0))
    assert torch.equal(state["a"], torch.arange(1000.0))


def test_hashes(tmp_path):
    state = {"a": torch.randn(3, 4), "b": torch.tensor(1)}
    assert hash_state(state) == hash_state({"b": state["b"], "a": state["a"].T.contiguous().T})
    assert hash_state(state) != hash_state({"a": state["a"].reshape(4, 3), "b": state["b"]})
    assert hash_state(state) != hash_state({"a": state["a"], "b": torch.tensor(1, dtype=torch.int32)})
    assert hash_state(state) != hash_state({"A": state["a"], "b": state["b"]})
    save_state(state, tmp_path / "model.safetensors")
    digest = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert hash_file(tmp_path / "model.safetensors") == hash_file(tmp_path) == digest
    fails(CheckpointError, "does not exist", hash_file, tmp_path / "none")
    fails(CheckpointError, "float8_e8m0fnu", hash_state, {"a": torch.zeros(2).to(torch.float8_e8m0fnu)})


# ---- sharded


@pytest.fixture
def sharded(tmp_path):
    folder = tmp_path / "sharded"
    folder.mkdir()
    save_file({"a": torch.ones(2), "b": torch.zeros(3)}, folder / "model-1.safetensors")
    save_file({"c": torch.arange(4)}, folder / "model-2.safetensors")
    index(folder, {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"})
    return folder


def index(folder, table):
    text = table if isinstance(table, str) else json.dumps({"metadata": {}, "weight_map": table})
    (folder / "model.safetensors.index.json").write_text(text)


def test_sharded(sharded):
    expected = {"a": torch.ones(2), "b": torch.zeros(3), "c": torch.arange(4)}
    assert same_states(load_state(sharded), expected)
    assert same_states(load_state(str(sharded / "model.safetensors.index.json")), expected)
    before = hash_file(sharded)
    assert before == hash_file(sharded / "model.safetensors.index.json")
    save_file({"c": torch.arange(4) + 1}, sharded / "model-2.safetensors")
    assert hash_file(sharded) != before


def test_sharded_in_the_cache_of_hugging_face(sharded, tmp_path):
    """There a snapshot is a folder of links to blobs with other names."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    sharded.rename(blobs)
    for number, file in enumerate(sorted(blobs.iterdir())):
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
        file.rename(blobs / str(number))
    assert load_state(snapshot).keys() == {"a", "b", "c"}
    assert len(hash_file(snapshot)) == 64


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "ABSOLUTE", "link.safetensors", "linked/outside.safetensors"]
)
def test_shards_stay_in_their_folder(sharded, tmp_path, name):
    outside = tmp_path / "outside.safetensors"
    save_file({"a": torch.ones(2)}, outside)
    (sharded / "link.safetensors").symlink_to("../outside.safetensors")
    (sharded / "linked").symlink_to(tmp_path)
    index(sharded, {"a": str(outside) if name == "ABSOLUTE" else name})
    for read in (load_state, hash_file):
        fails(CheckpointError, "outside its folder", read, sharded)


@pytest.mark.parametrize(
    ("table", "match"),
    [
        ({"a": "gone\n.safetensors"}, "is missing"),
        ({"a": "a\0b.safetensors"}, "outside its folder"),
        ({"a": "model-1.safetensors", "new\nline": "model-1.safetensors"}, r"lacks 'new\\nline'"),
        ({"a": "model-1.safetensors", "c": "model-1.safetensors"}, "lacks 'c'"),
        ({"a": "model-1.safetensors", "b": "./model-1.safetensors"}, None),
        ({"a": 3}, "weight_map"),
        ({}, "weight_map"),
        ("[1, 2]", "weight_map"),
        ("3", "weight_map"),
        ('{"weight_map": ["a"]}', "weight_map"),
        ('{"weight_map": {"a": "model-1.safetensors", "a": "model-2.safetensors"}}', "twice"),
        ("", "cannot read"),
        ('{"weight_map": {"a":', "cannot read"),
        ("[" * 100_000, "cannot read"),
        ("\ud800", "cannot read"),
    ],
)
def test_bad_index(sharded, table, match):
    if table == "\ud800":
        (sharded / "model.safetensors.index.json").write_bytes(b"\xff\xfe\xfa")
    else:
        index(sharded, table)
    if match is None:  # two spellings of one shard are the same file
        assert load_state(sharded).keys() == {"a", "b"}
    else:
        fails(CheckpointError, match, load_state, sharded)


def test_one_name_in_two_shards(sharded):
    save_file({"a": torch.ones(2), "c": torch.arange(4)}, sharded / "model-2.safetensors")
    fails(CheckpointError, "'a', as another shard", load_state, sharded)


def test_damaged_shard(sharded):
    (sharded / "model-2.safetensors").write_bytes(b"")
    fails(CheckpointError, "model-2", load_state, sharded)


# ---- safetensors


def raw_safetensors(header, data=b""):
    text = header.encode()
    return struct.pack("<Q", len(text)) + text + data


ONE = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "cannot read"),
        (b"\0" * 7, "cannot read"),
        (struct.pack("<Q", 2**60) + b"{}", "cannot read"),
        (raw_safetensors("[1]"), "cannot read"),
        (raw_safetensors("{" + ONE + "}", b"\0" * 3), "cannot read"),
        (raw_safetensors("{" + ONE + "}", b"\0" * 5), "cannot read"),
        (raw_safetensors("{" + ONE + "," + ONE + "}", b"\0" * 4), "twice"),
        (
            raw_safetensors('{"__metadata__":{"isthmus.tied":"{\\"b\\":\\"c\\"}"},' + ONE + "}", b"\0" * 4),
            "cannot read",
        ),
        (raw_safetensors('{"__metadata__":{"isthmus.tied":"3"},' + ONE + "}", b"\0" * 4), "cannot read"),
        (raw_safetensors('{"\\u001b[31m":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', b"\0" * 8), "cannot read"),
        (raw_safetensors("{}"), "no tensors"),
        (b"PK\3\4 not at all", "cannot read"),
    ],
)
def test_damaged_safetensors(tmp_path, content, match):
    (tmp_path / "a.safetensors").write_bytes(content)
    fails(CheckpointError, match, load_state, tmp_path / "a.safetensors")


@settings(max_examples=60)
@given(data=st.data(), ending=st.sampled_from([".safetensors", ".pt", "legacy.pt"]))
def test_any_damage_is_one_line_or_harmless(data, ending, tmp_path_factory):
    """Truncated or with bytes overwritten: an error of ours, or tensors; never another exception."""
    path = tmp_path_factory.mktemp("damage") / ("a" + ending)
    state = {"weight": torch.arange(6.0), "bias": torch.ones(2)}
    if ending == ".safetensors":
        save_state(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=ending == ".pt")
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
        path.write_bytes(content)
        fails(CheckpointError, "cannot read|can run code", load_state, path)
        return
    place = data.draw(st.integers(0, len(content) - 1))
    junk = data.draw(st.binary(min_size=1, max_size=8))
    content[place : place + len(junk)] = junk
    path.write_bytes(content)
    loaded, message = {}, ""
    try:
        loaded = load_state(path)
    except CheckpointError as error:
        message = str(error)
    assert bool(loaded) != bool(message)
    assert message.isprintable()
    assert all(isinstance(value, torch.Tensor) for value in loaded.values())


def test_wrong_places(tmp_path):
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.pt")
    fails(CheckpointError, "does not exist", load_state, tmp_path / "none\nsuch.pt")
    fails(CheckpointError, "does not exist", load_state, "a\0b.pt")
    fails(CheckpointError, "by its name", load_state, tmp_path / "text.txt")
    fails(CheckpointError, "holds neither model.safetensors nor", load_state, tmp_path / "empty")
    fails(CheckpointError, "no regular file", load_state, tmp_path / "pipe.pt")


# ---- pickles


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("pwned",))


def cyclic():
    content = {"epoch": 3}
    content["model"] = content
    return content


def as_torchscript(path):
    torch.jit.trace(net().eval(), torch.ones(2, 3)).save(path)


def as_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "hello")


def as_pickle(protocol):
    def write(path):
        path.write_bytes(pickle.dumps(net().state_dict(), protocol))

    return write


@pytest.mark.parametrize("ending", [".pt", ".pth", ".bin", ".ckpt"])
@pytest.mark.parametrize("wrap", [
    lambda state: state,
    lambda state: collections.OrderedDict(state),
    lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"lr": 0.1}},
    lambda state: {"model": {"model_state_dict": state}, "best": 0.5},
    lambda state: {"net": {f"module.{name}": value for name, value in state.items()}},
    lambda state: {f"_orig_mod.module.{name}": nn.Parameter(value, False) for name, value in state.items()},
    lambda state: {name: value.clone().requires_grad_(value.is_floating_point()) for name, value in state.items()},
])  # fmt: skip
def test_containers(tmp_path, wrap, ending):
    state = net().state_dict()
    torch.save(wrap(state), tmp_path / f"a{ending}")
    loaded = load_state(tmp_path / f"a{ending}")
    assert same_states(loaded, dict(state))
    assert not any(value.requires_grad for value in loaded.values())


def test_a_prefix_that_some_names_lack_stays(tmp_path):
    state = {"module.a": torch.ones(1), "b": torch.ones(1)}
    torch.save(state, tmp_path / "a.pt")
    assert load_state(tmp_path / "a.pt").keys() == state.keys()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({}, "no tensors"),
        ([torch.ones(1)], "holds a list"),
        (torch.ones(1), "holds a Tensor"),
        ({"a": torch.ones(1), "step\n": 3}, r"'step\\n' is of type int"),
        ({3: torch.ones(1)}, "'3' is of type Tensor"),
        ({"model": {"encoder": {"a": torch.ones(1)}}}, "'encoder' is of type dict"),
        ({"model": {"a": torch.ones(1)}, "net": {"a": torch.ones(1)}}, "several state dicts"),
        (cyclic(), "'epoch' is of type int"),
        ({"a": torch.eye(3).to_sparse()}, "sparse_coo"),
        ({"a": torch.empty(3, device="meta")}, "no data"),
    ],
)
def test_pickles_that_are_no_state_dict(tmp_path, content, match):
    torch.save(content, tmp_path / "a.pt")
    fails(CheckpointError, match, load_state, tmp_path / "a.pt")


@pytest.mark.parametrize(
    "content", [b"", b"hello world, this is text\n", b"<html>", b"PK\3\4", b"\x80\x02", b"\x80\x02}q\0."]
)
def test_files_that_are_no_pickle(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    fails(CheckpointError, "cannot read|can run code", load_state, tmp_path / "a.pt")


@pytest.mark.parametrize("write", [
    lambda path: torch.save({"a": torch.ones(1), "e": Evil()}, path),
    lambda path: torch.save({"a": torch.ones(1), "e": Evil()}, path, _use_new_zipfile_serialization=False),
    lambda path: path.write_bytes(pickle.dumps(Evil(), 2)),
    lambda path: path.write_bytes(pickle.dumps(Evil())),
], ids=["zip", "legacy", "pickle2", "pickle"])  # fmt: skip
def test_code_never_runs(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    write(tmp_path / "a.pt")
    message = fails(CheckpointError, "can run code", load_state, tmp_path / "a.pt")
    assert "convert_trusted" in message
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("write", [
    lambda path: torch.save(net(), path),
    lambda path: torch.save({"model": net(), "args": collections.Counter, "epoch": 3}, path),
    lambda path: torch.save(net().state_dict(), path, pickle_protocol=4),
    as_torchscript, as_pickle(2), as_pickle(5),
], ids=["module", "contained", "protocol4", "torchscript", "pickle2", "pickle5"])  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_refused_files_convert(tmp_path, write):
    path = tmp_path / "a.pt"
    write(path)
    fails(CheckpointError, "convert_trusted", load_state, path)
    convert_trusted(path, tmp_path / "b.safetensors")
    assert load_state(tmp_path / "b.safetensors").keys() == net().state_dict().keys()


def test_the_command_in_the_refusal_works(tmp_path):
    path = tmp_path / 'it\'s "mine" $HOME.pt'
    torch.save(net(), path)
    message = fails(CheckpointError, "convert it: python -c ", load_state, path)
    command = message.split("convert it: ")[1]
    words = shlex.split(command)
    assert words[:2] == ["python", "-c"]
    assert len(words) == 3
    ran = subprocess.run([sys.executable, *words[1:]], env=os.environ | {"PYTHONPATH": str(SOURCE)}, check=False)
    assert ran.returncode == 0
    assert load_state(path.with_suffix(".safetensors")).keys() == net().state_dict().keys()


def test_zip_that_is_no_checkpoint(tmp_path):
    as_zip(tmp_path / "a.pt")
    fails(CheckpointError, "cannot read", load_state, tmp_path / "a.pt")


# ---- fitting


def test_a_state_fits_its_model():
    model = net()
    state = {
        name: value.to(torch.float16) if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }
    fitted = check_state(dict(reversed(state.items())), model, "a")
    assert list(fitted) == list(model.state_dict())
    assert all(fitted[name] is state[name] for name in state)  # nothing is cast; integer buffers stay
    assert fitted["1.num_batches_tracked"].dtype is torch.int64
    with torch.device("meta"):
        assert check_state(state, net(), "a").keys() == state.keys()  # the weights of the model are not needed


@pytest.mark.parametrize("absent", ["head.weight", "embed.weight"])
def test_a_tied_name_is_filled(absent):
    model = Tied()
    state = dict(model.state_dict())
    del state[absent]
    fitted = check_state(state, model, "a")
    assert list(fitted) == list(model.state_dict())
    assert fitted["head.weight"] is fitted["embed.weight"]


def test_a_file_of_another_tool_without_the_tied_name(tmp_path):
    model = Tied()
    state = dict(model.state_dict())
    del state["head.weight"]
    save_file(state, tmp_path / "a.safetensors")
    assert torch.equal(load_module(tmp_path / "a.safetensors", Tied()).head.weight, model.embed.weight)


def test_wrappers_on_either_side():
    plain = net()
    wrapped = nn.Sequential(collections.OrderedDict(module=net()))
    assert check_state(wrapped.state_dict(), plain, "a").keys() == plain.state_dict().keys()
    assert check_state(plain.state_dict(), wrapped, "a").keys() == wrapped.state_dict().keys()


def changed(**changes):
    state = {name.replace(".", "_"): value for name, value in net().state_dict().items()} | changes
    return {name.replace("_", ".", 1): value for name, value in state.items() if value is not None}


BAD = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf])


@pytest.mark.parametrize(
    ("state", "match"),
    [
        (changed(**{"0_weight": None}), "lacks 1 tensors of the model: '0.weight'"),
        (
            changed(**{"0_weight": None, "0_bias": None, "1_weight": None, "1_bias": None}),
            "lacks 4 .*'0.weight', '0.bias', '1.weight' and 1 more",
        ),
        (changed(**{"9_we\nird": torch.ones(1)}), r"holds 1 that the model does not know: '9.we\\nird'"),
        (changed(**{"0_weight": None, "9_weight": torch.ones(1)}), "lacks 1 .* and holds 1 "),
        (changed(**{"0_weight": torch.ones(4, 5)}), r"'0.weight' is \[4, 5\] for the model's \[4, 3\]"),
        (changed(**{"0_bias": BAD}), "3 of 4 values of '0.bias' are NaN or infinite;"),
        (changed(**{"0_bias": BAD, "1_bias": BAD.half()}), r"'0.bias' are NaN or infinite \(and 1 more tensors\)"),
        (changed(**{"0_bias": torch.ones(4, dtype=torch.int8)}), "'0.bias' is integer where the model has float"),
        (changed(**{"0_bias": torch.ones(4, dtype=torch.bool)}), "is integer where"),
        (changed(**{"0_bias": torch.ones(4).to(torch.float8_e4m3fn)}), "is quantised .* where"),
        (changed(**{"0_bias": torch.ones(4, dtype=torch.complex64)}), "is complex where"),
        (changed(**{"1_num_batches_tracked": torch.tensor(1.0)}), "is float where the model has integer"),
        (changed(**{"0_bias": 3}), "'0.bias' holds no tensor"),
        ({}, "another architecture: 0 of the model's 9"),
        ({f"layer{i}.weight": torch.ones(1) for i in range(30)}, "another architecture"),
        ({f"layer{i}.weight": torch.ones(1) for i in range(30)} | {"0.bias": torch.ones(4)}, "lacks 8 .* holds 30"),
    ],
)
def test_a_state_that_does_not_fit(state, match):
    assert fails(ModelError, match, check_state, state, net(), "file\n'a.pt'").startswith("file 'a.pt'")


@pytest.mark.filterwarnings("ignore")
def test_quantised_weights():
    weight = torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)
    fails(ModelError, "quantised", check_state, changed(**{"0_bias": weight}), net(), "a")


def test_tied_names_must_agree():
    model = Tied()
    state = dict(model.state_dict())
    state["head.weight"] = state["head.weight"].clone()
    assert check_state(state, model, "a").keys() == state.keys()
    state["head.weight"] += 1
    fails(ModelError, "'embed.weight' and 'head.weight' differ", check_state, state, model, "a")


class Extra(nn.Linear):
    def get_extra_state(self):
        return {"version": 3}

    def set_extra_state(self, state):
        pass


class Picky(nn.Linear):
    def _load_from_state_dict(self, *args):
        args[-1].append("I do not\nlike it")


def test_models_that_take_no_state(tmp_path):
    save_state(nn.Linear(2, 2).state_dict(), tmp_path / "a.safetensors")
    fails(ModelError, "_extra_state", load_module, tmp_path / "a.safetensors", Extra(2, 2))
    fails(
        ModelError,
        "'weight', 'bias' no tensor of known shape",
        load_module,
        tmp_path / "a.safetensors",
        nn.LazyLinear(2),
    )
    fails(ModelError, "do not like", load_module, tmp_path / "a.safetensors", Picky(2, 2))
    fails(ModelError, "meta", load_module, tmp_path / "a.safetensors", nn.Linear(2, 2, device="meta"))


# ---- writing


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_umask_decides_the_mode(tmp_path, mask):
    old = os.umask(mask)
    try:
        save_state({"a": torch.ones(1)}, tmp_path / "new" / "folder" / "a.safetensors")
        write_text(tmp_path / "a.txt", "é\n")
        with new_folder(tmp_path / "run") as folder:
            pass
    finally:
        os.umask(old)
    assert not folder.exists()
    assert stat.S_IMODE((tmp_path / "new" / "folder" / "a.safetensors").stat().st_mode) == 0o666 & ~mask
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o666 & ~mask
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o777 & ~mask
    assert (tmp_path / "a.txt").read_bytes() == "é\n".encode()


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    write_text(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"


@pytest.mark.parametrize(
    ("error", "state", "metadata", "match"),
    [
        (CheckpointError, {}, None, "no tensors"),
        (CheckpointError, {"__metadata__": torch.ones(1)}, None, "__metadata__"),
        (CheckpointError, {"a": torch.empty(2, device="meta")}, None, "no data"),
        (CheckpointError, {"a": torch.eye(2).to_sparse()}, None, "sparse"),
        (CheckpointError, {"a": torch.ones(2, dtype=torch.complex128)}, None, "complex128"),
        (InputError, {"a": torch.ones(2)}, {"a": 3}, "not text"),
    ],
)
def test_what_cannot_be_stored(tmp_path, error, state, metadata, match, monkeypatch):
    # Beartype would refuse the wrong metadata before we do; users run without it.
    save = getattr(save_state, "__wrapped__", save_state)
    fails(error, match, save, state, tmp_path / "a.safetensors", metadata)
    assert list(tmp_path.iterdir()) == []


def test_where_no_file_can_be(tmp_path):
    state = {"a": torch.ones(1)}
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.safetensors").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    fails(InputError, "ends in .safetensors", save_state, state, tmp_path / "a.pt")
    fails(CheckpointError, "Not a directory|File exists", save_state, state, tmp_path / "file" / "a.safetensors")
    fails(CheckpointError, "no regular file", save_state, state, tmp_path / "folder.safetensors")
    fails(CheckpointError, "no regular file", save_state, state, tmp_path / "pipe.safetensors")
    fails(CheckpointError, "no regular file", write_text, "/dev/null", "")
    fails(CheckpointError, "File name too long", write_text, tmp_path / ("a" * 300), "")
    assert len(list(tmp_path.iterdir())) == 3


def raising(error):
    def call(*args, **kwargs):
        raise error

    return call


FULL = OSError(errno.ENOSPC, "No space left\non device")


@pytest.mark.parametrize("place", ["_bytes", "os.fsync", "os.replace"])
@pytest.mark.parametrize(("error", "seen"), [(FULL, CheckpointError), (KeyboardInterrupt(), KeyboardInterrupt)])
def test_interrupted_writes_leave_the_old_file(tmp_path, monkeypatch, place, error, seen):
    path = tmp_path / "a.safetensors"
    save_state({"a": torch.zeros(100)}, path)
    before = path.read_bytes()
    monkeypatch.setattr(f"isthmus.checkpoint.writing.{place}", raising(error))
    with pytest.raises(seen) as caught:
        save_state({"a": torch.ones(100), "b": torch.ones(9)}, path)
    monkeypatch.undo()
    if seen is CheckpointError:
        assert "No space left on device" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_synced_before_and_after_the_rename(tmp_path, monkeypatch):
    """Else a power cut could leave the name on a file whose content never reached the disk."""
    events = []
    fsync, replace = os.fsync, os.replace

    def recorded(descriptor):
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else os.fstat(descriptor).st_size)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    monkeypatch.setattr(os, "replace", lambda *names: (events.append("rename"), replace(*names)))
    write_text(tmp_path / "a.txt", "hello")
    assert events == [5, "rename", "folder"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_is_full_when_the_buffer_is_flushed(tmp_path, monkeypatch):
    opened = open
    monkeypatch.setattr(
        "builtins.open", lambda path, mode="r": opened("/dev/full", "wb") if mode == "xb" else opened(path, mode)
    )
    fails(CheckpointError, "No space left", write_text, tmp_path / "a.txt", "hello")
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, shutil, signal, sys
import torch
from pathlib import Path
from isthmus import checkpoint

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def after(real):
    def call(*args, **kwargs):
        real(*args, **kwargs)
        die()
    return call

def interrupt(value):
    os.kill(os.getpid(), signal.SIGINT)
    return memoryview(b"")

new = {"a": torch.ones(100_000), "b": torch.ones(9)}
def run(folder):
    with checkpoint.new_folder(folder / "run", force=True) as inside:
        checkpoint.write_text(inside / "report.json", "new")

def half(value):
    die.__globals__["count"] = count = globals().get("count", 0) + 1
    return die() if count > 1 else memoryview(b"x" * 400_000)

cases = {
    "half": (lambda f: checkpoint.save_state(new, f / "a.safetensors"), "checkpoint.writing._bytes", half),
    "ctrl-c": (lambda f: checkpoint.save_state(new, f / "a.safetensors"), "checkpoint.writing._bytes", interrupt),
    "fsync": (lambda f: checkpoint.save_state(new, f / "a.safetensors"), "os.fsync", die),
    "replace": (lambda f: checkpoint.save_state(new, f / "a.safetensors"), "os.replace", die),
    "replaced": (lambda f: checkpoint.save_state(new, f / "a.safetensors"), "os.replace", after(os.replace)),
    "body": (run, "checkpoint.write_text", die),
    "rename": (run, "os.rename", die),
    "renamed": (run, "os.rename", after(os.rename)),
    "removing": (run, "shutil.rmtree", die),
}
for name, (save, place, patch) in cases.items():
    folder = Path(sys.argv[1], name)
    folder.mkdir()
    checkpoint.save_state({"a": torch.zeros(100_000)}, folder / "a.safetensors")
    (folder / "run").mkdir()
    (folder / "run" / "report.json").write_text("old")
    child = os.fork()
    if child == 0:
        owner, _, attribute = place.rpartition(".")
        setattr(eval(owner), attribute, patch)
        save(folder)
        os._exit(1)
    ended_by = signal.SIGINT if name == "ctrl-c" else signal.SIGKILL
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -ended_by, name
"""


def test_killed_or_interrupted_leaves_the_old_or_the_new(tmp_path):
    """Real signals. One process forks a child for each moment, so that torch is imported once."""
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    ran = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    for case in ("half", "ctrl-c", "fsync", "replace", "replaced"):
        state = load_state(tmp_path / case / "a.safetensors")
        assert state["a"].unique().tolist() == [float(case == "replaced")]
        strays = [file.name for file in (tmp_path / case).iterdir() if file.name not in ("a.safetensors", "run")]
        assert len(strays) == (case not in ("replaced", "ctrl-c"))
        assert all(re.fullmatch(r"\.a\.safetensors\.[0-9a-f]{8}\.tmp", name) for name in strays)
    for case, expected in {"body": "old", "rename": "old", "removing": "new"}.items():
        assert (tmp_path / case / "run" / "report.json").read_text() == expected
    # Between the two renames nothing has the name, but both folders are whole.
    (old,) = (tmp_path / "renamed").glob(".run.*.old/report.json")
    (new,) = (tmp_path / "renamed").glob(".run.*.tmp/report.json")
    assert (old.read_text(), new.read_text()) == ("old", "new")


# ---- run folders


def fill(folder, text="new"):
    write_text(folder / "recipe.yaml", text)
    (folder / "sub").mkdir()
    (folder / "sub" / "plot.svg").write_text(text)


def strays(folder):
    return [file.name for file in folder.iterdir() if file.name.startswith(".")]


@pytest.mark.parametrize("existing", [None, "empty"])
@pytest.mark.parametrize("force", [False, True])
def test_a_new_folder_appears_as_a_whole(tmp_path, existing, force):
    target = tmp_path / "runs" / "a"
    if existing:
        target.mkdir(parents=True)
    with new_folder(target, force) as folder:
        assert folder.parent == target.parent
        assert list(folder.iterdir()) == []
        fill(folder)
        assert not target.exists() or list(target.iterdir()) == []
    assert (target / "sub" / "plot.svg").read_text() == "new"
    assert strays(target.parent) == []


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), CheckpointError("x"), FULL])
@pytest.mark.parametrize("existing", [False, True])
def test_an_error_leaves_the_target_untouched(tmp_path, error, existing):
    target = tmp_path / "a"
    if existing:
        target.mkdir()
        fill(target, "old")

    def work():
        with new_folder(target, force=True) as folder:
            fill(folder)
            raise error

    with pytest.raises(type(error)) as caught:
        work()
    assert caught.value is error
    assert target.exists() == existing
    if existing:
        assert (target / "sub" / "plot.svg").read_text() == "old"
    assert strays(tmp_path) == []


def enter(path, force=False):
    with new_folder(path, force):
        raise AssertionError("work was begun")


def test_what_exists_needs_force(tmp_path):
    (tmp_path / "run").mkdir()
    fill(tmp_path / "run", "old")
    (tmp_path / "file").write_text("old")
    fails(CheckpointError, "exists; choose another -o or pass --force", enter, tmp_path / "run")
    fails(CheckpointError, "exists; choose another -o or pass --force", enter, tmp_path / "file")
    for name in ("run", "file"):
        with new_folder(tmp_path / name, force=True) as folder:
            (folder / "report.json").write_text("{}")
        assert [file.name for file in (tmp_path / name).iterdir()] == ["report.json"]
    assert strays(tmp_path) == []


def test_force_never_deletes_what_is_not_ours(tmp_path, monkeypatch):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("")
    (tmp_path / "link").symlink_to("precious")
    (precious / "report.json").mkdir()  # a folder of that name proves nothing
    os.mkfifo(tmp_path / "pipe")
    for name in ("precious", "link", "pipe"):
        fails(CheckpointError, "no run folder", enter, tmp_path / name, force=True)
    fails(CheckpointError, "no run folder", enter, "/dev/null", force=True)
    fails(CheckpointError, "as a whole", enter, "/", force=True)
    # Where a recipe lies beside other work, `-o .` and `-o ~` would delete that work.
    (precious / "recipe.yaml").write_text("")
    (precious / "below").mkdir()
    monkeypatch.chdir(precious / "below")
    for path in ("..", ".", tmp_path):
        fails(CheckpointError, "as a whole", enter, path, force=True)
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", str(precious))
    fails(CheckpointError, "as a whole", enter, precious, force=True)
    monkeypatch.setattr("os.path.ismount", lambda path: True)  # it could not be renamed when the work is done
    fails(CheckpointError, "as a whole", enter, tmp_path / "volume")
    assert (precious / "thesis.tex").exists()


def test_where_no_folder_can_be(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    fails(CheckpointError, "Not a directory|File exists", enter, tmp_path / "file" / "run")
    fails(CheckpointError, "File name too long", enter, tmp_path / ("a" * 300))
    fails(CheckpointError, "cannot create", enter, "/proc/none/run")
    denied = PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(Path, "mkdir", raising(denied))  # root may write anywhere
    fails(CheckpointError, "Permission denied", enter, tmp_path / "run")


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()])
def test_a_failed_swap_restores_the_old_run(tmp_path, monkeypatch, error):
    target = tmp_path / "a"
    target.mkdir()
    fill(target, "old")
    rename, calls = os.rename, []

    def second_fails(source, destination):
        calls.append(source)
        if len(calls) == 2:
            raise error
        rename(source, destination)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises((CheckpointError, KeyboardInterrupt)), new_folder(target, force=True) as folder:
        fill(folder)
    assert (target / "sub" / "plot.svg").read_text() == "old"
    assert strays(tmp_path) == []


def test_interrupted_after_the_swap_the_new_run_stays(tmp_path, monkeypatch):
    target = tmp_path / "a"
    target.mkdir()
    fill(target, "old")
    rename, calls = os.rename, []

    def interrupted(source, destination):
        rename(source, destination)
        calls.append(source)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), new_folder(target, force=True) as folder:
        fill(folder)
    assert (target / "sub" / "plot.svg").read_text() == "new"
    assert strays(tmp_path) == []


def test_a_target_that_appears_meanwhile_is_not_overwritten(tmp_path):
    target = tmp_path / "a"

    def race():
        with new_folder(target) as folder:
            fill(folder)
            target.mkdir()
            (target / "theirs").write_text("")

    fails(CheckpointError, "exists|not empty", race)
    assert [file.name for file in target.iterdir()] == ["theirs"]
    assert strays(tmp_path) == []


def test_writers_at_the_same_time(tmp_path):
    """Each writes whole files; the last one stays."""
    path = tmp_path / "a.safetensors"
    work = [threading.Thread(target=save_state, args=({"a": torch.full((10_000,), float(i))}, path)) for i in range(8)]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert len(load_state(path)["a"].unique()) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
