"""What is said about data before training: numbers, problems, a grid of pictures; and the cache, which may fail without harm."""

import json

import numpy as np
import pytest
from PIL import Image

from groundup.core.errors import DataError
from groundup.data import cache
from groundup.data.statistics import describe, problems, sample_grid


def found(prepared, classification=True):
    return {(p["severity"], p["message"]): p["records"] for p in problems(prepared, classification=classification)}


def test_numbers_of_pictures(prepared):
    data = prepared("digits")
    facts = json.loads(json.dumps(describe(data, classification=True)))
    assert facts["records"] == 1797 and sum(facts["splits"].values()) == 1797 and facts["input_shape"] == [1, 8, 8]
    assert list(facts["classes"]) == [str(i) for i in range(10)]
    assert sum(facts["classes"]["3"].values()) == int((data.dataset.target == 3).sum())
    pixels = data.dataset.inputs.array[data.splits["train"]] / 255
    assert facts["pixels"]["mean"][0] == pytest.approx(pixels.mean(), abs=1e-4)
    assert facts["pixels"]["std"][0] == pytest.approx(pixels.std(), abs=1e-4)


def test_numbers_of_vectors(prepared):
    facts = describe(prepared("line", classification=False), classification=False)
    assert facts["target"]["min"] == -6 and facts["target"]["max"] == 6
    assert facts["features"]["x"]["mean"] == pytest.approx(0, abs=0.5)


def test_a_target_of_text_is_no_regression(csv, prepared):
    data = prepared(csv("a,t\n1,x\n2,y\n3,z\n"), classification=False)
    with pytest.raises(DataError, match="line 2: the target is 'x'"):
        describe(data, classification=False)


def test_problems_are_found(csv, prepared):
    rows = "".join(f"{i},7,{'x' if i < 30 else 'y'}\n" for i in range(32))
    told = found(prepared(csv("a,b,target\n" + rows + "3,7,y\n3,7,x\n1,,x\n"), on_bad_record="skip"))
    severities = sorted(severity for severity, _ in told)
    assert severities == ["info", "warning", "warning", "warning", "warning", "warning"]
    messages = "\n".join(message for _, message in told)
    for part in (
        "1 records cannot be used",
        "1 classes have fewer than 10 records: y",
        "classes are unbalanced: 31 to 3",
        "1 records equal another one that has a different label",
        "1 features never change: b",
        "2 exact duplicates",
    ):
        assert part in messages
    assert any("line 5" in r and "line 34" in r and "(x / y)" in r for records in told.values() for r in records)


def test_a_single_class_is_an_error(csv, prepared):
    told = found(prepared(csv("a,target\n" + "".join(f"{i},x\n" for i in range(12)))))
    assert ("error", "there is a single class, 'x': nothing can be learned") in told


def test_good_data_has_no_problems(prepared):
    assert found(prepared("digits#500")) == {}


@pytest.mark.parametrize("shape, cell", [((8, 8), (32, 32)), ((1000, 500), (256, 128)), ((1, 900), (1, 256)), ((2, 60), (8, 240))])
def test_the_grid_is_a_picture_of_the_right_size(tmp_path, prepared, shape, cell):
    x = np.random.default_rng(0).integers(0, 255, (24, *shape), dtype=np.uint8)
    np.savez(tmp_path / "d.npz", x=x, y=np.arange(24) % 3)
    sample_grid(prepared(tmp_path / "d.npz"), tmp_path / "网格.png", columns=4, rows=6)
    with Image.open(tmp_path / "网格.png") as sheet:
        assert sheet.format == "PNG" and sheet.size == (4 * (cell[1] + 2) + 2, 3 * (cell[0] + 2) + 2)


def test_no_grid_of_vectors(tmp_path, prepared):
    with pytest.raises(DataError, match="a grid needs pictures"):
        sample_grid(prepared("iris"), tmp_path / "grid.png")


# -- the cache -----------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GROUNDUP_CACHE", str(tmp_path / "缓存"))
    return tmp_path / "缓存"


def test_what_is_stored_comes_back(own_cache):
    assert cache.load("k") is None
    cache.store("k", {"a": np.arange(5), "文": np.array(["猫"])})
    loaded = cache.load("k")
    assert loaded["a"].tolist() == [0, 1, 2, 3, 4] and loaded["文"].tolist() == ["猫"]
    assert [p.suffix for p in own_cache.rglob("*") if p.is_file()] == [".npz"]


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-30], lambda b: b[:150] + bytes([b[150] ^ 255]) + b[151:], lambda b: b"", lambda b: b"PK garbage"]
)
def test_damaged_entries_count_as_absent(own_cache, folder, prepared, damage):
    first = prepared(folder)
    entries = list(own_cache.rglob("*.npz"))
    assert len(entries) == 1
    entries[0].write_bytes(damage(entries[0].read_bytes()))
    again = prepared(folder)
    assert again.fingerprint == first.fingerprint and np.array_equal(again.dataset.inputs.array, first.dataset.inputs.array)


def test_a_cache_that_cannot_be_written_is_harmless(tmp_path, monkeypatch, folder, prepared):
    (tmp_path / "file").touch()
    monkeypatch.setenv("GROUNDUP_CACHE", str(tmp_path / "file"))
    assert len(prepared(folder).dataset) == 24 and len(prepared("iris").dataset) == 150


def test_the_cache_follows_the_bytes(own_cache, folder, picture, prepared):
    before = prepared(folder).dataset.inputs.array.copy()
    picture(folder / "狗" / "图 00.png")
    after = prepared(folder).dataset.inputs.array
    assert not np.array_equal(before[0], after[0]) and np.array_equal(before[1:], after[1:])
