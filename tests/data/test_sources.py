"""Data SPECs: samples, globs, mixtures, user code and hub data sets."""

import time

import numpy as np
import pytest
from PIL import Image

from groundup.core.errors import DataError
from groundup.core.recipe import Columns, Data
from groundup.core.registry import DATASETS
from groundup.data.hub import from_hub_splits, read_hub
from groundup.data.prepare import absolute_source, labels_of


def table(path, rows, header="a,b,target"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(header + "\n" + "".join(",".join(map(str, row)) + "\n" for row in rows), encoding="utf-8")
    return path


# -- built-in ------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name, shape, records, classes",
    [
        ("digits", (1, 8, 8), 1797, 10),
        ("iris", (4,), 150, 3),
        ("wine", (13,), 178, 3),
        ("breast-cancer", (30,), 569, 2),
        ("diabetes", (10,), 442, None),
        ("line", (1,), 200, None),
    ],
)
def test_builtin_sets(prepared, name, shape, records, classes):
    data = prepared(name, classification=classes is not None).dataset
    assert data.input_shape == shape and len(data) == records
    assert classes is None or len(set(labels_of(data))) == classes
    assert np.array_equal(DATASETS.get(name).target().target, data.target)


def test_digits_fill_the_range_of_bytes(prepared):
    pixels = prepared("digits").dataset.inputs.array
    assert pixels.min() == 0 and pixels.max() == 255 and len(np.unique(pixels)) == 17


# -- samples -----------------------------------------------------------------------------------------------------------------------
def test_a_sample_is_seeded_and_independent_of_file_order(tmp_path, prepared):
    rows = [(i, i * i, i % 2) for i in range(50)]
    first = prepared(f"{table(tmp_path / 'a.csv', rows)}#20").dataset
    second = prepared(f"{table(tmp_path / 'b.csv', rows[::-1])}#20").dataset
    assert len(first) == 20 and sorted(first.inputs[:, 0]) == sorted(second.inputs[:, 0])
    other = prepared(f"{tmp_path / 'a.csv'}#20", split={"seed": 1}).dataset
    assert sorted(other.inputs[:, 0]) != sorted(first.inputs[:, 0])
    assert len(prepared(f"{tmp_path / 'a.csv'}#5000").dataset) == 50
    with pytest.raises(DataError, match="asks for no records"):
        prepared(f"{tmp_path / 'a.csv'}#0")


def test_a_folder_may_have_a_number_sign(tmp_path, picture, prepared):
    for label in "ab":
        for i in range(4):
            picture(tmp_path / "photos#2" / label / f"{i}.png")
    assert len(prepared(tmp_path / "photos#2").dataset) == 8
    assert len(prepared(f"{tmp_path / 'photos#2'}#3").dataset) == 3


# -- globs and mixtures ----------------------------------------------------------------------------------------------------------------
def test_a_glob_takes_all_tables(tmp_path, prepared):
    for n in range(3):
        table(tmp_path / "部分" / f"{n}.csv", [(n * 10 + i, i, i % 2) for i in range(10)])
    data = prepared(f"{tmp_path}/部分/*.csv").dataset
    assert len(data) == 30 and data.describe(25) == "2.csv line 7" and len(data.files) == 3
    with pytest.raises(DataError, match="no data"):
        prepared(f"{tmp_path}/部分/*.npz")
    (tmp_path / "部分" / "readme.md").touch()
    with pytest.raises(DataError, match=r"a glob of CSV or npz files is expected"):
        prepared(f"{tmp_path}/部分/*")


def test_columns_are_matched_by_name(tmp_path, prepared):
    table(tmp_path / "1.csv", [(1, 10, "x"), (2, 20, "y")])
    table(tmp_path / "2.csv", [(30, 3, "x"), (40, 4, "y")], "b,a,target")
    data = prepared(f"{tmp_path}/*.csv").dataset
    assert data.inputs.tolist() == [[1, 10], [2, 20], [3, 30], [4, 40]]
    table(tmp_path / "3.csv", [(1, 2, "x")], "a,c,target")
    with pytest.raises(DataError, match="sources with different columns cannot be mixed"):
        prepared(f"{tmp_path}/*.csv")


def test_weights_keep_the_proportions(tmp_path, prepared):
    big = table(tmp_path / "big.csv", [(i, 0, i % 2) for i in range(100)])
    small = table(tmp_path / "small.csv", [(i, 1, i % 2) for i in range(10)])
    mixed = prepared([{"source": str(big), "weight": 0.75}, {"source": str(small), "weight": 0.25}])
    assert (mixed.dataset.inputs[:, 1] == 0).sum() == 30 and (mixed.dataset.inputs[:, 1] == 1).sum() == 10
    assert any("big 30/100, small 10/10" in en for en, _ in mixed.notes)


def test_mixtures_of_pictures(folder, prepared):
    mixed = prepared([{"source": str(folder)}, {"source": "digits"}], image={"size": 8, "channels": 1}, in_memory=False)
    assert mixed.dataset.input_shape == (1, 8, 8) and len(mixed.dataset) == 48
    with pytest.raises(DataError, match="different shape") as caught:
        prepared([{"source": str(folder)}, {"source": "digits"}])
    assert "data.image.size" in caught.value.fix
    with pytest.raises(DataError, match="different shape"):
        prepared([{"source": "iris"}, {"source": "digits"}])
    with pytest.raises(DataError, match="empty list"):
        prepared([])


def test_paths_become_absolute(tmp_path, folder):
    table(tmp_path / "t.csv", [(1, 2, 3)])
    (tmp_path / "u.py").write_text("")

    def fixed(spec):
        return absolute_source(Data(source=spec)).source

    assert fixed("t.csv#5") == f"{tmp_path}/t.csv#5" and fixed("我的 照片") == str(folder)
    assert fixed("u.py:f") == f"{tmp_path}/u.py:f" and fixed("*.csv") == f"{tmp_path}/*.csv"
    assert [fixed(s) for s in ("digits", "digits#5", "hub:a/b", "nothing")] == ["digits", "digits#5", "hub:a/b", "nothing"]


# -- user code -------------------------------------------------------------------------------------------------------------------------
USER = """
import numpy as np
import torch
from groundup.data import from_arrays

def pair():
    return np.arange(40.0).reshape(20, 2), np.arange(20) % 2

def dataset():
    return from_arrays("mine", *pair())

class Torch(torch.utils.data.Dataset):
    def __len__(self):
        return 20
    def __getitem__(self, i):
        return torch.full((1, 6, 6), i / 20), i % 2

class Ragged(Torch):
    def __getitem__(self, i):
        return torch.zeros(i + 1), 0

def number():
    return 5

def broken():
    raise KeyError("列")

def needs(argument):
    return pair()

def unlabelled():
    return np.zeros((3, 2)), ["a", None, "b"]
"""


@pytest.fixture
def user(tmp_path):
    (tmp_path / "我的 代码.py").write_text(USER, encoding="utf-8")
    return lambda name: f"{tmp_path}/我的 代码.py:{name}"


def test_user_functions_and_classes(user, prepared):
    for name in ("pair", "dataset"):
        data = prepared(user(name)).dataset
        assert data.inputs[1].tolist() == [2, 3] and data.target.tolist() == [0, 1] * 10 and "我的 代码.py" in data.files
    pictures = prepared(user("Torch")).dataset
    assert pictures.input_shape == (1, 6, 6) and pictures.inputs.array[19].max() == round(0.95 * 255)


@pytest.mark.parametrize(
    "name, told",
    [
        ("number", "gave int"),
        ("broken", r"failed: KeyError: '列'"),
        ("needs", "failed: TypeError"),
        ("Ragged", "failed: ValueError"),
        ("unlabelled", "record 1 has no target"),
        ("piar", "Did you mean 'pair'"),
    ],
)
def test_user_mistakes(user, prepared, name, told):
    with pytest.raises(DataError, match=told):
        prepared(user(name))


def test_a_python_file_without_a_name(user, prepared):
    with pytest.raises(DataError) as caught:
        prepared(user("pair").rpartition(":")[0])
    assert caught.value.fix.endswith(":NAME for a function or class in it") and "我的 代码.py" in caught.value.fix


# -- hub -----------------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def hub_splits():
    import datasets

    rng = np.random.default_rng(0)

    def split(labels, sizes):
        images = [Image.fromarray(rng.integers(0, 255, (s, s, 3), dtype=np.uint8)) for s in sizes]
        features = datasets.Features({"photo": datasets.Image(), "kind": datasets.ClassLabel(names=["猫", "狗"])})
        return datasets.Dataset.from_dict({"photo": images, "kind": labels}, features=features)

    return lambda: datasets.DatasetDict(
        train=split([0, 1, 0, 1, 1, 0], [8] * 6), valid=split([0, 1], [8, 6]), test=split([0, -1, 1], [8] * 3)
    )


def test_hub_splits_with_pictures_and_class_names(hub_splits):
    data = from_hub_splits("owner/pets", dict(hub_splits()), Data(source="hub:owner/pets"))
    assert data.input_shape == (3, 8, 8) and sorted(set(data.target.tolist())) == ["狗", "猫"]
    assert {k: len(v) for k, v in data.given.items()} == {"train": 6, "validation": 2, "test": 2}
    assert [r["record"] for r in data.rejected] == ["owner/pets test[1]"]  # -1 stands for 'not labelled'
    assert data.describe(9) == "owner/pets test[2]"


def test_hub_columns(hub_splits):
    named = from_hub_splits("o/n", dict(hub_splits()), Data(source="-", columns=Columns(image="photo", target="kind")))
    assert len(named) == 10
    with pytest.raises(DataError, match="has the columns kind; one of pictures") as caught:
        from_hub_splits("o/n", {k: v.remove_columns("photo") for k, v in hub_splits().items()}, Data(source="-"))
    assert "data.columns.image" in caught.value.fix


def test_offline_says_so_at_once():
    begin = time.monotonic()
    with pytest.raises(DataError, match="the hub cannot be reached, and 'datasets' has no copy") as caught:
        read_hub("nobody/nothing@main:default", Data(source="-"))
    assert time.monotonic() - begin < 20 and "HF_ENDPOINT" in caught.value.fix and "无法连接 hub" in caught.value.zh
