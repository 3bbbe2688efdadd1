"""From records to tensors and from raw inputs to answers: names decide which number is which, and nothing is rescaled silently."""

import numpy as np
import pytest
import torch
from PIL import Image

from groundup.core.errors import DataError
from groundup.core.registry import TASKS
from groundup.data.dataset import from_arrays

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)


def task(name, dataset, **arguments):
    made = TASKS.get(name).target(**arguments)
    made.fit(dataset, np.arange(len(dataset)))
    return made


def vectors(names, x=None, y=None):
    x = RNG.normal(5, 3, (20, len(names))) if x is None else x
    return from_arrays("d", x, np.arange(len(x)) % 2 if y is None else y, feature_names=names)


def test_columns_in_another_order_are_matched_by_name():
    data = vectors(["a", "b", "c"])
    made = task("vector-classification", data)
    wanted = made.prepare(data, np.arange(20), CPU).inputs
    turned = vectors(["c", "a", "b", "more"], np.c_[data.inputs[:, [2, 0, 1]], np.zeros(20)])
    with pytest.raises(DataError, match="has 4 features; the model was made for 3"):
        made.prepare(turned, np.arange(20), CPU)
    turned = vectors(["c", "a", "b"], data.inputs[:, [2, 0, 1]])
    assert torch.equal(made.prepare(turned, np.arange(20), CPU).inputs, wanted)
    unnamed = vectors(["x0", "x1", "x2"], data.inputs)
    assert torch.equal(made.prepare(unnamed, np.arange(20), CPU).inputs, wanted)
    with pytest.raises(DataError, match="lacks the feature 'b'"):
        made.prepare(vectors(["a", "B", "c"]), np.arange(20), CPU)


def test_large_offsets_keep_small_differences():
    x = np.array([[1e9], [1e9 + 1], [1e9 + 2], [1e9 + 3]])
    inputs = task("vector-classification", vectors(["a"], x)).prepare(vectors(["a"], x), np.arange(4), CPU).inputs
    assert torch.allclose(inputs.diff(dim=0), inputs.diff(dim=0)[0].expand(3, 1)) and inputs.std() > 0.5


def test_unknown_labels_are_named():
    made = task("vector-classification", vectors(["a"], y=["猫", "狗"] * 10))
    with pytest.raises(DataError, match=r"d\[1\] has the label '狗狗', which the model does not know. Did you mean '狗'"):
        made.prepare(vectors(["a"], y=["猫", "狗狗"] * 10), np.arange(20), CPU)


def test_a_single_class_cannot_be_fitted():
    with pytest.raises(DataError, match="has a single class, 'x'"):
        task("vector-classification", vectors(["a"], y=["x"] * 20))


def test_columns_of_several_labels():
    y = RNG.integers(0, 2, (20, 3))
    made = task("vector-classification", vectors(["a"], y=y), multi_label=True)
    assert made.num_outputs == 3
    with pytest.raises(DataError, match="has 2 target columns; the model knows 3 labels"):
        made.prepare(vectors(["a"], y=y[:, :2]), np.arange(20), CPU)
    with pytest.raises(DataError, match=r"label 'label1' is 2.0"):
        task("vector-classification", vectors(["a"], y=np.where(np.arange(3) == 1, 2, y)), multi_label=True)
    with pytest.raises(DataError) as caught:
        task("vector-classification", vectors(["a"], y=y))
    assert "multi_label" in caught.value.fix


def test_pictures_come_in_as_people_have_them(tmp_path):
    pixels = RNG.integers(0, 256, (10, 6, 5, 3), dtype=np.uint8)
    made = task("image-classification", from_arrays("d", pixels, np.arange(10) % 2))
    wanted = torch.from_numpy(pixels[0].transpose(2, 0, 1))[None]
    Image.fromarray(pixels[0]).save(tmp_path / "图 1.png")
    channels_first = pixels[0].transpose(2, 0, 1)
    for raw in (
        tmp_path / "图 1.png",
        str(tmp_path / "图 1.png"),
        (tmp_path / "图 1.png").read_bytes(),
        Image.fromarray(pixels[0]),
        pixels[0],
        channels_first,
        torch.from_numpy(channels_first.copy()),
        pixels[0] / 255,
    ):
        assert torch.equal(made.read(raw), wanted)
    grey = made.read(np.full((6, 5), 7, dtype=np.uint8))
    assert grey.shape == (1, 3, 6, 5) and grey.unique().tolist() == [7]
    for raw, told in (
        ("gone.png", "no file gone.png"),
        (b"abc", "is not a picture"),
        (tmp_path, "no file"),
        (np.full((6, 5), -3), "pixel values"),
    ):
        with pytest.raises(DataError, match=told):
            made.read(raw)


@pytest.mark.parametrize("raw", ["1,2", "1, 2", "[1, 2]", "1，2", [1, 2], np.array([1.0, 2.0]), {"b": 2, "a": 1, "other": 9}])
def test_rows_come_in_as_people_have_them(raw):
    made = task("vector-classification", vectors(["a", "b"]))
    expected = (np.array([1.0, 2.0]) - made.mean) / made.std
    assert np.allclose(made.read(raw)[0].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(
    "raw, told",
    [
        ("1", "1 numbers were given; the model takes 2: a, b"),
        ("1,x", "'b' is 'x': not a number"),
        ("1,nan", "no value for 'b'"),
        ("1,inf", "infinite"),
        ({"a": 1}, "lacks 'b'"),
        ("", "1 numbers"),
    ],
)
def test_rows_that_do_not_fit(raw, told):
    with pytest.raises(DataError, match=told):
        task("vector-classification", vectors(["a", "b"])).read(raw)
