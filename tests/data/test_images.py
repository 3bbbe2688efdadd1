"""Folders of pictures as people have them: what is read, what is refused, and what is said about the rest."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from groundup.core.errors import DataError
from groundup.data.pictures import decode
from groundup.data.prepare import labels_of


def labels(prepared):
    return sorted(set(labels_of(prepared.dataset).tolist()))


def said(prepared):
    return "\n".join(en for en, _ in prepared.notes)


# -- layouts -----------------------------------------------------------------------------------------------------------------------
def test_a_folder_per_label(folder, prepared):
    data = prepared(folder)
    assert labels(data) == ["狗", "猫 cat"] and data.dataset.input_shape == (3, 6, 8) and len(data.dataset) == 24
    assert data.dataset.describe(0) == str(Path("狗") / "图 00.png")
    fetched = data.dataset.inputs.fetch([0])[0].numpy()
    assert np.array_equal(fetched.transpose(1, 2, 0), np.asarray(Image.open(folder / "狗" / "图 00.png")))


def test_pictures_several_levels_deep(tmp_path, picture, prepared):
    for label in "ab":
        for i in range(4):
            picture(tmp_path / "d" / label / "2024" / "05" / f"{i}.JPEG")
    assert labels(prepared(tmp_path / "d")) == ["a", "b"]


def test_a_folder_in_a_folder(tmp_path, picture, prepared):
    for label in "ab":
        for i in range(4):
            picture(tmp_path / "pets" / "pets" / label / f"{i}.png")
    (tmp_path / "pets" / "__MACOSX").mkdir()
    assert labels(prepared(tmp_path / "pets")) == ["a", "b"]


def test_the_datas_own_splits(tmp_path, picture, prepared):
    for split, count in {"train": 5, "Val": 2, "test": 3}.items():
        for label in "ab":
            for i in range(count):
                picture(tmp_path / "d" / split / label / f"{i}.png")
    (tmp_path / "d" / "docs").mkdir()
    (tmp_path / "d" / "docs" / "readme.txt").touch()
    data = prepared(tmp_path / "d")
    assert {k: len(v) for k, v in data.splits.items()} == {"train": 10, "validation": 4, "test": 6}
    assert all(data.dataset.describe(i).startswith("test") for i in data.splits["test"])


def test_a_test_folder_without_labels_is_passed_over_and_said(tmp_path, picture, prepared):
    for label in "ab":
        for i in range(5):
            picture(tmp_path / "d" / "train" / label / f"{i}.png")
    for i in range(3):
        picture(tmp_path / "d" / "test" / f"{i}.png")
    data = prepared(tmp_path / "d")
    assert labels(data) == ["a", "b"] and "3 pictures lie in no label's folder" in said(data)


def test_splits_beside_something_else_are_questioned(tmp_path, picture, prepared):
    for name in ("train/a", "test/a", "extra/a"):
        picture(tmp_path / "d" / name / "1.png")
    with pytest.raises(DataError, match=r"holds the splits test, train and beside them extra"):
        prepared(tmp_path / "d")


def test_hidden_copies_are_left_out(folder, picture, prepared):
    picture(folder / "狗" / ".ipynb_checkpoints" / "图 00-checkpoint.png")
    picture(folder / "狗" / ".hidden.png")
    assert len(prepared(folder).dataset) == 24


def test_what_is_not_a_picture_is_counted(folder, prepared):
    (folder / "狗" / "说明.txt").touch()
    (folder / "狗" / "folder.png").mkdir()
    data = prepared(folder)
    assert len(data.dataset) == 24 and "1 files are not pictures" in said(data)


def test_links_are_followed(folder, tmp_path, prepared):
    (tmp_path / "link").symlink_to(folder)
    (folder / "狗" / "gone.png").symlink_to(folder / "nowhere.png")
    data = prepared(tmp_path / "link")
    assert len(data.dataset) == 24 and [r["record"] for r in data.dataset.rejected] == [str(Path("狗") / "gone.png")]


@pytest.mark.parametrize("names", [("001", "010", "10"), ("2024-01-31", "2024-02-01"), ("yes", "no"), ("1.0", "1.5"), ("train", "plane")])
def test_labels_that_look_like_something_else(tmp_path, picture, prepared, names):
    for name in names:
        for i in range(3):
            picture(tmp_path / "d" / name / f"{i}.png")
    assert labels(prepared(tmp_path / "d")) == sorted(names)


def test_a_hundred_classes_of_one_picture(tmp_path, picture, prepared):
    for i in range(100):
        picture(tmp_path / "d" / f"{i:03}" / "a.png", (2, 2))
    data = prepared(tmp_path / "d")
    assert {k: len(v) for k, v in data.splits.items()} == {"train": 100}
    assert "no record could be held out for test" in said(data) and "for validation" in said(data)


# -- tables of labels ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "utf-16"])
def test_a_table_of_labels(tmp_path, picture, prepared, encoding):
    for i in range(8):
        picture(tmp_path / "数据 集" / "图片" / f"图 {i}.png")
    rows = "".join(f"图 {i}.png,{'猫狗'[i % 2]},x\n" for i in range(8))
    (tmp_path / "数据 集" / "labels.csv").write_bytes(f"File,Label,备注\n{rows}".encode(encoding))
    for spec in (tmp_path / "数据 集", tmp_path / "数据 集" / "labels.csv"):
        data = prepared(spec)
        assert labels(data) == ["狗", "猫"] and len(data.dataset) == 8
    assert "labels are taken from labels.csv" in said(prepared(tmp_path / "数据 集"))


def test_a_table_with_missing_files_and_labels(tmp_path, picture, prepared):
    for i in range(6):
        picture(tmp_path / f"{i}.png")
    rows = "".join(f"{i}.png,{'ab'[i % 2]}\n" for i in range(6)) + "gone.png,a\n5.png,\n" + "x" * 300 + ".png,a\n"
    (tmp_path / "labels.csv").write_text("file,label\n" + rows)
    data = prepared(tmp_path)
    assert len(data.dataset) == 6
    assert [r["record"] for r in data.dataset.rejected] == ["labels.csv line 8", "labels.csv line 9", "labels.csv line 10"]
    assert "3 of 9 records cannot be used and are skipped; the first: labels.csv line 8: no file 'gone.png'" in said(data)
    with pytest.raises(DataError, match=r"3 of 9 records cannot be used.*gone\.png"):
        prepared(tmp_path, on_bad_record="stop")


def test_a_table_with_splits_and_windows_paths(tmp_path, picture, prepared):
    rows = ""
    for i in range(9):
        picture(tmp_path / "img" / f"{i}.png")
        rows += f"img\\{i}.png,{'ab'[i % 2]},{('train', 'val', 'test')[i // 3]}\n"
    (tmp_path / "labels.csv").write_text("image,class,split\n" + rows)
    assert {k: len(v) for k, v in prepared(tmp_path).splits.items()} == {"train": 3, "validation": 3, "test": 3}


def test_columns_by_name_and_by_mistake(tmp_path, picture, prepared):
    picture(tmp_path / "1.png")
    picture(tmp_path / "2.png")
    (tmp_path / "t.csv").write_text("照片,种类\n1.png,a\n2.png,b\n")
    assert len(prepared(tmp_path / "t.csv", columns={"image": "照片", "target": "种类"}).dataset) == 2
    with pytest.raises(DataError, match=r"has no column '照骗'. Did you mean '照片'"):
        prepared(tmp_path / "t.csv", columns={"image": "照骗", "target": "种类"})
    with pytest.raises(DataError, match="is known as the image") as caught:
        prepared(tmp_path)
    assert "data.columns.image" in caught.value.fix


def test_all_named_files_missing(tmp_path, prepared):
    (tmp_path / "labels.csv").write_text("file,label\na.png,x\nb.png,y\n")
    with pytest.raises(DataError, match="2 named ones are missing"):
        prepared(tmp_path)


# -- what cannot be used ---------------------------------------------------------------------------------------------------------------
def test_damaged_pictures_are_named_counted_and_skipped(folder, prepared):
    whole = (folder / "狗" / "图 00.png").read_bytes()
    (folder / "狗" / "坏 1.png").write_bytes(b"nothing like a picture")
    (folder / "狗" / "坏 2.png").write_bytes(whole[: len(whole) // 2])
    (folder / "狗" / "空.jpg").touch()
    data = prepared(folder)
    assert len(data.dataset) == 24
    reasons = {Path(r["record"]).name: r["reason"] for r in data.dataset.rejected}
    assert reasons.keys() == {"坏 1.png", "坏 2.png", "空.jpg"}
    assert reasons["空.jpg"] == "the file is empty" and reasons["坏 1.png"] == "not a picture"
    assert "3 of 27 records cannot be used and are skipped" in said(data)
    again = prepared(folder)  # from the cache
    assert [r["record"] for r in again.dataset.rejected] == [r["record"] for r in data.dataset.rejected]
    assert again.fingerprint == data.fingerprint
    with pytest.raises(DataError, match="3 of 27 records cannot be used") as caught:
        prepared(folder, on_bad_record="stop")
    assert "on_bad_record=skip" in caught.value.fix and "27 条记录中有 3 条无法使用" in caught.value.zh


def test_all_damaged(tmp_path, prepared):
    for label in "ab":
        (tmp_path / "d" / label).mkdir(parents=True)
        (tmp_path / "d" / label / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n rest")
    with pytest.raises(DataError, match="none of its 2 pictures can be read"):
        prepared(tmp_path / "d")


def test_cut_off_pictures_only(tmp_path, picture, prepared):
    for label in "ab":
        file = picture(tmp_path / "d" / label / "x.jpg", (40, 40))
        file.write_bytes(file.read_bytes()[:900])
    with pytest.raises(DataError, match="none of its 2 pictures can be decoded"):
        prepared(tmp_path / "d")


def test_no_pictures_and_no_labels(tmp_path, picture, prepared):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no pictures found"):
        prepared(tmp_path / "empty")
    picture(tmp_path / "loose" / "1.png")
    with pytest.raises(DataError, match="holds 1 pictures and no labels") as caught:
        prepared(tmp_path / "loose")
    assert "labels.csv" in caught.value.fix and "标签" in caught.value.zh


@pytest.mark.parametrize("spec", ["no such folder", "", "  ", "digitss", "file\0name", "x" * 5000])
def test_nothing_there(prepared, spec):
    with pytest.raises(DataError, match=r"no data|is empty"):
        prepared(spec)


# -- sizes and modes ---------------------------------------------------------------------------------------------------------------------
def test_sizes_are_brought_together_and_said(tmp_path, picture, prepared):
    for n, size in enumerate([(20, 10), (20, 10), (20, 10), (1, 1), (900, 2), (2, 900)]):
        picture(tmp_path / "d" / "ab"[n % 2] / f"{n}.png", size)
    data = prepared(tmp_path / "d")
    assert data.dataset.input_shape == (3, 10, 20) and "4 sizes; all are resized to the median, 20x10" in said(data)
    assert prepared(tmp_path / "d", image={"size": 5}).dataset.input_shape == (3, 5, 5)
    assert prepared(tmp_path / "d", image={"size": [4, 6], "channels": 1}).dataset.input_shape == (1, 4, 6)


@pytest.mark.parametrize(
    "mode, suffix",
    [("L", "png"), ("RGBA", "png"), ("CMYK", "jpg"), ("P", "png"), ("1", "png"), ("LA", "png"), ("L", "gif"), ("RGB", "webp")],
)
def test_modes_are_mixed(folder, picture, prepared, mode, suffix):
    picture(folder / "狗" / f"x.{suffix}", mode=mode)
    data = prepared(folder)
    assert len(data.dataset) == 25 and data.dataset.input_shape == (3, 6, 8) and not data.dataset.rejected


def test_grey_stays_grey(tmp_path, picture, prepared):
    for label in "ab":
        for i in range(3):
            picture(tmp_path / "d" / label / f"{i}.png", mode="L")
    assert prepared(tmp_path / "d").dataset.input_shape == (1, 6, 8)


def saved(tmp_path, image, name="x.png", **options):
    image.save(tmp_path / name, **options)
    return (tmp_path / name).read_bytes()


def test_sixteen_bits_become_eight(tmp_path):
    grey = np.array([[0, 257, 65535, 32896]], dtype=np.uint16)
    assert decode(saved(tmp_path, Image.fromarray(grey))).tolist() == [[[0, 1, 255, 128]]]
    dark = np.array([[0, 200]], dtype=np.uint16)  # a dark picture of 16 bits is dark, not one of 8 bits
    assert decode(saved(tmp_path, Image.fromarray(dark))).tolist() == [[[0, 1]]]


def test_real_pixels_and_transparency(tmp_path):
    assert decode(saved(tmp_path, Image.fromarray(np.array([[0, 0.5, 1]], dtype=np.float32)), "x.tif")).tolist() == [[[0, 128, 255]]]
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 0))
    assert decode(saved(tmp_path, half)).ravel().tolist() == [255, 255, 255]


def test_the_cameras_rotation_is_undone(tmp_path):
    lying = Image.new("RGB", (8, 2))
    lying.paste((255, 255, 255), (0, 0, 4, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # held upright: shown turned by 90 degrees clockwise
    pixels = decode(saved(tmp_path, lying, "x.png", exif=exif))
    assert pixels.shape == (3, 8, 2) and pixels[0, :4].min() == 255 and pixels[0, 4:].max() == 0


def test_rotated_pictures_count_in_their_shown_size(tmp_path, prepared):
    exif = Image.Exif()
    exif[0x0112] = 6
    for label in "ab":
        (tmp_path / "d" / label).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.full((4, 10, 3), i + 50 * (label == "a"), np.uint8)).save(tmp_path / "d" / label / f"{i}.jpg", exif=exif)
    data = prepared(tmp_path / "d")
    assert data.dataset.input_shape == (3, 10, 4) and "sizes" not in said(data)


def test_builtin_pictures_are_resized_too(prepared):
    assert prepared("digits#50", image={"size": 12, "channels": 3}).dataset.input_shape == (3, 12, 12)
