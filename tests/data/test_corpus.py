"""Text: every kind of source, cleaning, copies, splits, and what happens to bad input and to an interruption."""

import codecs
import csv
import gzip
import json
import os
import random
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from groundup.core.errors import DataError
from groundup.core.recipe import Data
from groundup.data import cleaning, corpus, decoding, documents, records
from groundup.data.corpus import is_text, prepare_corpus

CHINESE = "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。我们说这个国家的人都在学习，因为他们想要知道更多。\n"
TRADITIONAL = "這個國家的人們都在學習，因為他們說時間過得很快，應該讓大家知道經濟與社會的發展，並且對於這些問題有自己的想法。\n"


@pytest.fixture
def made():
    """made(spec, **settings) -> the corpus."""

    def make(spec, **settings):
        return prepare_corpus(Data.model_validate({"source": str(spec) if isinstance(spec, Path) else spec} | settings))

    return make


@pytest.fixture
def write(tmp_path):
    """write(name, content) -> path, with its folders; text is written as UTF-8."""

    def put(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return put


def sentence(seed, words=60):
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("abcdefghijklmnoprstuvw", k=rng.randint(2, 9))) for _ in range(words))


def lines(*records):
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)


def everything(c):
    return list(c.texts(range(len(c))))


def rejected(c):
    return [json.loads(line) for line in c.rejected.read_text(encoding="utf-8").splitlines()]


ALL = {"split": {"validation": 0, "test": 0}}


# -- sources -------------------------------------------------------------------------------------------------------------------
def test_stdlib(made):
    c = made("stdlib#20")
    assert len(c) == 20 and all(c.describe(i).endswith(".py") for i in range(20)) and is_text("stdlib", Data(source="stdlib"))
    whole = [i.name for i in documents.open_parts(Data(source="stdlib"))[0].items]
    assert "json/decoder.py" in whole and whole == sorted(whole, key=lambda n: n.split("/"))
    assert not [n for n in whole if {"test", "tests", "site-packages", "idlelib", "lib2to3", "__pycache__"} & {*n.split("/")}]


def test_a_folder_with_chinese_names_and_spaces(made, write, tmp_path):
    write("我的 文本/一 号.txt", "第一个文件的内容")
    write("我的 文本/子 目录/b.md", "# second")
    write("我的 文本/子 目录/run.py", "print(1)")
    write("我的 文本/photo.png", b"\x89PNG")
    write("我的 文本/.git/config.txt", "hidden")
    c = made(tmp_path / "我的 文本", **ALL)
    assert everything(c) == ["第一个文件的内容", "# second", "print(1)"] and c.name == "我的 文本"
    assert [c.describe(i) for i in range(3)] == ["一 号.txt", "子 目录/b.md", "子 目录/run.py"]
    assert any("files of other kinds, not read: 1" in en and "另有 1 个" in zh for en, zh in c.notes)
    assert set(c.files) == {"一 号.txt", "子 目录/b.md", "子 目录/run.py"}
    assert everything(made(str(tmp_path / "我的 文本" / "**" / "*.md"), **ALL)) == ["# second"]
    assert everything(made([{"source": str(tmp_path / "我的 文本"), "weight": None}], **ALL)) == everything(c)


def test_json_lines_arrays_and_poems(made, write):
    poems = [{"title": "春晓", "author": "孟浩然", "paragraphs": ["春眠不觉晓，", "处处闻啼鸟。"]}, {"paragraphs": ["夜来风雨声，"]}]
    c = made(write("poems.json", json.dumps(poems, indent=1)), **ALL)
    assert everything(c) == ["春晓\n春眠不觉晓，\n处处闻啼鸟。", "夜来风雨声，"] and c.describe(1) == "poems.json record 2"
    c = made(write("a.jsonl", lines({"title": "t", "text": "one"}, {"text": "two"})), **ALL)
    assert everything(c) == ["one", "two"] and c.describe(1) == "a.jsonl line 2"
    book = {"title": "书", "content": [{"type": "x", "content": [{"chapter": "c", "paragraphs": ["甲", "乙"]}, {"paragraphs": ["丙"]}]}]}
    assert everything(made(write("book.json", json.dumps(book)), **ALL)) == ["甲\n乙", "丙"]
    assert everything(made(write("only.jsonl", lines({"id": 1, "words": "w"}, {"id": 2, "words": "v"})), **ALL)) == ["w", "v"]
    assert everything(made(write("wanted.jsonl", lines({"text": "a", "b": "c"})), text={"column": "b"}, **ALL)) == ["c"]


def test_a_text_column_that_cannot_be_told(made, write):
    path = write("qa.jsonl", lines({"question": "q", "answer": "a"}))
    with pytest.raises(DataError, match="question, answer") as caught:
        made(path)
    assert "--set data.text.column=question" in str(caught.value) and "question, answer" in caught.value.zh
    with pytest.raises(DataError, match=r"Did you mean 'answer'"):
        made(path, text={"column": "answr"})
    with pytest.raises(DataError, match="a, b"):
        made(write("t.csv", "a,b\nx,y\n"))


def test_csv_tsv_and_parquet(made, write, tmp_path):
    text = 'id,Text,label\n1,"one, with\nline",a\n2,two,b\n3,short\n'
    c = made(write("表 1.csv", text), **ALL)
    assert everything(c) == ["one, with\nline", "two"] and c.describe(0) == "表 1.csv line 3"
    assert [r["reason"] for r in rejected(c)] == ["2 cells where the header has 3"] and c.statistics["damaged"] == 1
    wide = write("w.csv", f"text,n\n{'word ' * 40_000},1\n")
    assert len(made(wide, **ALL).text(0)) == 200_000 and csv.field_size_limit() == 131_072
    assert everything(made(write("t.tsv", "n\twords\n1\ta b, c\n2\td\n"), **ALL)) == ["a b, c", "d"]
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    table = arrow.table({"id": list(range(300)), "content": [f"document {i}" for i in range(300)]})
    parquet.write_table(table, tmp_path / "t.parquet", row_group_size=64)
    c = made(tmp_path / "t.parquet", **ALL)
    assert everything(c) == table["content"].to_pylist() and c.describe(99) == "t.parquet row 100"
    rest = list(records.read_item(documents.open_parts(Data(source=str(tmp_path / "t.parquet")))[0].items[0], Data(source="x"), 130))
    assert [f.place for f in rest] == list(range(131, 301))


def test_compressed_files_and_archives(made, write, tmp_path):
    assert everything(made(write("a.txt.gz", gzip.compress(b"hello there")), **ALL)) == ["hello there"]
    cut = gzip.compress(lines(*({"text": sentence(i)} for i in range(300))).encode())
    c = made(write("cut.jsonl.gz", cut[: len(cut) // 2]), **ALL)
    assert 0 < len(c) < 300 and "cannot be read behind line" in rejected(c)[0]["reason"]
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tang/one.json", json.dumps([{"paragraphs": ["甲", "乙"]}]))
        archive.writestr("song/two.txt", "two")
    assert everything(made(tmp_path / "a.zip", **ALL)) == ["two", "甲\n乙"]
    c = made(str(tmp_path / "a.zip" / "tang"), **ALL)
    assert everything(c) == ["甲\n乙"] and c.describe(0) == "one.json record 1"
    assert everything(made(str(tmp_path / "a.zip" / "song" / "two.txt"), **ALL)) == ["two"]
    with tarfile.open(tmp_path / "b.tar", "w") as archive:
        archive.add(write("x.md", "in a tar"), "docs/x.md")
    assert everything(made(tmp_path / "b.tar", **ALL)) == ["in a tar"]
    with pytest.raises(DataError, match="holds no 'ming'"):
        made(str(tmp_path / "a.zip" / "ming"))


def test_zstd(made, write):
    path = write("z.txt.zst", b"\x28\xb5\x2f\xfd")
    try:
        import zstandard
    except ModuleNotFoundError:
        with pytest.raises(DataError, match="pip install zstandard"):
            made(path)
        return
    assert everything(made(write("y.txt.zst", zstandard.compress(b"packed text")), **ALL)) == ["packed text"]


def test_the_hub_is_streamed(made, monkeypatch):
    import datasets

    from groundup.data import hub

    rows = {"train": [{"text": sentence(i)} for i in range(12)], "test": [{"text": sentence(100)}, {"text": sentence(3)}]}
    asked = []

    def load(name, subset, revision=None, streaming=False):
        asked.append((name, subset, revision, streaming))
        return {k: datasets.IterableDataset.from_generator(lambda v=v: iter(v)) for k, v in rows.items()}

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_reachable", lambda: True)
    c = made("hub:owner/name@abc:part")
    assert asked == [("owner/name", "part", "abc", True)] and c.describe(0) == "owner/name train record 1"
    assert len(c.splits["test"]) == 2 and c.name == "hub:owner/name"
    assert sorted(c.texts(c.splits["test"])) == sorted(r["text"] for r in rows["test"])  # the copy in training left
    monkeypatch.setattr(hub, "_reachable", lambda: False)
    assert made("hub:owner/name@abc:part").fingerprint == c.fingerprint  # prepared before: nothing is asked again
    assert len(asked) == 1
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("no")))
    with pytest.raises(DataError, match="cannot be reached"):
        made("hub:owner/other")


def test_user_code(made, write):
    path = write(
        "mine.py", "def texts():\n    yield from (f'text number {i}' for i in range(30))\nnothing = lambda: 3\nfails = lambda: 1 / 0\n"
    )
    c = made(f"{path}:texts", **ALL)
    assert len(c) == 30 and c.describe(4) == "texts record 5" and is_text(f"{path}:texts", Data(source="x"))
    with pytest.raises(DataError, match="gave int"):
        made(f"{path}:nothing")
    with pytest.raises(DataError, match="ZeroDivisionError"):
        made(f"{path}:fails")
    with pytest.raises(DataError, match="not a set of texts"):
        made("digits")


def test_documents_of_lines_and_paragraphs(made, write):
    path = write("a.txt", "one\nmore\n\n\ntwo\r\n  \nthree")
    c = made(path, text={"document": "line"}, **ALL)
    assert everything(c) == ["one", "more", "two", "three"] and c.describe(2) == "a.txt line 5"
    c = made(path, text={"document": "paragraph"}, **ALL)
    assert everything(c) == ["one\nmore", "two", "three"] and c.describe(1) == "a.txt paragraph 2"
    assert everything(made(path, **ALL)) == ["one\nmore\n\n\ntwo\n  \nthree"]


def test_mixtures_keep_the_shares_of_bytes(made, write):
    a = write("a.jsonl", lines(*({"text": sentence(i, 50)} for i in range(100))))
    b = write("b.jsonl", lines(*({"text": sentence(1000 + i, 20)} for i in range(400))))
    c = made([{"source": str(a), "weight": 3}, {"source": str(b), "weight": 1}], **ALL)
    sizes = np.diff(c.offsets)
    of_a = np.array([c.describe(i).startswith("a.") for i in range(len(c))])
    assert of_a.sum() == 100 and abs(sizes[of_a].sum() / sizes.sum() - 0.75) < 0.01
    assert len(set(everything(c))) == len(c) and c.name == "a+b"
    long = write("long.jsonl", lines({"text": sentence(7, 40000)}, *({"text": sentence(2000 + i, 50)} for i in range(300))))
    c = made([{"source": str(long), "weight": 1}, {"source": str(a), "weight": 1}], **ALL)  # what does not fit does not shut out what does
    of_a = np.array([c.describe(i).startswith("a.") for i in range(len(c))])
    assert of_a.sum() == 100 and abs(np.diff(c.offsets)[of_a].sum() / np.diff(c.offsets).sum() - 0.5) < 0.02
    c = made([{"source": str(a), "weight": None}, {"source": f"{b}#7", "weight": None}], **ALL)
    assert len(c) == 107
    with pytest.raises(DataError, match="a text has none"):
        made([{"source": str(a), "classes": ["x"]}])


def test_a_sample_is_seeded_and_of_content(made, write, tmp_path):
    records = [{"text": sentence(i)} for i in range(50)]
    a, b = write("a.jsonl", lines(*records)), write("b.jsonl", lines(*records[::-1]))
    first, second = made(f"{a}#10", **ALL), made(f"{b}#10", **ALL)
    assert len(first) == 10 and sorted(everything(first)) == sorted(everything(second))
    other = made(f"{a}#10", split={"validation": 0, "seed": 1})
    assert sorted(everything(other)) != sorted(everything(first))
    with pytest.raises(DataError, match="asks for no records"):
        made(f"{a}#0")


# -- encodings and normal forms ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("encoding", "mark", "text"),
    [
        ("utf-8", codecs.BOM_UTF8, CHINESE),
        ("utf-16-le", codecs.BOM_UTF16_LE, CHINESE),
        ("utf-16-be", codecs.BOM_UTF16_BE, TRADITIONAL),
        ("gb18030", b"", CHINESE),
        ("gb18030", b"", "猫和狗 cat"),
        ("cp950", b"", TRADITIONAL),
        ("cp950", b"", "裏面的人恒久地站在牆邊，他們說了很多話，然後一起回家了。"),
        ("gb18030", b"", "近谷交縈橤，遙峰對出蓮。徑細無全磴，松小未含煙。"),
        ("utf-8", b"", "naïve café 😀"),
    ],
)
def test_encodings_are_told(made, write, encoding, mark, text):
    path = write("文 件.txt", mark + text.encode(encoding))
    c = made(path, **ALL)
    assert everything(c) == [text] and c.statistics["encodings"] == {encoding: 1}
    table = write("t.jsonl", mark + lines({"text": text}, {"text": text + "2"}).encode(encoding))
    assert everything(made(table, **ALL))[0] == text
    assert everything(made(write("u.csv", mark + f"text\n{text}".encode(encoding)), **ALL))[0] == text.strip("\n")


def test_a_given_encoding(made, write):
    path = write("l.txt", "caf\xe9s".encode("latin-1"))
    assert everything(made(path, text={"encoding": "latin-1"}, **ALL)) == ["cafés"]
    with pytest.raises(DataError, match=r"byte 3 .*data.text.encoding=latin-1"):
        made(path)
    damaged = write("d.txt", CHINESE.encode()[:9] + b"\xff" + CHINESE.encode()[9:])
    with pytest.raises(DataError, match=r"UTF-8 with damage: not valid at byte 9 .*iconv"):
        made(damaged)
    with pytest.raises(DataError, match="there is no encoding 'utf-88'"):
        made(path, text={"encoding": "utf-88"})
    wide = write("w.txt", "one\ntwo".encode("utf-16-le"))
    assert everything(made(wide, text={"encoding": "utf-16-le", "document": "line"}, **ALL)) == ["one", "two"]
    with pytest.raises(DataError, match="zero byte at byte 1"):
        made(wide)


def test_newlines_and_unicode_forms(made, write):
    decomposed = "e\u0301 ﬁ\r\nb\rc\n"
    assert everything(made(write("a.txt", decomposed), **ALL)) == ["é ﬁ\nb\nc\n"]
    assert everything(made(write("a.txt", decomposed), text={"normalize": "nfkc"}, **ALL)) == ["é fi\nb\nc\n"]
    assert everything(made(write("a.txt", decomposed), text={"normalize": None}, **ALL)) == ["e\u0301 ﬁ\nb\nc\n"]
    assert everything(made(write("mac.txt", b"one\rtwo\r"), text={"document": "line"}, **ALL)) == ["one", "two"]


def test_invalid_utf8_is_rejected_with_its_place(made, write):
    text = [f"line {i} is here" for i in range(20)]
    raw = "\n".join(text).encode()
    c = made(write("a.txt", raw[:40] + b"\xff" + raw[40:]), text={"document": "line"}, **ALL)
    assert len(c) == 19 and rejected(c)[0]["record"] == "a.txt line 3" and "at byte 40 (0xff)" in rejected(c)[0]["reason"]
    assert "第 40 字节" in rejected(c)[0]["reason_zh"] and c.statistics["damaged"] == 1
    with pytest.raises(DataError, match=r"a.txt line 3: .*byte 40"):
        made(write("a.txt", raw[:40] + b"\xff" + raw[40:]), text={"document": "line"}, on_bad_record="stop")
    write("d/bad.txt", CHINESE.encode() + b"\xff")
    for i in range(3):
        write(f"d/good {i}.txt", sentence(i))
    c = made(str(write("d/good 0.txt", sentence(0)).parent), **ALL)
    assert len(c) == 3 and [r["record"] for r in rejected(c)] == ["bad.txt"]


# -- bad input -----------------------------------------------------------------------------------------------------------------
def test_damaged_records_are_counted(made, write):
    good = [{"text": sentence(i)} for i in range(10)]
    bad = '{"text": "cut\n' + lines({"body": 3}, {"text": None}, [1]) + '{"text": "\\ud800 half"}\n'
    path = write("a.jsonl", lines(*good) + bad + lines({"text": "last"}))
    c = made(path, **ALL)
    assert len(c) == 11 and c.statistics["damaged"] == 5 and everything(c)[-1] == "last"
    reasons = {r["record"]: r["reason"] for r in rejected(c)}
    assert (
        "not JSON" in reasons["a.jsonl line 11"]
        and "no text" in reasons["a.jsonl line 12"]
        and "half a character" in reasons["a.jsonl line 15"]
    )
    assert any("5 of 16 records were left out" in en for en, _ in c.notes)
    with pytest.raises(DataError, match=r"a.jsonl line 11: not JSON"):
        made(path, on_bad_record="stop")
    with pytest.raises(DataError, match="2 of 3 records are damaged"):
        made(write("b.jsonl", lines({"text": "fine"}) + "{\n{\n"), on_bad_record="skip")
    c = made(write("c.json", '[{"text": "one"}, {"text": "two"}, {"text" "three"}]'), **ALL)
    assert everything(c) == ["one", "two"] and rejected(c)[0]["record"] == "c.json record 3"


def test_nothing_to_read(made, write, tmp_path):
    with pytest.raises(DataError, match="is empty: there is nothing to read"):
        made(write("empty.txt", ""))
    with pytest.raises(DataError, match="is empty: there is nothing to read"):
        made(write("empty.jsonl", ""))
    with pytest.raises(DataError, match="is empty: there is nothing to read"):
        made(write("bom.txt", codecs.BOM_UTF8))
    with pytest.raises(DataError, match="holds no text"):
        made(write("pictures/a.png", b"\x89PNG").parent)
    with pytest.raises(DataError, match="no such file") as caught:
        made(tmp_path / "没有.txt")
    assert "既不是内置名称" in caught.value.zh
    write("d/empty.txt", "")
    c = made(write("d/full.txt", "full").parent, **ALL)
    assert everything(c) == ["full"] and rejected(c)[0]["record"] == "empty.txt" and c.statistics["rejected"] == {"empty": 1}
    with pytest.raises(DataError, match="nothing is left to train on"):
        made(write("x.txt", "x"), split={"validation": 0.9})


def test_very_long_lines(made, write, monkeypatch):
    long = "word " * 2_100_000
    path = write("long.jsonl", lines({"text": "a"}, {"text": long}, {"text": "b"}))
    assert [len(t) for t in everything(made(path, **ALL))] == [1, len(long), 1]
    for module in (decoding, records):
        monkeypatch.setattr(module, "LONGEST", 10**6)
    c = made(write("long.jsonl", lines({"text": "a"}, {"text": long}, {"text": "c"})), **ALL)
    assert everything(c) == ["a", "c"] and rejected(c)[0]["record"] == "long.jsonl line 2"
    c = made(write("long.txt", f"a\n{long}\nb\n"), text={"document": "line"}, **ALL)
    assert everything(c) == ["a", "b"]


def test_a_long_file_is_pieces_that_follow_each_other(made, write, monkeypatch):
    monkeypatch.setattr(records, "PIECE", 1000)
    text = "".join(f"line {i} 春眠不觉晓\n" for i in range(500)) + "不" * 1500 + " end"
    path = write("long.txt", text)
    c = made(path)
    assert "".join(everything(c)) == text and c.continues[1:].all() and not c.continues[0] and c.describe(1) == "long.txt part 2"
    assert set(c.splits) == {"train", "validation"} and c.splits["train"].max() < c.splits["validation"].min()
    assert any("pieces that follow each other" in en for en, _ in c.notes) and any("too few" in en for en, _ in c.notes)
    c = made(write("gb.txt", text.encode("gb18030")), **ALL)
    assert "".join(everything(c)) == text
    raw = text.encode()
    at = raw.index(b"line 60")
    c = made(write("bad.txt", raw[:at] + b"\xff" + raw[at:]), **ALL)
    assert f"byte {at} " in rejected(c)[0]["reason"] and len("".join(everything(c))) > len(text) - 1000


# -- filters and copies --------------------------------------------------------------------------------------------------------
def test_filters(made, write):
    texts = [
        "short",
        "The house of the old man is on the hill, and it was built with the stones that were in the field by the river.",
        "Der alte Mann hat das Haus auf dem Hügel nicht gebaut, und die Steine sind von dem Feld bei dem Fluss und für die Brücke.",
        CHINESE,
        TRADITIONAL,
        "again and again we go\n" * 40,
        "x" * 3000,
    ]
    path = write("a.jsonl", lines(*({"text": t} for t in texts)))
    c = made(path, text={"languages": ["en", "zh-Hant"]}, **ALL)
    assert texts[2] not in everything(c) and {texts[0], texts[1], CHINESE, TRADITIONAL} <= {*everything(c)}
    assert c.statistics["rejected"]["language"] >= 1 and {"en", "zh", "und"} == {*c.statistics["languages"]}
    c = made(path, text={"min_chars": 10, "max_chars": 2000, "repetition": 0.5}, **ALL)
    assert everything(c) == texts[1:5]
    assert c.statistics["rejected"] == {"too short": 1, "repetition": 1, "too long": 1}
    assert {r["start of text"] for r in rejected(c)} == {"short", texts[5][:80], "x" * 80}
    assert c.statistics["before"]["documents"] == 7 and c.statistics["after"]["documents"] == 4
    assert c.statistics["after"]["bytes"] == c.bytes_of("train") == sum(len(t.encode()) for t in texts[1:5])
    with pytest.raises(DataError, match="cannot be told"):
        made(path, text={"languages": ["sv"]})


def test_repetition():
    assert cleaning.repetition("") == 0 and cleaning.repetition(sentence(1, 400)) == 0
    assert cleaning.repetition("a b\n" * 10) == pytest.approx(0.9)
    assert cleaning.repetition(sentence(1, 30) + " " + sentence(1, 30)) == pytest.approx(0.5, abs=0.1)
    assert cleaning.repetition("春眠不觉晓处处闻啼鸟夜来风雨声花落知多少" * 3) > 0.6


def test_signatures_estimate_the_jaccard_similarity():
    words = sentence(1, 2000).split()
    for changed in (0, 20, 60, 200):
        other = words.copy()
        for i in random.Random(2).sample(range(2000), changed):
            other[i] = "changed"
        a, b = ({tuple(w[i : i + 5]) for i in range(1996)} for w in (words, other))
        pair, seen = cleaning.signatures([" ".join(words).upper() + "!", "-".join(other)])
        assert seen.all() and abs((pair[0] == pair[1]).mean() - len(a & b) / len(a | b)) < 0.12
    alone, _ = cleaning.signatures([" ".join(words)])
    beside, seen = cleaning.signatures(["a b", " ".join(words), "x y z", ""])
    assert (alone[0] == beside[1]).all() and seen.tolist() == [False, True, False, False]  # whatever else is in the batch
    for threshold in (0.3, 0.5, 0.8, 0.9, 1.0):
        bands, rows = cleaning.bands_for(threshold)
        assert bands * rows == 128 and 1 - (1 - threshold**rows) ** bands >= 0.9


def copies():
    """30 texts, a slightly changed copy of each of the first 10, and an exact one of each of the first 5."""
    texts = [sentence(i, 200) for i in range(30)]
    return texts + [t.replace(t.split()[100], "other", 1) for t in texts[:10]] + texts[:5]


def test_copies_are_removed(made, write):
    texts = copies()
    c = made(write("a.jsonl", lines(*({"text": t} for t in texts))))
    assert everything(c) == texts[:30]
    assert c.statistics["rejected"] == {"near-duplicate": 10, "exact duplicate": 5}
    assert ("10 near-duplicates were removed", "移除了 10 个近似重复的文档") in c.notes
    assert {"record": "a.jsonl line 41", "reason": "exact duplicate of a.jsonl line 1"}.items() <= rejected(c)[10].items()
    positions = np.concatenate(list(c.splits.values()))
    assert sorted(positions.tolist()) == list(range(30))


def test_one_long_document_sends_no_others_to_one_side(made, write):
    c = made(write("a.jsonl", lines({"text": sentence(0, 30000)}, *({"text": sentence(i, 20)} for i in range(1, 101)))), split={"validation": 0.1})
    assert 5 <= len(c.splits["validation"]) <= 20 and len(c.splits["train"]) >= 81


@pytest.mark.parametrize("by", ["document", "contiguous"])
def test_copies_that_are_kept_stand_on_one_side(made, write, by):
    texts = copies()
    split = {"validation": 0.2, "test": 0.2, "by": by}
    c = made(write("a.jsonl", lines(*({"text": t} for t in texts))), text={"near_duplicates": None}, split=split)
    assert set(c.splits) == {"train", "validation", "test"}
    side = {t: s for s, index in c.splits.items() for t in c.texts(index)}
    assert len(c) == 45 if by == "document" else len(c) < 45
    for i in range(10):
        assert len({side[t] for t in (texts[i], texts[30 + i]) if t in side}) <= 1
    signature, _ = cleaning.signatures(everything(c))
    owner = np.array([next(s for s, index in c.splits.items() if i in index) for i in range(len(c))])
    alike = (signature[:, None] == signature[None]).mean(axis=2) > 0.8
    assert not (alike & (owner[:, None] != owner[None]) & ~c.continues[:, None] & ~np.roll(c.continues, -1)[:, None]).any()


# -- splits --------------------------------------------------------------------------------------------------------------------
def test_contiguous_cuts_at_the_exact_character(made, write):
    text = "".join(random.Random(0).choices("abcdef \n", k=100_003))
    c = made(write("a.txt", text), split={"validation": 0.1, "test": 0, "by": "contiguous"})
    n = int(len(text) * 0.9)
    assert ["".join(c.texts(c.splits[s])) for s in ("train", "validation")] == [text[:n], text[n:]] and "test" not in c.splits
    assert c.continues.tolist() == [False, True] and c.describe(1) == "a.txt"
    c = made(write("a.txt", text), split={"validation": 0.1, "test": 0.2, "by": "contiguous"})
    assert [c.bytes_of(s) for s in ("train", "validation", "test")] == [70_002, 10_000, 20_001]
    assert "".join(everything(c)) == text and c.statistics["after"]["splits"]["test"]["characters"] == 20_001
    chinese = CHINESE * 50
    c = made(write("b.txt", chinese), split={"validation": 0.101, "by": "contiguous"})
    assert "".join(everything(c)) == chinese and abs(c.bytes_of("validation") - 0.101 * len(chinese.encode())) < 4
    c = made(write("a.txt", text))  # one document cannot be divided by document: said so, and cut
    assert "".join(c.texts(c.splits["train"])) == text[:n] and any("too few" in en and "只有 1 个文档" in zh for en, zh in c.notes)


def test_the_split_follows_the_content_and_the_seed(made, write):
    records = [{"text": sentence(i, 20 + i)} for i in range(200)]
    a = made(write("a.jsonl", lines(*records)), split={"validation": 0.1, "test": 0.2})
    b = made(write("b.jsonl", lines(*records[::-1])), split={"validation": 0.1, "test": 0.2})
    for split in a.splits:
        assert sorted(a.texts(a.splits[split])) == sorted(b.texts(b.splits[split]))
    total = a.offsets[-1]
    assert abs(a.bytes_of("validation") / total - 0.1) < 0.01 and abs(a.bytes_of("test") / total - 0.2) < 0.01
    c = made(write("a.jsonl", lines(*records)), split={"validation": 0.1, "test": 0.2, "seed": 1})
    assert c.splits["test"].tolist() != a.splits["test"].tolist() and c.fingerprint != a.fingerprint


def test_the_data_s_own_splits(made, write, tmp_path):
    for name, seeds in (("train", range(20)), ("dev", range(20, 23)), ("test", (*range(23, 26), 5))):
        write(f"own/{name}.jsonl", lines(*({"text": sentence(i)} for i in seeds)))
    c = made(tmp_path / "own")
    assert {s: len(i) for s, i in c.splits.items()} == {"train": 19, "validation": 3, "test": 4}
    assert sentence(5) in list(c.texts(c.splits["test"])) and sentence(5) not in list(c.texts(c.splits["train"]))
    c = made(tmp_path / "own", split={"validation": "given", "test": 0.1}, text={"near_duplicates": None})
    assert len(c.splits["validation"]) == 3 and len(c.splits["test"]) == 2
    assert not {sentence(i) for i in range(23, 26)} & {*c.texts(c.splits["train"])}
    with pytest.raises(DataError, match="has no test split of its own"):
        made(write("a.txt", "text"), split={"test": "given"})


def test_groups_stay_together(made, write):
    path = write("a.jsonl", lines(*({"text": sentence(i), "who": f"w{i % 12}"} for i in range(60))))
    c = made(path, split={"by": "group", "validation": 0.25}, columns={"group": "who"})
    sides = [{i % 12 for i in index.tolist()} for index in c.splits.values()]
    assert len(sides) == 2 and not sides[0] & sides[1] and len(sides[1]) in (2, 3, 4)
    with pytest.raises(DataError, match="needs a column of groups"):
        made(path, split={"by": "group"})
    with pytest.raises(DataError, match="has no columns"):
        made(write("a.txt", "x"), split={"by": "group"}, columns={"group": "who"})


# -- preparing -----------------------------------------------------------------------------------------------------------------
def test_what_was_interrupted_goes_on(made, write, tmp_path, monkeypatch):
    for k in range(4):
        write(f"many/{k}.jsonl", lines(*({"text": t} for t in [sentence(1000 * k + i) for i in range(60)] + copies()[k::4])) + "{broken\n")
    write("many/9.txt", sentence(7))
    monkeypatch.setattr(corpus, "BATCH", (7, 2**19))
    whole = made(tmp_path / "many")
    monkeypatch.setenv("GROUNDUP_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(corpus, "COMMIT_EVERY", 0.0)
    read, flush = corpus.read_item, corpus._FirstPass._flush
    seen, stop_at = [], [40, 30, 100, 3]

    def counted(item, config, start=0):
        for found in read(item, config, start):
            seen.append(found)
            if stop_at and len(seen) == stop_at[0]:
                raise KeyboardInterrupt
            yield found

    def torn(self, queue, items, position):  # killed after writing, before it was written down
        flush(self, queue, items, position)
        if stop_at and stop_at[0] == 3:
            self._files["text.bin"].write(b"torn")
            self._files["rejected.jsonl"].write(b"torn")
            raise KeyboardInterrupt

    monkeypatch.setattr(corpus, "read_item", counted)
    monkeypatch.setattr(corpus._FirstPass, "_flush", torn)
    while stop_at:
        seen.clear()
        with pytest.raises(KeyboardInterrupt):
            made(tmp_path / "many")
        stop_at.pop(0)
    seen.clear()
    with monkeypatch.context() as patch:  # and once more in the second pass
        patch.setattr(corpus, "_statistics", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            made(tmp_path / "many")
    assert 0 < len(seen) < 200  # what was done is not done again
    again = made(tmp_path / "many")
    assert again.fingerprint == whole.fingerprint and again.statistics == whole.statistics and again.notes == whole.notes
    assert everything(again) == everything(whole) and rejected(again) == rejected(whole)
    assert sorted(p.name for p in again.folder.iterdir()) == sorted(p.name for p in whole.folder.iterdir())


def test_a_finished_corpus_is_opened(made, write, monkeypatch):
    path = write("a.jsonl", lines(*({"text": sentence(i)} for i in range(30))))
    first = made(path)
    monkeypatch.setattr(corpus, "_prepare", lambda *a: pytest.fail("prepared again"))
    second = made(path)
    assert second.fingerprint == first.fingerprint and second.text(3) == sentence(3) and second.files == first.files
    monkeypatch.undo()
    with open(first.text_file, "r+b") as file:
        file.truncate(10)
    assert made(path).text(3) == sentence(3)  # a damaged one is made again
    os.utime(path, (1, 1))
    assert made(path).fingerprint == first.fingerprint and made(path).folder != first.folder


def test_a_second_process_waits(write, tmp_path):
    import subprocess
    import sys
    import threading

    path = write("a.jsonl", lines(*({"text": sentence(i)} for i in range(30))))
    config = Data(source=str(path))
    key = corpus._key(config, documents.open_parts(config))
    home = corpus.cache_folder() / f"v{corpus.VERSION}" / "text"
    home.mkdir(parents=True, exist_ok=True)
    code = "import sys; from pathlib import Path; from groundup.core.run import Lock; Lock(Path(sys.argv[1])).acquire(); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(home / f"{key}.lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        other.stdout.readline()
        told = []

        def tell(what, share):
            told.append(what)
            if len(told) == 1:
                threading.Timer(0.1, lambda: (other.stdin.write("\n"), other.stdin.close())).start()

        c = prepare_corpus(config, progress=tell)
    assert len(c) == 30 and told[0] == f"waiting for process {other.pid}, which prepares the same text"


def test_statistics_fit_json(made, write):
    c = made(write("a.jsonl", lines(*({"text": CHINESE + sentence(i)} for i in range(30)))))
    assert json.loads(json.dumps(c.statistics)) == c.statistics
    assert {"before", "after", "rejected", "languages", "characters", "encodings"} <= {*c.statistics}
    assert c.statistics["after"]["splits"]["train"]["documents"] == len(c.splits["train"])
    assert len(c.fingerprint) == 64 and list(c.files) == ["a.jsonl"] and len(c.files["a.jsonl"]) == 64


def test_text_is_told_from_vectors_and_pictures(write, tmp_path, picture):
    def told(spec, **settings):
        return is_text(str(spec), Data.model_validate({"source": str(spec)} | settings))

    assert (
        told(write("a.md", "# hi"))
        and told(write("b.py", "x = 1"))
        and told(write("c.txt", "To be, or not to be\nthat is, the question\n"))
    )
    assert told(write("d.jsonl", lines({"text": "x"}))) and told(write("e.csv", "text,label\nhello there,1\nyes,0\n")) and told("stdlib")
    assert told(write("one.txt", "airplane\nautomobile\nbird\n")) and told(write("docs/a.txt", "some words here").parent)
    assert told(write("q.jsonl", lines({"question": "a", "answer": "b"})), text={"column": "answer"})
    assert not told(write("v.txt", "1 2 3\n4 5 6\n".replace(" ", ","))) and not told(write("n.txt", "6\n9\n9\n")) and not told("digits")
    assert (
        not told(write("iris.csv", "a,b,species\n1,2,x\n3,4,y\n")) and not told(tmp_path / "nothing.md") and not told(write("x.npz", b"PK"))
    )
    assert not told(write("p.csv", "file,label\na.png,cat\nb.png,dog\n")) and not told(
        write("p.jsonl", lines({"image": "a.png", "text": "cat"}))
    )
    picture(tmp_path / "photos" / "cat" / "a.png")
    write("photos/README.md", "about")
    assert not told(tmp_path / "photos") and not told(write("tables/v.csv", "a,b,y\n1,2,0\n3,4,1\n").parent)
