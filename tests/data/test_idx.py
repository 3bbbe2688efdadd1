"""IDX files: what MNIST comes in."""

import gzip
import struct

import numpy as np
import pytest

from groundup.core.errors import DataError
from groundup.core.registry import DATASETS
from groundup.data.idx import read_folder, read_idx


def idx(array, code=8, dtype=">u1"):
    return bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(dtype).tobytes()


@pytest.fixture
def mnist_like(tmp_path):
    """Writes a folder in MNIST's naming; returns it with its pictures and labels."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "手写 数字"
    folder.mkdir()
    x, y = rng.integers(0, 256, (30, 5, 4)), np.arange(30) % 10
    for name, part in {"train": slice(0, 20), "t10k": slice(20, 30)}.items():
        (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(x[part])))
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(idx(y[part]))
    return folder, x, y


def test_a_folder_of_gzip_and_plain_files(mnist_like):
    folder, x, y = mnist_like
    data = read_folder(folder, "m", classes=10)
    assert data.input_shape == (1, 5, 4) and np.array_equal(data.inputs.array[:, 0], x) and data.target.tolist() == y.tolist()
    assert {k: v.tolist() for k, v in data.given.items()} == {"train": list(range(20)), "test": list(range(20, 30))}
    assert (data.describe(0), data.describe(20)) == ("m train[0]", "m test[0]")
    assert len(data.files) == 4


def test_a_folder_of_idx_files_is_a_data_source(mnist_like, prepared):
    splits = prepared(mnist_like[0]).splits
    assert splits["test"].tolist() == list(range(20, 30))
    assert len(splits["train"]) + len(splits["validation"]) == 20


@pytest.mark.parametrize("code, dtype", [(9, ">i1"), (11, ">i2"), (12, ">i4"), (13, ">f4"), (14, ">f8")])
def test_every_dtype(tmp_path, code, dtype):
    array = np.array([[-3, 0, 7], [1, 2, 100]])
    (tmp_path / "a").write_bytes(idx(array, code, dtype))
    assert np.array_equal(read_idx(tmp_path / "a"), array)


@pytest.mark.parametrize(
    "damage, told",
    [
        (lambda b: b"", "not an IDX file"),
        (lambda b: b"\0\0", "not an IDX file"),
        (lambda b: b"\x89PNG" + b[4:], "not an IDX file"),
        (lambda b: b[:2] + b"\x55" + b[3:], "not an IDX file"),
        (lambda b: b[:6], "bytes where its header"),
        (lambda b: b[:9], "bytes where its header"),
        (lambda b: b[:-1], "bytes where its header"),
        (lambda b: b + b"x", "bytes where its header"),
        (lambda b: b[:4] + b"\xff" * 12 + b[16:], "bytes where its header"),
        (lambda b: gzip.compress(b)[:-9], "damaged or cut off"),
        (lambda b: b"\x1f\x8bgarbage", "damaged or cut off"),
    ],
)
def test_damaged_files_are_named(mnist_like, damage, told):
    file = mnist_like[0] / "train-images-idx3-ubyte.gz"
    file.write_bytes(damage(gzip.decompress(file.read_bytes())))
    with pytest.raises(DataError, match=told) as caught:
        read_folder(mnist_like[0], "m")
    assert file.name in str(caught.value) and file.name in caught.value.zh


@pytest.mark.parametrize(
    "labels, told",
    [
        (np.arange(19) % 10, "as many labels as pictures"),
        (np.where(np.arange(20) == 7, 10, 0), "label 10 of record 7 is outside 0..9"),
        (np.zeros((20, 1)), "as many labels as pictures"),
    ],
)
def test_labels_that_do_not_fit(mnist_like, labels, told):
    (mnist_like[0] / "train-labels-idx1-ubyte").write_bytes(idx(labels))
    with pytest.raises(DataError, match=told):
        read_folder(mnist_like[0], "m", classes=10)


def test_labels_that_are_not_whole_numbers(mnist_like):
    (mnist_like[0] / "train-labels-idx1-ubyte").write_bytes(idx(np.full(20, 0.5), 13, ">f4"))
    with pytest.raises(DataError, match="whole-numbered labels"):
        read_folder(mnist_like[0], "m")


def test_splits_of_different_size(mnist_like):
    (mnist_like[0] / "t10k-images-idx3-ubyte.gz").write_bytes(idx(np.zeros((10, 3, 3))))
    with pytest.raises(DataError, match="pictures of one size"):
        read_folder(mnist_like[0], "m")


def test_a_file_without_its_partner(mnist_like):
    (mnist_like[0] / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz without its partner"):
        read_folder(mnist_like[0], "m")


def test_no_records(mnist_like, prepared):
    folder, _, _ = mnist_like
    for name in ("train", "t10k"):
        (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(idx(np.zeros((0, 5, 4))))
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(idx(np.zeros(0)))
    with pytest.raises(DataError, match="has no records"):
        prepared(folder)
    with pytest.raises(DataError, match="no IDX image and label files"):
        read_folder(folder.parent, "m")


def test_a_named_set_is_found_under_groundup_data(mnist_like, monkeypatch):
    mnist_like[0].rename(mnist_like[0].parent / "mnist")
    monkeypatch.setenv("GROUNDUP_DATA", str(mnist_like[0].parent))
    assert len(DATASETS.get("mnist").target()) == 30


def test_a_named_set_is_found_in_the_cache(mnist_like, monkeypatch):
    mnist_like[0].rename(mnist_like[0].parent / "fashion_mnist")
    monkeypatch.setenv("GROUNDUP_CACHE", str(mnist_like[0].parent))
    assert len(DATASETS.get("fashion_mnist").target()) == 30


def test_a_named_set_that_is_nowhere_names_all_three_places(tmp_path, monkeypatch):
    monkeypatch.setenv("GROUNDUP_DATA", str(tmp_path / "数据"))
    monkeypatch.setenv("GROUNDUP_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataError) as caught:
        DATASETS.get("mnist").target()
    for text in (str(caught.value), caught.value.zh):
        assert str(tmp_path / "数据" / "mnist") in text and str(tmp_path / "cache" / "mnist") in text and "ylecun/mnist" in text
    assert "GROUNDUP_DATA" in caught.value.fix
    monkeypatch.delenv("GROUNDUP_DATA")
    with pytest.raises(DataError, match=r"GROUNDUP_DATA \(not set\)"):
        DATASETS.get("mnist").target()


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_the_real_sets(name, shared_data, monkeypatch):
    monkeypatch.setenv("GROUNDUP_DATA", str(shared_data))
    data = DATASETS.get(name).target()
    assert data.input_shape == (1, 28, 28) and set(data.target.tolist()) == set(range(10))
    assert len(data.given["train"]) + len(data.given["test"]) == len(data)
