"""Vectors from text tables and npz archives: headers, encodings, holes, and what must never be guessed silently."""

import numpy as np
import pytest

from groundup.core.errors import DataError
from groundup.data.prepare import labels_of, numeric_target

ROWS = "".join(f"{i},{i * i},{'猫狗'[i % 2]}\n" for i in range(20))
PLAIN = "a,b,target\n" + ROWS


def said(prepared):
    return "\n".join(en for en, _ in prepared.notes)


# -- reading -----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "utf-16"])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_encodings_and_separators(csv, prepared, encoding, separator):
    data = prepared(csv(PLAIN.replace(",", separator), encoding=encoding)).dataset
    assert data.feature_names == ["a", "b"] and data.inputs[3].tolist() == [3, 9]
    assert set(data.target.tolist()) == {"猫", "狗"} and data.describe(3) == "表 1.csv line 5"


@pytest.mark.parametrize("name", ["t.tsv", "t.txt", "t.data", "t.CSV"])
def test_suffixes(csv, prepared, name):
    assert len(prepared(csv(PLAIN, name)).dataset) == 20


def test_quoted_cells_blank_lines_and_windows_ends(csv, prepared):
    text = '\r\n\r\n"a, 1";b;target\r\n' + "".join(f'"{i}"; {i} ;"x;{i % 2}"\r\n\r\n' for i in range(6))
    data = prepared(csv(text)).dataset
    assert data.feature_names == ["a, 1", "b"] and sorted(set(data.target)) == ["x;0", "x;1"]


def test_a_table_without_a_header_keeps_its_first_row(csv, prepared):
    data = prepared(csv("1.5,2,3\n4,5,6\n7,8,9\n"), classification=False)
    assert data.dataset.inputs.tolist() == [[1.5, 2], [4, 5], [7, 8]] and "no header" in said(data)
    iris = prepared(csv("".join(f"{i}.5,{i % 3}.1,{'xy'[i % 2]}\n" for i in range(10)), "iris.data"))
    assert len(iris.dataset) == 10 and iris.dataset.feature_names == ["c0", "c1"] and "no header" in said(iris)


@pytest.mark.parametrize("header", ["0,1,2", "2019,2020,target", "0,1,label"])
def test_headers_that_hold_numbers(csv, prepared, header):
    data = prepared(csv(header + "\n" + ROWS)).dataset
    assert len(data) == 20 and data.feature_names == header.split(",")[:2]


def test_the_row_numbers_of_pandas_are_no_feature(csv, prepared):
    data = prepared(csv(",a,target\n" + ROWS))
    assert data.dataset.feature_names == ["a"] and "row numbers" in said(data)


def test_the_target_is_recognised_or_named(csv, prepared):
    text = "Label,a,b\n" + "".join(f"{i % 2},{i},{i}\n" for i in range(9))
    data = prepared(csv(text))
    assert data.dataset.target_names == ["Label"] and "the target is the column 'Label'" in said(data)
    assert prepared(csv(text), columns={"target": "b"}, classification=False).dataset.feature_names == ["Label", "a"]
    several = prepared(csv(text), columns={"target": ["a", "b"]}, classification=False).dataset
    assert several.target.shape == (9, 2) and several.feature_names == ["Label"]


def test_features_ignore_group_and_split(csv, prepared):
    text = "id,a,b,patient,split,y\n" + "".join(f"r{i},{i},{i},p{i // 2},{('train', 'val', 'test')[i % 3]},{i}\n" for i in range(12))
    data = prepared(csv(text), columns={"ignore": ["id"], "group": "patient"}, classification=False)
    assert data.dataset.feature_names == ["a", "b"] and data.dataset.groups.tolist()[:3] == ["p0", "p0", "p1"]
    assert {k: len(v) for k, v in data.splits.items()} == {"train": 4, "validation": 4, "test": 4}
    assert prepared(csv(text), columns={"features": ["b"], "group": "patient"}, classification=False).dataset.feature_names == ["b"]


# -- mistakes ------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text, told",
    [
        ("", "is empty"),
        (" \n\n", "is empty"),
        (",,\n", "is empty"),
        ("a,b,target\n", "a header and no rows"),
        ("a,b,target\n1,2,x\n1,2\n", r"line 3: 2 cells where the header has 3"),
        ("a,b,target\n1,2,3,x\n", r"line 2: 4 cells"),
        ("a,a,target\n1,2,x\n", "two columns are named 'a'"),
        ("target\nx\ny\n", "no feature columns besides the target"),
        ("a,b,target\n1,2,x\n3,red,y\n4,blue,y\n", r"line 3: column 'b' holds the text 'red' where numbers are expected \(2 rows"),
        (
            "a,b,target\n1,2,x\n,3,y\n4,NA,x\n5,6,?\n7,inf,x\n",
            r"4 of 5 records cannot be used; the first: 表 1.csv line 3: no value in 'a'",
        ),
        ("a,b,target\n,2,x\n,3,y\n", "every row has a missing value; the first is in column 'a'"),
        ('a,b,target\n1,2,"' + "x" * 200_000 + '"\n', "not a delimited table"),
    ],
)
def test_mistakes_are_named(csv, prepared, text, told):
    with pytest.raises(DataError, match=told) as caught:
        prepared(csv(text))
    assert "表 1.csv" in caught.value.zh


def test_bytes_that_are_no_text(tmp_path, prepared):
    (tmp_path / "t.csv").write_bytes(bytes(range(256)) * 4)
    with pytest.raises(DataError, match="not text in UTF-8, UTF-16 or GB18030"):
        prepared(tmp_path / "t.csv")


def test_missing_values_may_be_skipped(csv, prepared):
    data = prepared(csv("a,b,target\n1,2,x\n,3,y\n4,NA,x\n5,6,y\n7,8,x\n9,9,y\n"), on_bad_record="skip")
    assert data.dataset.inputs.tolist() == [[1, 2], [5, 6], [7, 8], [9, 9]]
    assert [r["record"] for r in data.dataset.rejected] == ["表 1.csv line 3", "表 1.csv line 4"]
    assert data.dataset.describe(1) == "表 1.csv line 5" and "2 of 6 records" in said(data)


@pytest.mark.parametrize(
    "columns, told",
    [
        ({"target": "traget"}, r"no column 'traget'. Did you mean 'target'"),
        ({"features": ["a", "c"]}, "no column 'c'"),
        ({"ignore": ["z"]}, "no column 'z'"),
        ({"group": "z"}, "no column 'z'"),
        ({"split": "z"}, "no column 'z'"),
        ({"split": "target"}, "split '猫' in column 'target'"),
        ({"features": ["a", "target"]}, "'target' is given as a feature and as something else"),
    ],
)
def test_unknown_columns(csv, prepared, columns, told):
    with pytest.raises(DataError, match=told):
        prepared(csv(PLAIN), columns=columns)


def test_unknown_suffix(tmp_path, prepared):
    (tmp_path / "a.xlsx").touch()
    with pytest.raises(DataError, match=r"files that end in '.xlsx' cannot be read"):
        prepared(tmp_path / "a.xlsx")


def test_one_sample_and_one_class(csv, prepared):
    one = prepared(csv("a,target\n1,x\n"))
    assert {k: len(v) for k, v in one.splits.items()} == {"train": 1} and "no record could be held out" in said(one)
    assert len(prepared(csv("a,target\n1,x\n2,x\n3,x\n")).splits["train"]) >= 1


# -- what the target means -------------------------------------------------------------------------------------------------------------
def test_whole_numbers_lose_their_zero(csv, prepared):
    text = "a,target\n" + "".join(f"{i},{('1.0', '1', '2.0')[i % 3]}\n" for i in range(9))
    assert sorted(set(labels_of(prepared(csv(text)).dataset))) == ["1", "2"]
    kept = "a,target\n" + "".join(f"{i},{('001', '010')[i % 2]}\n" for i in range(9))
    assert sorted(set(labels_of(prepared(csv(kept)).dataset))) == ["001", "010"]


def test_many_reals_are_no_classes(csv, prepared):
    text = "a,target\n" + "".join(f"{i},{i * 1.5}\n" for i in range(40))
    with pytest.raises(DataError, match=r"line 3: the label is 1.5, one of 40 different numbers") as caught:
        prepared(csv(text))
    assert "vector-regression" in caught.value.fix
    assert numeric_target(prepared(csv(text), classification=False).dataset)[1, 0] == 1.5


@pytest.mark.parametrize("cell", ["red", "inf"])
def test_a_regression_target_that_is_no_number(csv, prepared, cell):
    data = prepared(csv(f"a,target\n1,2\n2,{cell}\n3,4\n"), classification=False).dataset
    with pytest.raises(DataError, match=f"line 3: the target is '{cell}'"):
        numeric_target(data)


# -- npz -----------------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def npz(tmp_path):
    def write(**arrays):
        np.savez(tmp_path / "数据.npz", **arrays)
        return tmp_path / "数据.npz"

    return write


X, Y = np.arange(60.0).reshape(20, 3), np.arange(20) % 2


@pytest.mark.parametrize("names", [("x", "y"), ("X", "target"), ("features", "labels"), ("data", "label")])
def test_npz_names(npz, prepared, names):
    data = prepared(npz(**dict(zip(names, (X, Y))))).dataset
    assert np.array_equal(data.inputs, X) and data.target.tolist() == Y.tolist() and data.describe(2) == "数据.npz[2]"


def test_npz_with_its_own_splits(npz, prepared):
    data = prepared(npz(x_train=X, y_train=Y, x_test=X[:4] + 100, y_test=Y[:4], x_val=X[:2] + 200, y_val=Y[:2]))
    assert {k: len(v) for k, v in data.splits.items()} == {"train": 20, "validation": 2, "test": 4}


def test_npz_pictures(npz, prepared):
    rng = np.random.default_rng(0)
    assert prepared(npz(images=rng.integers(0, 255, (20, 5, 4), dtype=np.uint8), labels=Y)).dataset.input_shape == (1, 5, 4)
    real = prepared(npz(x=rng.random((20, 5, 4, 3)), y=Y[:, None])).dataset
    assert real.input_shape == (3, 5, 4) and real.inputs.array.max() > 200 and real.target.ndim == 1


@pytest.mark.parametrize(
    "arrays, told",
    [
        ({"x": X, "y": Y[:3]}, "20 inputs and 3 targets"),
        ({"x": X, "z": Y}, "holds the arrays x, z; 'x' and 'y' are expected"),
        ({"x": np.array([1, "a", None], dtype=object), "y": Y[:3]}, "pickled objects"),
        ({"x": np.full((4, 2), np.nan), "y": Y[:4]}, "every record holds NaN"),
        ({"x": X.astype(str), "y": Y}, "real numbers are expected"),
        ({"x": X.astype(complex), "y": Y}, "real numbers are expected"),
        ({"x": np.zeros((20, 2, 2, 2, 2)), "y": Y}, "inputs of shape"),
        ({"x": np.zeros((20, 5, 5, 4)), "y": Y}, "1 or 3 channels"),
        ({"x": np.full((20, 5, 5), -1.0), "y": Y}, "pixel values from -1.0"),
        ({"x": np.full((20, 5, 5), np.nan), "y": Y}, "pixel values from nan"),
        ({"x_train": X, "y_train": Y, "x_test": X[:, :2], "y_test": Y}, "different shapes"),
        ({"x": X, "y": np.linspace(0, 1, 20)}, "which is not a class"),
        ({"x": X, "y": np.eye(2)[Y]}, "has 2 target columns"),
        ({"x": np.zeros((0, 3)), "y": np.zeros(0)}, "has no records"),
    ],
)
def test_npz_mistakes(npz, prepared, arrays, told):
    with pytest.raises(DataError, match=told):
        prepared(npz(**arrays))


def test_npz_rows_with_nan(npz, prepared):
    x = X.copy()
    x[3, 1], x[5, 0] = np.nan, np.inf
    with pytest.raises(DataError, match=r"2 of 20 records cannot be used; the first: 数据.npz\[3\]: NaN or infinite"):
        prepared(npz(x=x, y=Y))
    data = prepared(npz(x=x, y=Y), on_bad_record="skip").dataset
    assert len(data) == 18 and data.describe(3) == "数据.npz[4]"


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b[:300] + b"\xff" + b[301:], lambda b: b"hello", lambda b: b""])
def test_damaged_npz(npz, prepared, damage):
    path = npz(x=X, y=Y)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match="not a whole npz archive"):
        prepared(path)
