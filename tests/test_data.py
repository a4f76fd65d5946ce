import gzip
import io
import os
import struct
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.data import Batches, DataSet, load_data, split_for_models
from isthmus.data.load import CLASSES, NAMES, STATISTICS
from isthmus.data.sets import KEYS, stratified_order
from isthmus.errors import DataError, InputError


@pytest.fixture(scope="module")
def digits() -> DataSet:
    return load_data("digits")


def arrays(samples: int = 12, classes: int = 3, shape: tuple[int, ...] = (6, 5, 3)) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made: dict[str, np.ndarray] = {}
    for part in ("train", "test"):
        made[f"x_{part}"] = rng.integers(0, 256, (samples, *shape), dtype=np.uint8)
        made[f"y_{part}"] = (np.arange(samples) % classes).astype(np.uint8)
    return made


def read(batches: Batches) -> tuple[torch.Tensor, torch.Tensor]:
    xs, ys = zip(*batches, strict=True)
    return torch.cat(xs), torch.cat(ys)


def one_line(caught: pytest.ExceptionInfo[Exception]) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


# Batches


@given(
    samples=st.integers(1, 40), size=st.integers(1, 45), seed=st.none() | st.integers(0, 9), count=st.integers(1, 50)
)
@settings(max_examples=60)
def test_batches_are_a_permutation_read_again_in_the_same_order(samples, size, seed, count):
    x, y = torch.arange(samples)[:, None], torch.arange(samples)
    batches = Batches(x, y, size, seed=seed)
    first, labels = read(batches)
    assert torch.equal(labels.sort().values, y)
    assert torch.equal(first[:, 0], labels)
    assert torch.equal(read(batches)[1], labels)
    assert torch.equal(read(Batches(x, y, size, seed=seed))[1], labels)
    assert len(batches) == len(list(batches))
    assert all(len(label) == size for _, label in list(batches)[:-1])
    assert torch.equal(read(batches.take(count))[1], labels[:count])
    if seed is None:
        assert torch.equal(labels, y)


def test_a_seed_shuffles(digits):
    orders = [Batches(digits.x_train, digits.y_train, 100, seed=seed).indices for seed in (None, 0, 1)]
    assert not any(torch.equal(a, b) for a, b in ((orders[0], orders[1]), (orders[1], orders[2])))


def test_pixels_are_normalised_per_channel():
    x = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    seen, labels = read(Batches(x, torch.zeros(5, dtype=torch.uint8), 2, mean=mean, std=std))
    assert seen.dtype == torch.float32
    assert labels.dtype == torch.int64
    for channel in range(3):
        expected = (x[:, channel].double() / 255 - mean[channel]) / std[channel]
        torch.testing.assert_close(seen[:, channel].double(), expected, rtol=1.3e-6, atol=1e-5)  # float32's defaults


def test_batches_refuse_what_they_cannot_read():
    x, y = torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(DataError, match="is empty"):
        Batches(x[:0], y[:0], 2)
    with pytest.raises(DataError, match="is empty"):
        Batches(x, y, 2).take(0)
    with pytest.raises(DataError, match="3 samples and y has 2 labels"):
        Batches(x, y[:2], 2)
    with pytest.raises(InputError, match="batch_size is 0"):
        Batches(x, y, 0)


# The parts of a data set


def test_digits_are_complete_fixed_and_stratified(digits):
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    assert digits.x_train.shape == (1437, 1, 8, 8)
    assert digits.x_test.shape == (360, 1, 8, 8)
    assert digits.sample_shape == (1, 8, 8)
    assert digits.x_train.dtype == torch.uint8
    both = torch.cat([digits.x_train, digits.x_test]).flatten(1).numpy()
    original = np.rint(pixels * 255 / 16).astype(np.uint8)
    assert sorted(map(bytes, both)) == sorted(map(bytes, original))
    # In every class within one image of its share.
    share = np.bincount(labels) * 360 / 1797
    assert np.abs(digits.y_test.bincount().numpy() - share).max() <= 1
    again = load_data("digits")
    assert torch.equal(again.x_test, digits.x_test)
    x, _ = read(digits.train())
    assert abs(x.mean().item()) < 1e-4
    assert abs(x.std().item() - 1) < 1e-3  # correction n-1 against n, over 91,968 pixels


@pytest.mark.parametrize("holdout", [0, 1, 100, 700, 1436])
def test_train_and_validation_share_nothing_and_are_all(digits, holdout):
    kept = digits.train(holdout=holdout).indices
    held = digits.validation(holdout=holdout).indices if holdout else torch.empty(0, dtype=torch.int64)
    assert len(held) == holdout
    assert torch.equal(torch.cat([kept, held]).sort().values, torch.arange(1437))


def test_validation_is_stratified_nested_and_of_the_training_part(digits):
    small, large = (set(digits.validation(holdout=holdout).indices.tolist()) for holdout in (100, 300))
    assert small < large
    labels = read(digits.validation(holdout=300))[1]
    assert (labels.bincount() - digits.y_train.bincount() * 300 / 1437).abs().max() <= 1
    x, y = read(digits.validation(holdout=100))
    indices = torch.tensor(sorted(small))
    expected = Batches(digits.x_train[indices], digits.y_train[indices], 100, mean=digits.mean, std=digits.std)
    assert torch.equal(x, read(expected)[0])
    assert torch.equal(y, digits.y_train[indices])


def test_chosen_indices_lose_only_what_is_held_out(digits):
    chosen = torch.arange(400).flip(0)
    held = digits.validation(holdout=200).indices
    left = digits.train(holdout=200, indices=chosen).indices
    assert torch.equal(left, chosen[~torch.isin(chosen, held)])


def test_parts_refuse_impossible_sizes(digits):
    for holdout in (-1, 1438):
        with pytest.raises(InputError, match="holdout"):
            digits.train(holdout=holdout)
    with pytest.raises(DataError, match="empty"):
        digits.validation(holdout=0)
    with pytest.raises(DataError, match="empty"):
        digits.train(holdout=1437)
    for wrong in (-1, 1437):
        with pytest.raises(DataError, match="outside of the 1437"):
            digits.train(indices=torch.tensor([0, wrong]))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60))
@settings(max_examples=60)
def test_every_stretch_of_the_stratified_order_is_in_proportion(labels):
    y = torch.tensor(labels)
    order = stratified_order(y)
    assert torch.equal(order.sort().values, torch.arange(len(y)))
    sizes = y.bincount(minlength=5).double()
    for length in range(len(y) + 1):
        # Sample i of a class of n stands at (i + ½)/n: a prefix is within one sample of each class's share, up to the
        # rounding of the prefix itself.
        counts = y[order[:length]].bincount(minlength=5)
        assert (counts - sizes * length / len(y)).abs().max() <= 3


# Splits between models


@given(
    kind=st.sampled_from(["none", "80-20", "dirichlet", "classes"]), models=st.integers(1, 4), seed=st.integers(0, 50)
)
@settings(max_examples=60)
def test_a_split_hands_out_every_sample_once_and_again_the_same(kind, models, seed):
    y = torch.arange(200) % 8
    if kind == "80-20" and models != 2:
        with pytest.raises(InputError, match="for 2 models"):
            split_for_models(y, kind, models=models, seed=seed)
        return
    parts = split_for_models(y, kind, models=models, seed=seed)
    assert len(parts) == models
    copies = models if kind == "none" else 1
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(200).repeat_interleave(copies))
    again = split_for_models(y, kind, models=models, seed=seed)
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))


def test_80_20_gives_each_model_a_fifth_of_one_half_of_the_classes():
    y = torch.arange(1000) % 10
    first, second = (y[part].bincount() for part in split_for_models(y, "80-20"))
    assert first.tolist() == [20] * 5 + [80] * 5
    assert second.tolist() == [80] * 5 + [20] * 5


def test_classes_are_disjoint():
    y = torch.arange(100) % 10
    seen = [set(y[part].tolist()) for part in split_for_models(y, "classes", models=3)]
    assert sorted(map(len, seen)) == [3, 3, 4]
    assert len(set.union(*seen)) == 10


def test_splits_depend_on_the_seed():
    y = torch.arange(400) % 10
    for kind in ("80-20", "dirichlet", "classes"):
        a, b = (split_for_models(y, kind, seed=seed)[0] for seed in (0, 1))
        assert not torch.equal(a, b)


def test_dirichlet_shares_have_the_variance_of_concentration_a_half():
    y = torch.arange(200_000) % 400
    shares = y[split_for_models(y, "dirichlet", seed=0)[0]].bincount(minlength=400).double() / 500
    # Of two models the share is Beta(½, ½): mean ½, variance ⅛, fourth central moment 3/128. Five standard errors.
    assert abs(shares.mean() - 0.5) < 5 * (1 / 8 / 400) ** 0.5
    assert abs(shares.var() - 1 / 8) < 5 * ((3 / 128 - 1 / 64) / 400) ** 0.5


def test_a_split_refuses_a_model_without_samples():
    y = torch.arange(10) % 2
    with pytest.raises(DataError, match="leaves model 2 without any"):
        split_for_models(y, "classes", models=3)
    with pytest.raises(DataError, match="no samples"):
        split_for_models(y[:0], "none")
    with pytest.raises(InputError, match="models is 0"):
        split_for_models(y, "none", models=0)


# Files


def test_a_plain_file_becomes_channels_first(tmp_path):
    made = arrays()
    np.savez(tmp_path / "mine.npz", **made)
    data = load_data(tmp_path / "mine.npz")
    assert data.sample_shape == (3, 6, 5)
    assert data.classes == 3
    assert np.array_equal(data.x_test.permute(0, 2, 3, 1).numpy(), made["x_test"])
    pixels = made["x_train"] / 255
    np.testing.assert_allclose(data.mean, pixels.mean((0, 1, 2)))
    np.testing.assert_allclose(data.std, pixels.std((0, 1, 2)))


def test_grey_images_floats_and_features_are_read(tmp_path):
    grey = arrays(shape=(6, 5))
    np.savez(tmp_path / "grey.npz", **grey)
    assert load_data(tmp_path / "grey.npz").sample_shape == (1, 6, 5)
    features = {key: value.astype(np.float64) if key[0] == "x" else value for key, value in arrays(shape=(4,)).items()}
    features["x_train"][:, 2] = 7  # constant: its deviation is zero
    np.savez(tmp_path / "features.npz", **features)
    data = load_data(tmp_path / "features.npz")
    x, _ = read(data.train())
    assert data.x_train.dtype == torch.float32
    torch.testing.assert_close(x.mean(0), torch.zeros(4), rtol=0, atol=1e-6)
    torch.testing.assert_close(x.std(0, correction=0), torch.tensor([1.0, 1.0, 0.0, 1.0]))


def test_a_named_set_is_found_in_the_folder_and_normalised_as_published(tmp_path, monkeypatch):
    np.savez(tmp_path / "cifar10.npz", **arrays(shape=(32, 32, 3)))
    data = load_data("cifar10", tmp_path)
    assert (data.classes, data.mean, data.std) == (10, *STATISTICS["cifar10"])
    monkeypatch.setenv("ISTHMUS_DATA", str(tmp_path))
    assert torch.equal(load_data("cifar10").x_train, data.x_train)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x_train": np.zeros((0, 4, 4), np.uint8)}, "not empty"),
        ({"x_train": np.zeros(12, np.uint8)}, "it must be [n, height, width]"),
        ({"x_train": np.zeros((12, 3, 32, 32), np.uint8)}, "channels must come last"),
        ({"x_train": np.full((12, 6, 5, 3), np.nan)}, "NaN or infinite"),
        ({"x_train": np.full((12, 6, 5, 3), np.inf)}, "NaN or infinite"),
        ({"x_train": np.zeros((12, 6, 5, 3), np.int64)}, "uint8 pixels or floats"),
        ({"x_train": np.zeros((12, 6, 6, 3), np.uint8)}, "one type and shape"),
        ({"x_train": np.zeros((12, 6, 5, 3), np.float32)}, "one type and shape"),
        ({"x_train": np.zeros((11, 6, 5, 3), np.uint8)}, "11 samples and y_train has 12 labels"),
        ({"y_train": np.zeros(12)}, "integer labels"),
        ({"y_train": np.zeros((12, 1), np.uint8)}, "integer labels"),
        ({"y_test": np.full(12, -1)}, "the label -1"),
        ({"x_train": np.array([{}] * 12, dtype=object)}, "cannot be read as plain numpy arrays"),
    ],
)
def test_wrong_arrays_get_one_line(change, says, tmp_path):
    np.savez(tmp_path / "mine.npz", **(arrays() | change))
    with pytest.raises(DataError) as caught:
        load_data(tmp_path / "mine.npz")
    assert says in one_line(caught)


def test_a_label_beyond_the_named_classes_is_refused(tmp_path):
    np.savez(tmp_path / "mnist.npz", **(arrays(shape=(28, 28)) | {"y_test": np.full(12, 10)}))
    with pytest.raises(DataError, match="the label 10; labels run from 0 to 9"):
        load_data("mnist", tmp_path)


def test_unreadable_and_foreign_files_get_one_line(tmp_path):
    file = tmp_path / "mine.npz"
    np.savez(file, **arrays())
    whole = file.read_bytes()
    for content in (b"", b"PK\x03\x04", whole[: len(whole) // 2], b"not a zip"):
        file.write_bytes(content)
        with pytest.raises(DataError) as caught:
            load_data(file)
        assert str(file) in one_line(caught)
    broken = bytearray(whole)
    broken[200:260] = bytes(60)
    file.write_bytes(broken)
    with pytest.raises(DataError):
        load_data(file)
    np.savez(file, n=3, data=np.zeros(4))
    with pytest.raises(DataError) as caught:
        load_data(file)
    assert "load_data.py FOLDER" in one_line(caught)
    with pytest.raises(DataError, match="no file"):
        load_data(tmp_path / "absent.npz")
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        load_data(tmp_path / "folder.npz")
    with file.open("wb") as target:
        np.save(target, np.zeros(3))
    with pytest.raises(DataError, match="a single array"):
        load_data(file)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "digits"])
def test_a_missing_set_says_what_was_looked_for(name, tmp_path, monkeypatch):
    with pytest.raises(DataError) as caught:
        load_data(name, tmp_path)
    assert str(tmp_path / name) in one_line(caught)
    monkeypatch.delenv("ISTHMUS_DATA", raising=False)
    with pytest.raises(DataError) as caught:
        load_data(name)
    assert "ISTHMUS_DATA" in one_line(caught)


def test_an_unknown_name_gets_a_suggestion():
    with pytest.raises(DataError, match="did you mean 'cifar10'"):
        load_data("CIFAR-10")
    with pytest.raises(DataError, match=r"or a FILE\.npz"):
        load_data("some/file.npy")


def idx(array: np.ndarray) -> bytes:
    return gzip.compress(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes())


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_official_idx_files_are_read(name, tmp_path):
    made = arrays(shape=(28, 28))
    folder = tmp_path / name
    folder.mkdir()
    stems = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    files = {key: folder / f"{stem}-ubyte.gz" for key, stem in zip(KEYS, stems, strict=True)}
    for key, file in files.items():
        file.write_bytes(idx(made[key]))
    data = load_data(name, tmp_path)
    assert np.array_equal(data.x_train[:, 0].numpy(), made["x_train"])
    assert np.array_equal(data.y_test.numpy(), made["y_test"])
    assert data.mean == STATISTICS[name][0]
    whole = files["x_test"].read_bytes()
    for content in (whole[:-30], b"", gzip.compress(b"\0\0\x0d\x03"), idx(made["x_test"])[:20], whole[:10] + b"0" * 99):
        files["x_test"].write_bytes(content)
        with pytest.raises(DataError) as caught:
            load_data(name, tmp_path)
        assert "get the official archive again" in one_line(caught)
    plain = gzip.decompress(whole)
    for content in (plain[:-1], plain + b"0"):
        files["x_test"].write_bytes(gzip.compress(content))
        with pytest.raises(DataError, match="bytes that its header states"):
            load_data(name, tmp_path)


def cifar(path, name: str, made: dict[str, np.ndarray], leave_out: str = "") -> None:
    def rows(part: str) -> bytes:
        x = made[f"x_{part}"].transpose(0, 3, 1, 2).reshape(len(made[f"x_{part}"]), -1)
        y = made[f"y_{part}"][:, None]
        return np.concatenate(([y] if name == "cifar10" else [99 - y, y]) + [x], axis=1).tobytes()

    if name == "cifar10":
        train = rows("train")
        step = len(train) // 6  # batches of two images, the last of four
        files = {f"data_batch_{i + 1}.bin": train[i * step : (i + 1) * step if i < 4 else None] for i in range(5)}
        files["test_batch.bin"] = rows("test")
    else:
        files = {"train.bin": rows("train"), "test.bin": rows("test")}
    with tarfile.open(path, "w:gz") as archive:
        for file in reversed(files):
            if file != leave_out:
                member = tarfile.TarInfo(f"{name}-bin/{file}")
                member.size = len(files[file])
                archive.addfile(member, io.BytesIO(files[file]))


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_official_binary_archives_are_read(name, tmp_path):
    made = arrays(shape=(32, 32, 3))
    archive = tmp_path / f"{name.replace('cifar', 'cifar-')}-binary.tar.gz"
    cifar(archive, name, made)
    data = load_data(name, tmp_path)
    assert np.array_equal(data.x_train.permute(0, 2, 3, 1).numpy(), made["x_train"])
    assert np.array_equal(data.y_train.numpy(), made["y_train"])
    assert np.array_equal(data.y_test.numpy(), made["y_test"])
    assert data.classes == CLASSES[name]
    cifar(archive, name, made, leave_out="test_batch.bin" if name == "cifar10" else "test.bin")
    with pytest.raises(DataError, match="has no test"):
        load_data(name, tmp_path)
    archive.write_bytes(archive.read_bytes()[:2000])
    with pytest.raises(DataError) as caught:
        load_data(name, tmp_path)
    assert "get the official archive again" in one_line(caught)


def test_pickled_archives_are_never_read(tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"anything")
    with pytest.raises(DataError) as caught:
        load_data("cifar10", tmp_path)
    assert "put cifar-10-binary.tar.gz or cifar10.npz there" in one_line(caught)


def test_text_becomes_windows_whose_labels_are_the_next_characters(tmp_path):
    text = "to be, or not to be: that is the question. " * 20
    (tmp_path / "tinyshakespeare.txt").write_text(text)
    data = load_data("tinyshakespeare", tmp_path, block=16)
    assert data.vocabulary == "".join(sorted(set(text)))
    assert data.classes == len(data.vocabulary)
    decode = data.vocabulary.__getitem__
    for x, y, start in ((data.x_train, data.y_train, 0), (data.x_test, data.y_test, len(text) * 9 // 10)):
        assert x.shape == y.shape
        read_back = "".join(map(decode, x.flatten().tolist()))
        assert read_back == text[start : start + len(read_back)]
        assert "".join(map(decode, y.flatten().tolist())) == text[start + 1 : start + 1 + len(read_back)]
    x, y = next(iter(data.train(4, holdout=8)))
    assert (x.dtype, y.dtype) == (torch.int64, torch.int64)
    assert data.validation(holdout=8).indices.tolist() == list(range(len(data.x_train) - 8, len(data.x_train)))
    with pytest.raises(DataError, match="lower block"):
        load_data("tinyshakespeare", tmp_path, block=500)
    with pytest.raises(InputError, match="block is 0"):
        load_data("tinyshakespeare", tmp_path, block=0)
    (tmp_path / "tinyshakespeare.txt").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(DataError, match="UTF-8"):
        load_data("tinyshakespeare", tmp_path)


@pytest.mark.skipif("ISTHMUS_DATA" not in os.environ, reason="ISTHMUS_DATA names no folder with the real data sets")
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
def test_the_published_statistics_are_those_of_the_data(name):
    try:
        data = load_data(name)
    except DataError as missing:
        pytest.skip(str(missing))
    values = np.arange(256) / 255
    for channel, (mean, std) in enumerate(zip(data.mean, data.std, strict=True)):
        share = (
            np.bincount(data.x_train[:, channel].flatten().numpy(), minlength=256) / data.x_train[:, channel].numel()
        )
        # Published to four decimals.
        assert abs(share @ values - mean) < 1e-4
        assert abs(np.sqrt(share @ values**2 - (share @ values) ** 2) - std) < 1e-4
