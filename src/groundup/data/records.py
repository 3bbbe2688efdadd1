"""From an item to its records: text files, lines, paragraphs, JSON, tables, Parquet, rows of the hub and of user code."""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any, NoReturn

from groundup.core.errors import DataError, GroundupError, did_you_mean
from groundup.core.messages import LANGUAGES, cause_of
from groundup.core.recipe import Data
from groundup.data import conversations
from groundup.data.cleaning import Reason
from groundup.data.decoding import (
    Again,
    Ends,
    Plain,
    damage,
    decode,
    detect,
    lines_of,
    named_encoding,
    open_item,
    read_plain,
    read_up_to,
    too_long,
    undecodable,
)
from groundup.data.items import HEAD, LONGEST, PIECE, TEXT_COLUMNS, Found, Item
from groundup.data.table import MISSING


def read_item(item: Item, config: Data, start: int = 0) -> Iterator[Found]:
    """The records of an item, in order, from the one numbered `start` (counted from 0, rejected ones too). What cannot be read is a Found with
    its reason; where nothing behind it can be read either, the item ends there.

    Raises:
        DataError: no text column in data that consist of one file, or a package that is missing.
    """
    read = {"file": _texts, "jsonl": _json_lines, "json": _json_values, "table": _table, "parquet": _parquet, "rows": _rows}[item.kind]
    unit = {"jsonl": "line", "table": "line", "json": "record"}.get(item.kind, "")
    found = Found(None, unit=unit)
    try:
        for found in read(item, config, start):
            yield found
    except UnicodeDecodeError as error:
        yield Found(None, undecodable(error, error.start), found.unit, found.place + 1 if found.unit else 0, last=True)
    except Ends as end:
        yield Found(None, end.reason, last=True)
    except damage() as error:
        where, where_zh = (f" behind {found.unit} {found.place}", f"（在第 {found.place} 处之后）") if found.place else ("", "")
        cause, cause_zh = [cause_of(error, k) if isinstance(error, OSError) else str(error) or type(error).__name__ for k in LANGUAGES]
        reason = Reason("unreadable", f"cannot be read{where}: {cause}", f"无法读取{where_zh}：{cause_zh}", damaged=True)
        yield Found(None, reason, last=True)


# -- text files ----------------------------------------------------------------------------------------------------------------
def _texts(item: Item, config: Data, start: int) -> Iterator[Found]:
    with open_item(item) as stream:
        if config.text.document == "line":
            yield from itertools.islice(_of_lines(read_plain(stream, config)), start, None)
        elif config.text.document == "paragraph":
            yield from itertools.islice(_of_paragraphs(read_plain(stream, config)), start, None)
        else:
            yield from itertools.islice(_pieces(stream, config), start, None)


def _of_lines(plain: Plain) -> Iterator[Found]:
    for number, (offset, raw) in enumerate(lines_of(plain), 1):
        text = decode(raw, plain.encoding, offset) if raw is not None else too_long()
        if isinstance(text, Reason):
            yield Found(None, text, "line", number)
            continue
        for part in text.replace("\r\n", "\n").replace("\r", "\n").split("\n"):
            if part and not part.isspace():
                yield Found(part, None, "line", number)


def _of_paragraphs(plain: Plain) -> Iterator[Found]:
    number, size, held = 1, 0, list[str]()
    damage: Reason | None = None
    for offset, raw in itertools.chain(lines_of(plain), [(0, b"")]):
        text = decode(raw, plain.encoding, offset) if raw is not None else too_long()
        if isinstance(text, Reason):
            damage = damage or text
            continue
        for line in text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n"):
            if line.strip() and size + len(line) <= LONGEST:
                held.append(line)
                size += len(line)
                continue
            if line.strip():
                damage = damage or too_long()
                continue
            if held or damage:
                yield Found(None if damage else "\n".join(held), damage, "paragraph", number)
                number, size, held, damage = number + 1, 0, [], None


def _pieces(stream: IO[bytes], config: Data) -> Iterator[Found]:
    """A whole file as one document; one of more than PIECE bytes as pieces that follow each other."""
    data = read_up_to(stream, PIECE + 1)
    if len(data) <= PIECE:
        yield Found(text) if isinstance(text := _whole(data, config), str) else Found(None, text)
        return
    plain = read_plain(io.BufferedReader(Again(data, stream)), config)
    data, offset, number, ends = b"", plain.offset, 1, False
    while True:
        data += read_up_to(plain.stream, PIECE + 1 - len(data))
        ends = len(data) <= PIECE
        cut = len(data) if ends else max(data.rfind(plain.newline, 0, PIECE) + 1, 0) or data.rfind(b" ", 0, PIECE) + 1 or PIECE
        text = decode(data[:cut], plain.encoding, offset)
        if isinstance(text, Reason) and cut == PIECE and not ends:  # one line: perhaps only a character was cut through
            for shorter in range(PIECE - 1, PIECE - 4, -1):
                if isinstance(again := decode(data[:shorter], plain.encoding, offset), str):
                    cut, text = shorter, again
                    break
        yield Found(text, None, "part", number, piece=True) if isinstance(text, str) else Found(None, text, "part", number, piece=True)
        if ends:
            return
        data, offset, number = data[cut:], offset + cut, number + 1


def _whole(data: bytes, config: Data) -> str | Reason:
    if config.text.encoding != "auto":
        encoding, mark = named_encoding(config.text.encoding), 0
        mark = len(codecs.BOM_UTF8) if encoding == "utf-8" and data.startswith(codecs.BOM_UTF8) else 0
    else:
        told = detect(data, whole=True)
        if isinstance(told, Reason):
            return told
        encoding, mark = told
    return decode(data[mark:], encoding, mark)


def encoding_of(item: Item, config: Data) -> str:
    """The encoding of a text item by its beginning, for the statistics; '?' where it is not text."""
    if item.kind in ("parquet", "rows"):
        return "utf-8"
    try:
        with open_item(item) as stream:
            return read_plain(stream, config).named
    except Ends:
        return "?"
    except damage():
        return "?"


# -- records -------------------------------------------------------------------------------------------------------------------
class Columns:
    """Finds the text of records, by the column asked for or recognised in the first one."""

    def __init__(self, item: Item, config: Data) -> None:
        self._item, self._wanted, self._group = item, config.text.column, config.columns.group
        self.whole = config.text.document in ("conversation", "preference")  # a record is read as a whole, not one of its columns
        self._preference = config.text.document == "preference"
        self._answer = config.columns.target if isinstance(config.columns.target, str) else None
        self._only: str | None = None
        self._first = True
        self._keys: tuple[Any, ...] = ()  # of the record before: records are mostly alike
        self._named: str | None = None

    def records(self, value: Any) -> Iterator[dict[str, Any] | str | Reason]:
        """The records in a JSON value: lists in lists are opened, and a book whose text column holds records is its records."""
        if isinstance(value, list) and not value:
            yield Reason("not a record", "an empty list", "空列表", damaged=True)
        elif self.whole and isinstance(value, list) and not all(isinstance(v, dict) for v in value):
            yield conversations.not_a_record(value)
        elif self.whole and (turns := conversations.turns_key(value)):
            yield {turns: value}
        elif isinstance(value, list):
            for inner in value:
                yield from self.records(inner)
        elif self.whole:
            yield value
        elif isinstance(value, dict):
            name = self._column(value)
            inner = value.get(name) if name else None
            if isinstance(inner, list) and any(isinstance(v, dict) for v in inner):
                for v in inner:
                    yield from self.records(v)
            else:
                yield value
        elif isinstance(value, str):
            yield value
        else:
            found = type(value).__name__
            yield Reason(
                "not a record", f"{found} where an object like {{...}} is expected", f"应为对象 {{...}}，却是 {found}", damaged=True
            )

    def named(self, column: str) -> None:
        """The column is known, whatever the first record has in it."""
        self._wanted = column

    def _column(self, record: dict[str, Any]) -> str | None:
        if self._wanted is not None:
            return self._wanted if self._wanted in record else None
        if self._named is None or tuple(record) != self._keys or not isinstance(record[self._named], str | list):
            lower = {str(k).lower(): k for k, v in record.items() if isinstance(v, str | list)}
            self._keys, self._named = tuple(record), next((lower[c] for c in TEXT_COLUMNS if c in lower), None)
        return self._named or self._only

    def found(self, record: dict[str, Any] | str | Reason, unit: str, place: int) -> Found:
        """One record's text. Raises DataError or Ends where the first record shows no text column."""
        if isinstance(record, Reason):
            return Found(None, record, unit, place)
        if self.whole:
            return self._conversation(record, unit, place)
        if isinstance(record, str):
            return Found(record, None, unit, place)
        if self._first:
            strings = [k for k, v in record.items() if isinstance(v, str)]
            empty = next((k for k, v in record.items() if v is None and (str(k).lower() in TEXT_COLUMNS or not strings)), None)
            if self._column(record) is None and empty is not None:  # another one tells which column it is
                return Found(None, _lacks(str(empty)), unit, place)
            self._first = False
            if self._column(record) is None:
                if self._wanted is None and len(strings) == 1:
                    self._only = strings[0]
                else:
                    self.missing([str(k) for k in record], strings)
        name = self._column(record)
        value = record.get(name) if name is not None else None
        group = ""
        if self._group is not None:
            if record.get(self._group) is None:
                return Found(None, _lacks(self._group), unit, place)
            group = str(record[self._group])
        if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
            title = record.get("title")
            lines = [title, *value] if isinstance(title, str) and title.strip() and name != "title" else value
            return Found("\n".join(lines), None, unit, place, group)
        if isinstance(value, str) or value == []:
            return Found(value or "", None, unit, place, group)
        return Found(None, _lacks(name or self._wanted or "/".join(TEXT_COLUMNS[:3])), unit, place)

    def _conversation(self, record: Any, unit: str, place: int) -> Found:
        group = ""
        if self._group is not None:
            if not isinstance(record, dict) or record.get(self._group) is None:
                return Found(None, _lacks(self._group), unit, place)
            group = str(record[self._group])
        if self._answer is not None and isinstance(record, dict):  # the columns were named: a question and its answer
            asked = self._wanted or next((k for k in conversations.PROMPTS if k in record), "text")
            if lacking := next((c for c in (asked, self._answer) if record.get(c) in (None, "")), None):
                return Found(None, _lacks(lacking), unit, place)
            record = {"prompt": str(record[asked]), "completion": str(record[self._answer])}
        if isinstance(record, str) and unit in ("line", "record"):  # of JSON, where a record is an object
            return Found(None, conversations.not_a_record(record), unit, place)
        made = (conversations.read_preference if self._preference else conversations.read)(record)
        if isinstance(made, Reason):
            return Found(None, made, unit, place)
        return Found(conversations.line(made), None, unit, place, group)

    def missing(self, columns: Sequence[str], strings: Sequence[str]) -> NoReturn:
        """Raises DataError: none of these columns is the text; Ends where the item is one of many."""
        listed = ", ".join(columns) or "(none)"
        if not self._item.alone and self._wanted is None:
            raise Ends(Reason("no text column", f"no text column; it has {listed}", f"没有文本列；它有 {listed}"))
        if self._wanted is not None:
            hint, hint_zh = did_you_mean(self._wanted, columns)
            raise DataError(
                "{name} has no column '{wanted}'." + hint, "{name} 没有列 '{wanted}'。" + hint_zh, name=self._item.name, wanted=self._wanted
            )
        raise DataError(
            "{name}: which column holds the text? It has {columns}",
            "{name}：哪一列是文本？它有 {columns}",
            name=self._item.name,
            columns=listed,
            fix="--set data.text.column={column}",
            column=next(iter(strings), "NAME").replace("{", "{{").replace("}", "}}"),
        )


def _lacks(column: str) -> Reason:
    return Reason("no text", f"no text in '{column}'", f"'{column}' 中没有文本", damaged=True)


def _not_json(error: Exception) -> Reason:
    return Reason("not JSON", f"not JSON: {error}", f"不是 JSON：{error}", damaged=True)


def _json_lines(item: Item, config: Data, start: int) -> Iterator[Found]:
    with open_item(item) as stream:
        plain = read_plain(stream, config)
        if plain.stream.peek(64).lstrip()[:1] == b"[":  # type: ignore[attr-defined]
            yield from itertools.islice(_values(plain, item, config), start, None)
            return
        columns, count = Columns(item, config), 0
        for number, (offset, raw) in enumerate(lines_of(plain), 1):
            if raw is not None and raw.isspace():
                continue
            text = decode(raw, plain.encoding, offset) if raw is not None else too_long()
            records: Iterable[Any] = [text]
            if isinstance(text, str):
                try:
                    records = columns.records(json.loads(text))
                except (ValueError, RecursionError) as error:
                    records = [_not_json(error)]
            for record in records:
                made = columns.found(record, "line", number)
                if count >= start:
                    yield made
                count += 1


def _json_values(item: Item, config: Data, start: int) -> Iterator[Found]:
    with open_item(item) as stream:
        yield from itertools.islice(_values(read_plain(stream, config), item, config), start, None)


def _values(plain: Plain, item: Item, config: Data) -> Iterator[Found]:
    """The elements of a JSON array, or JSON values behind each other, without holding them all."""
    columns, number = Columns(item, config), 0
    for value in parse_json(plain):
        if isinstance(value, Reason):
            yield Found(None, value, "record", number + 1)
            return
        for record in columns.records(value):
            number += 1
            yield columns.found(record, "record", number)


def parse_json(plain: Plain) -> Iterator[Any]:
    """JSON values, elements of a top-level array one by one; a Reason where it is not JSON: what follows cannot be read."""
    decoder, parse = codecs.getincrementaldecoder(plain.encoding)(), json.JSONDecoder().raw_decode
    buffer, at, ended, inside, read = "", 0, False, False, plain.offset

    def more() -> None:
        nonlocal buffer, at, ended, read
        data = plain.stream.read1(max(HEAD, len(buffer) - at))  # type: ignore[attr-defined]
        held = len(decoder.getstate()[0])
        try:
            buffer, at, ended = buffer[at:] + decoder.decode(data, not data), 0, not data
        except UnicodeDecodeError as error:
            raise Ends(undecodable(error, read - held + error.start)) from error
        read += len(data)

    between = re.compile(r"[\s,]*")
    first = True
    while True:
        at = between.match(buffer, at).end()  # type: ignore[union-attr]
        if at == len(buffer):
            if ended:
                if inside:
                    yield _not_json(ValueError("the array does not end"))
                return
            more()
            continue
        if first and buffer[at] == "[":
            first, inside, at = False, True, at + 1
            continue
        first = False
        if inside and buffer[at] == "]":
            inside, at = False, at + 1
            continue
        try:
            value, end = parse(buffer, at)
            if end == len(buffer) and not ended:  # a number could go on
                more()
                continue
        except (ValueError, RecursionError) as error:
            near = getattr(error, "pos", 0) > len(buffer) - 16 or str(error).startswith("Unterminated")
            if ended or not near or isinstance(error, RecursionError):
                yield _not_json(error)
                return
            if len(buffer) - at > LONGEST:
                yield too_long()
                return
            more()
            continue
        yield value
        at = end


def _table(item: Item, config: Data, start: int) -> Iterator[Found]:
    """CSV and TSV. The text column is the one asked for, one with a known name, or the only one that is not numbers."""
    with open_item(item) as stream:
        plain = read_plain(stream, config)
        bad: list[Found] = []
        number = 0

        def lines() -> Iterator[str]:
            nonlocal number
            for number, (offset, raw) in enumerate(lines_of(plain), 1):
                text = decode(raw, plain.encoding, offset) if raw is not None else too_long()
                if isinstance(text, str):
                    yield text
                else:
                    bad.append(Found(None, text, "line", number))
                    yield "\n"

        text = lines()
        head = list(itertools.islice(text, 50))
        delimiter = delimiter_of(item.name, next((h for h in head if h.strip()), ""))
        reader = csv.reader(itertools.chain(head, text), delimiter=delimiter)
        header, sample = header_of(head, delimiter)
        if not header:
            return
        columns = Columns(item, config)
        name = None if columns.whole else text_column(header, sample, config.text.column)
        if name is None and not columns.whole:
            columns.missing(header, [h for h in header if h])
        places = {h: i for i, h in enumerate(header) if columns.whole or h in (name, config.columns.group)}
        count, begun = 0, False
        while True:
            try:
                with _long_cells():
                    row = next(reader)
            except StopIteration:
                row = None
            except csv.Error as error:
                row, reason = [], Reason("not a table", f"not a delimited table: {error}", f"不是分隔符表格：{error}", damaged=True)
                bad.append(Found(None, reason, "line", reader.line_num))
            while bad:
                if count >= start:
                    yield bad[0]
                count += 1
                bad.pop(0)
            if row is None:
                return
            if not any(cell.strip() for cell in row):
                continue
            if not begun:
                begun = True
                continue
            if count >= start:
                if len(row) != len(header):
                    facts = f"{len(row)} cells where the header has {len(header)}", f"有 {len(row)} 个单元格，表头有 {len(header)} 个"
                    yield Found(None, Reason("cells", *facts, damaged=True), "line", reader.line_num)
                else:
                    record = {h: row[i] for h, i in places.items()}
                    if columns.whole:
                        yield columns.found(record, "line", reader.line_num)
                    elif config.columns.group is not None and not record.get(config.columns.group):
                        yield Found(None, _lacks(config.columns.group), "line", reader.line_num)
                    else:
                        yield Found(record[str(name)], None, "line", reader.line_num, record.get(config.columns.group or "", ""))
            count += 1


@contextlib.contextmanager
def _long_cells() -> Iterator[None]:
    """The csv module's limit is one for the whole process: it is put back."""
    before = csv.field_size_limit(LONGEST)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def delimiter_of(name: str, line: str) -> str:
    if name.lower().removesuffix(".gz").removesuffix(".zst").endswith(".tsv"):
        return "\t"
    return max(",\t;|", key=line.count) if any(d in line for d in ",\t;|") else ","


def header_of(lines: list[str], delimiter: str) -> tuple[list[str], list[list[str]]]:
    """The cells of the first row, and some rows below it."""
    rows: list[list[str]] = []
    with contextlib.suppress(csv.Error), _long_cells():
        for row in csv.reader(lines, delimiter=delimiter):
            if any(cell.strip() for cell in row):
                rows.append([cell.strip() for cell in row])
    return (rows[0], rows[1:]) if rows else ([], [])


def text_column(header: Sequence[str], sample: Sequence[Sequence[str]], wanted: str | None, *, by_name: bool = False) -> str | None:
    """The column of a table that holds the text, or None. `by_name`: only if its name says so."""
    if wanted is not None:
        return wanted if wanted in header else None
    texts = [h for i, h in enumerate(header) if not all(is_number(row[i]) for row in sample if i < len(row)) or not sample]
    lower = {h.lower(): h for h in texts}
    named = next((lower[c] for c in TEXT_COLUMNS if c in lower), None)
    return named if named or by_name or len(texts) != 1 else texts[0]


def is_number(cell: str) -> bool:
    if cell.lower() in MISSING:
        return True
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _parquet(item: Item, config: Data, start: int) -> Iterator[Found]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    assert item.path is not None
    if item.archive is not None:
        reason = Reason(
            "in an archive", "Parquet inside an archive is not read: unpack it", "不读取压缩包内的 Parquet：请先解压", damaged=True
        )
        yield Found(None, reason)
        return
    with parquet.ParquetFile(item.path) as file:
        kinds = {f.name: f.type for f in file.schema_arrow}
        strings = [n for n, t in kinds.items() if arrow.types.is_string(t) or arrow.types.is_large_string(t)]
        lists = [n for n, t in kinds.items() if arrow.types.is_list(t) or arrow.types.is_large_list(t)]
        columns = Columns(item, config)
        name = None if columns.whole else text_column(strings + lists, [], config.text.column, by_name=True)
        if columns.whole:
            pass
        elif name is None and config.text.column is None and len(strings) == 1:
            name = strings[0]
        if name is not None:
            columns.named(name)
        elif not columns.whole:
            columns.missing(list(kinds), strings)
        wanted = (
            list(kinds) if columns.whole else [c for c in (name, "title" if name in lists else None, config.columns.group) if c in kinds]
        )
        number = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if number + rows <= start:
                number += rows
                continue
            for batch in file.iter_batches(batch_size=64, row_groups=[group], columns=wanted):
                for record in batch.to_pylist():
                    number += 1
                    if number > start:
                        yield columns.found(record, "row", number)


def _rows(item: Item, config: Data, start: int) -> Iterator[Found]:
    """Texts or records of the hub or of user code."""
    assert item.rows is not None
    columns = Columns(item, config)
    rows = iter(item.rows(start))
    for number in itertools.count(start + 1):
        try:
            row = next(rows)
        except StopIteration:
            return
        except GroundupError:
            raise
        except Exception as error:  # the network, or user code
            cause = f"{type(error).__name__}: {error}"
            raise DataError(
                "{name} failed at record {number}: {cause}",
                "{name} 在第 {number} 条记录处出错：{cause}",
                name=item.name,
                number=number,
                cause=cause,
                fix="the same command continues where it stopped",
                fix_zh="再次运行同一命令会从中断处继续",
            ) from error
        if not isinstance(row, str | dict):
            kind = type(row).__name__
            row = Reason("not a record", f"a text or a mapping is expected, not {kind}", f"应为文本或映射，而不是 {kind}", damaged=True)
        yield columns.found(row, "record", number)
