"""Pictures inside archives, in tables with several labels, and kept as raw pixels: the same records as from a plain folder."""

import json
import os
import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from groundup.core.errors import DataError
from groundup.data import cache
from groundup.data.pictures import ArrayImages, FileImages, Resize, decode, picture_array
from groundup.data.prepare import labels_of


def archived(folder, path):
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(folder.rglob("*.*")):
                archive.write(file, f"photos/{file.relative_to(folder).as_posix()}")
    else:
        with tarfile.open(path, "w:" + {"tar": "", "tgz": "gz", "gz": "gz", "bz2": "bz2", "xz": "xz"}[path.suffix[1:]]) as archive:
            archive.add(folder, "photos")
    return path


@pytest.mark.parametrize("name", ["照 片.zip", "p.tar", "p.tar.gz", "p.tgz", "p.tar.bz2", "p.tar.xz"])
@pytest.mark.parametrize("in_memory", [True, False])
def test_an_archive_is_a_folder(folder, prepared, tmp_path, name, in_memory):
    plain = prepared(folder)
    data = prepared(archived(folder, tmp_path / name), in_memory=in_memory, cached=False)
    assert data.fingerprint == plain.fingerprint and labels_of(data.dataset).tolist() == labels_of(plain.dataset).tolist()
    index = np.arange(24)
    inputs = pickle.loads(pickle.dumps(data.dataset.inputs))  # noqa: S301 - as a worker process gets it
    assert np.array_equal(inputs.fetch(index), plain.dataset.inputs.fetch(index))


def test_names_in_gbk_are_read(tmp_path):
    from groundup.data.tree import _zip_name

    info = zipfile.ZipInfo("x")
    info.filename, info.flag_bits = "猫/图.png".encode("gb18030").decode("cp437"), 0
    assert _zip_name(info) == "猫/图.png"
    info.filename = "猫/图.png".encode().decode("cp437")
    assert _zip_name(info) == "猫/图.png"


def test_damaged_and_odd_archives(tmp_path, prepared, folder):
    (tmp_path / "bad.zip").write_bytes(b"PK\x03\x04 and nothing more")
    with pytest.raises(DataError, match="cannot be read as an archive"):
        prepared(tmp_path / "bad.zip")
    whole = archived(folder, tmp_path / "p.tar.gz").read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be read as an archive"):
        prepared(tmp_path / "cut.tar.gz")
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        for name in ("../../a/1.png", "/etc/b/2.png", "__MACOSX/a/._1.png", "a/.hidden.png"):
            archive.write(next(folder.rglob("*.png")), name)
    data = prepared(tmp_path / "evil.zip", split={"validation": 0, "test": 0}, on_bad_record="skip")
    assert len(data.dataset) <= 2 and not list(tmp_path.parent.glob("a"))
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    with pytest.raises(DataError, match="no pictures found"):
        prepared(tmp_path / "empty.zip")


def test_one_damaged_member_is_rejected_by_name(tmp_path, folder, prepared):
    path = archived(folder, tmp_path / "p.zip")
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("photos/狗/图 03.png")
    raw = bytearray(path.read_bytes())
    start = info.header_offset + 30 + len(info.filename.encode()) + 20
    raw[start : start + 40] = bytes(40)
    path.write_bytes(raw)
    data = prepared(path)
    assert [r["record"] for r in data.dataset.rejected] == [str(Path("photos", "狗", "图 03.png"))]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_json_names_pictures_with_labels_and_more(tmp_path, picture, prepared, suffix):
    rows = []
    for i in range(12):
        picture(tmp_path / "图" / f"{i}.png")
        rows.append({"image": f"图/{i}.png", "label": "ab"[i % 2], "city": "上海", "age": i, "split": "test" if i > 8 else "train"})
    text = json.dumps(rows) if suffix == ".json" else "\ufeff" + "\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n\n"
    (tmp_path / f"rows{suffix}").write_text(text, encoding="utf-8")
    data = prepared(tmp_path / f"rows{suffix}")
    assert len(data.dataset) == 12 and len(data.splits["test"]) == 3
    assert data.dataset.meta["city"][0] == "上海" and data.dataset.meta["age"].tolist() == list(map(float, range(12)))


def test_broken_json_names_the_line(tmp_path, prepared):
    (tmp_path / "rows.jsonl").write_text('{"image": "a.png", "label": "a"}\n{"image": \n')
    with pytest.raises(DataError, match="line 2: not JSON"):
        prepared(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text("[1, 2]\n")
    with pytest.raises(DataError, match="an object like"):
        prepared(tmp_path / "rows.jsonl")


def test_several_labels_three_ways(tmp_path, picture, prepared):
    for i in range(8):
        picture(tmp_path / f"{i}.png")
    several = [["cat"], ["dog", "cat"], [], ["dog"]] * 2
    (tmp_path / "l.jsonl").write_text("\n".join(json.dumps({"file": f"{i}.png", "labels": v}) for i, v in enumerate(several)))
    (tmp_path / "s.csv").write_text("file,labels\n" + "".join(f"{i}.png,{'; '.join(v)}\n" for i, v in enumerate(several)))
    (tmp_path / "c.csv").write_text(
        "file,cat,dog\n" + "".join(f"{i}.png,{int('cat' in v)},{int('dog' in v)}\n" for i, v in enumerate(several))
    )
    tables = {"l.jsonl": {}, "s.csv": {"separator": ";"}, "c.csv": {"target": ["cat", "dog"]}}
    for name, columns in tables.items():
        dataset = prepared(tmp_path / name, classification=False, columns=columns).dataset
        assert dataset.target_names == ["cat", "dog"]
        assert dataset.target.astype(float).tolist() == [[1, 0], [1, 1], [0, 0], [0, 1]] * 2, name


def test_a_group_is_never_divided(tmp_path, picture, prepared):
    for i in range(20):
        picture(tmp_path / f"{i}.png")
    (tmp_path / "labels.csv").write_text("file,label,patient\n" + "".join(f"{i}.png,{'ab'[i % 2]},p{i // 4}\n" for i in range(20)))
    data = prepared(tmp_path, columns={"group": "patient"}, split={"by": "group", "test": 0.3})
    sides = {name: {data.dataset.groups[i] for i in index} for name, index in data.splits.items()}
    assert not sides["train"] & sides["test"]


# -- kept as raw pixels ------------------------------------------------------------------------------------------------------------
def test_raw_pixels_are_kept_and_read_again(folder, prepared, monkeypatch):
    memory = prepared(folder, in_memory=True)
    kept = prepared(folder, in_memory=False, cached=True).dataset.inputs
    assert isinstance(kept, FileImages) and kept.pixels is not None
    index = np.array([5, 0, 23])
    assert np.array_equal(kept.fetch(index), memory.dataset.inputs.fetch(index))
    assert np.array_equal(kept.select(index).fetch([2]), memory.dataset.inputs.fetch([23]))
    monkeypatch.setattr("groundup.data.image_folder.decode", None)  # nothing is decoded a second time
    assert isinstance(prepared(folder, in_memory=True).dataset.inputs, ArrayImages)
    assert np.array_equal(prepared(folder, in_memory=False, cached=True).dataset.inputs.load().array, memory.dataset.inputs.array)


def test_a_cache_without_room_only_costs_time(folder, prepared, monkeypatch):
    monkeypatch.setattr(cache.os, "fsync", lambda f: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    data = prepared(folder, in_memory=False, cached=True, image={"size": 7})
    assert data.dataset.inputs.pixels is None and "no room for the decoded pictures" in str(data.notes)
    assert not list(cache.cache_folder().rglob("*.pixels.npy.*"))


# -- sizes -------------------------------------------------------------------------------------------------------------------------
def test_centre_crop_after_the_shorter_side():
    wide = Image.new("RGB", (40, 20))
    wide.paste((255, 0, 0), (10, 0, 30, 20))
    assert picture_array(wide, 3, (20, 20), Resize("crop"))[0].min() == 255
    assert picture_array(wide, 3, (10, 10), Resize("crop", 20, "bicubic"))[0].min() == 255
    assert picture_array(wide, 3, (30, 30), Resize("crop")).shape == (3, 30, 30)  # too small: enlarged
    assert picture_array(Image.new("L", (1, 900)), 1, (8, 8), Resize("crop", 9)).shape == (1, 8, 8)


def test_a_large_jpeg_is_decoded_small_and_looks_the_same(tmp_path):
    y, x = np.mgrid[0:900, 0:1200]
    smooth = np.stack([x / 1200, y / 900, (x + y) / 2100], -1) * 255
    Image.fromarray(smooth.astype(np.uint8)).save(tmp_path / "x.jpg", quality=95)
    data = (tmp_path / "x.jpg").read_bytes()
    with Image.open(tmp_path / "x.jpg") as whole:
        expected = picture_array(whole, 3, (90, 120))
    assert np.abs(decode(data, 3, (90, 120)).astype(int) - expected).mean() < 1.5


def test_a_bomb_is_refused_by_its_header(tmp_path, folder, prepared):
    header = bytearray((folder / "狗" / "图 00.png").read_bytes())
    header[16:24] = (60000).to_bytes(4, "big") * 2
    (folder / "狗" / "bomb.png").write_bytes(header)
    shutil.copy(folder / "狗" / "图 00.png", folder / "狗" / "cut.png")
    os.truncate(folder / "狗" / "cut.png", 60)
    assert {r["record"] for r in prepared(folder).dataset.rejected} == {str(Path("狗", n)) for n in ("bomb.png", "cut.png")}


def test_an_animation_gives_its_first_frame(tmp_path, folder, prepared):
    frames = [Image.new("RGB", (8, 6), c) for c in ("red", "blue")]
    frames[0].save(folder / "狗" / "moving.gif", save_all=True, append_images=frames[1:])
    data = prepared(folder)
    at = next(i for i in range(25) if data.dataset.describe(i).endswith("gif"))
    assert data.dataset.inputs.fetch([at])[0, :, 0, 0].tolist() == [255, 0, 0] and "1 pictures are animated" in str(data.notes)
