"""Records of data files, one at a time and each with its place, in bounded memory."""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from launcher.errors import DataError
from launcher.recipe_paths import DATA_ENDINGS
from launcher.units import MIB, format_bytes
from launcher.worker.records import accepted_shapes, shorten

MAX_RECORD_BYTES = 64 * MIB
"""Longest line or record that is read; a whole novel has about 1 MiB."""
_CHUNK_BYTES = 4 * MIB
_ROWS = 256
"""Rows of a columnar file that are turned into Python values at a time."""


class _DuplicateKeyError(ValueError):
    pass


def read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield each record of a data file with its place (``train.jsonl line 7``).

    Raises:
        DataError: the file is missing, empty, not UTF-8, too long in one record, or broken.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path.suffix or 'no suffix'} is not a kind of file that is read here",
            where=str(path),
            fix=f"convert the data to one of {', '.join(_READERS)}",
        )
    is_empty = True
    try:
        for place, value in reader(path):
            is_empty = False
            yield f"{path.name} {place}", value
    except FileNotFoundError:
        raise DataError("no such file", where=str(path), fix="correct data.path") from None
    except OSError as error:
        raise DataError(
            f"cannot be read: {error.strerror or error}", where=str(path), fix="check the file"
        ) from None
    if is_empty:
        raise DataError("the file is empty", where=str(path), fix=accepted_shapes())


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in _lines(path):
        if line.strip():
            yield f"line {number}", _parse_line(line, f"{path.name} line {number}")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield numbered lines; only a line feed ends one (JSON strings may hold U+2028)."""
    with path.open("rb") as stream:
        number = 0
        while line := stream.readline(MAX_RECORD_BYTES + 1):
            number += 1
            where = f"{path.name} line {number}"
            if len(line) > MAX_RECORD_BYTES:
                raise _too_long(where)
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            try:
                yield number, line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(line[error.start], where) from None


def _parse_line(line: str, where: str) -> Any:
    try:
        return json.loads(line, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        message = error.msg.removesuffix(" at")  # Python's own words are no whole sentences
        problem = f"not JSON: {message} at column {error.colno}: {shorten(line.strip())}"
        raise DataError(problem, where=where, fix="write one JSON object on each line") from None
    except (ValueError, RecursionError) as error:
        raise _unreadable_value(error, where) from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _DuplicateKeyError(f"the key {twice!r} occurs twice in one object")
    return found


def _unreadable_value(error: Exception, where: str) -> DataError:
    """Return what is wrong with JSON that is well-formed, but cannot be taken as it is."""
    if isinstance(error, RecursionError):
        return DataError(
            "nested too deeply", where=where, fix="write records of the documented shapes"
        )
    return DataError(str(error), where=where, fix="mend that record")


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the elements of a list, or the values on lines where the file is no list."""
    with path.open("rb") as stream:
        start = stream.read(64).removeprefix(codecs.BOM_UTF8).lstrip()
    yield from (_json_list(path) if start.startswith(b"[") else _json_lines(path))


def _json_list(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the elements of a JSON list without ever holding the whole list."""
    decoder = json.JSONDecoder(object_pairs_hook=_unique_keys)
    text = _GrowingText(path)
    text.skip("[")
    number = 0
    while text.next_character() != "]":
        if number:
            text.skip(",")
        number += 1
        yield f"record {number}", text.parse(decoder)
    text.skip("]")
    if rest := text.next_character():
        raise text.error(f"{rest!r} after the end of the list")


class _GrowingText:
    """The unread part of a file, of which more is read when a value does not end in it."""

    def __init__(self, path: Path) -> None:
        self._name = path.name
        self._chunks = _text_chunks(path)
        self._text = ""
        self._position = 0
        self._line = 1

    def next_character(self) -> str:
        """Return the next character that is no white space, or nothing at the file's end."""
        while True:
            while self._position < len(self._text) and self._text[self._position].isspace():
                self._position += 1
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._grow():
                return ""

    def skip(self, character: str) -> None:
        """Pass over one character, which must be the one named."""
        found = self.next_character()
        if found != character:
            raise self.error(f"found {found or 'the end of the file'!r} instead of {character!r}")
        self._position += 1

    def parse(self, decoder: json.JSONDecoder) -> Any:
        """Return the value that begins here."""
        if not self.next_character():
            raise self.error("the list does not end")
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                # What looks broken may only be cut off by the end of the part that was read.
                is_too_long = len(self._text) - self._position > MAX_RECORD_BYTES
                if is_too_long or not self._grow():
                    raise self.error(f"{error.msg.removesuffix(' at')} in this record") from None
            except (ValueError, RecursionError) as error:
                raise _unreadable_value(error, self._where()) from None
            else:
                # A number at the end of what was read may go on in what was not.
                if end < len(self._text) or not self._grow():
                    self._position = end
                    return value

    def error(self, problem: str) -> DataError:
        """Return an error about what begins here."""
        return DataError(
            f"not JSON: {problem}: {shorten(self._text[self._position : self._position + 80])}",
            where=self._where(),
            fix="mend that record, or write one JSON object on each line of a .jsonl file",
        )

    def _where(self) -> str:
        return f"{self._name} line {self._line + self._text.count(chr(10), 0, self._position)}"

    def _grow(self) -> bool:
        """Read on, at least as much as is still unread, so that no value is parsed too often."""
        self._line += self._text.count("\n", 0, self._position)
        parts = [self._text[self._position :]]
        wanted = max(len(parts[0]), 1)
        while wanted > 0 and (chunk := next(self._chunks, "")):
            parts.append(chunk)
            wanted -= len(chunk)
        self._text, self._position = "".join(parts), 0
        return len(parts) > 1


def _text_chunks(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line = 1
    with path.open("rb") as stream:
        while True:
            content = stream.read(_CHUNK_BYTES)
            try:
                text = decoder.decode(content, final=not content)
            except UnicodeDecodeError as error:
                line += error.object.count(b"\n", 0, error.start)
                where = f"{path.name} line {line}"
                raise _not_utf8(error.object[error.start], where) from None
            line += text.count("\n")
            if text:
                yield text
            if not content:
                return


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield rows as mappings from the header's names to text."""
    csv.field_size_limit(MAX_RECORD_BYTES)
    lines = (line for _, line in _lines(path))
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    try:
        for row in reader:
            if not row:
                continue
            where = f"line {reader.line_num}"
            if header is None:
                header = row
                twice = sorted({name for name in row if row.count(name) > 1})
                if twice:
                    raise DataError(
                        f"the column {twice[0]!r} occurs twice",
                        where=f"{path.name} {where}",
                        fix="rename one of them",
                    )
                continue
            if len(row) != len(header):
                raise DataError(
                    f"{len(row)} fields, but the header names {len(header)} columns",
                    where=f"{path.name} {where}",
                    fix="put fields that hold commas or line breaks into double quotes",
                )
            yield where, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise DataError(
            f"not CSV: {error}",
            where=f"{path.name} line {reader.line_num}",
            fix="put fields that hold commas, quotes or line breaks into double quotes",
        ) from None


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    path.stat()
    try:
        with ParquetFile(path) as stored:
            yield from _rows(stored.iter_batches(batch_size=_ROWS))
    except ArrowException as error:
        raise _broken_columns(path, "Parquet", error) from None


def _arrow(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the rows of an Arrow file, in the stream format (datasets) or the file format."""
    import pyarrow as pa

    if not path.stat().st_size:
        return
    try:
        with pa.memory_map(str(path)) as source:
            if source.read(6) == b"ARROW1":
                stored = pa.ipc.open_file(source)
                batches = (stored.get_batch(i) for i in range(stored.num_record_batches))
            else:
                source.seek(0)
                batches = iter(pa.ipc.open_stream(source))
            yield from _rows(batches)
    except pa.ArrowException as error:
        raise _broken_columns(path, "Arrow", error) from None


def _rows(batches: Iterator[Any]) -> Iterator[tuple[str, Any]]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _ROWS):
            for row in batch.slice(start, _ROWS).to_pylist():
                number += 1
                yield f"row {number}", without_nested_nulls(row)


def without_nested_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row without the keys that a column's type puts into every nested object.

    All objects of a column have the same keys, so a turn without tool calls has a null there,
    and a template that asks whether there is such a key would find one.
    """
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _broken_columns(path: Path, kind: str, error: Exception) -> DataError:
    first_line = str(error).strip().partition("\n")[0]
    return DataError(
        f"not a {kind} file, or damaged: {first_line}",
        where=str(path),
        fix="copy or write the file again",
    )


def _not_utf8(byte: int, where: str) -> DataError:
    return DataError(f"not UTF-8: byte 0x{byte:02x}", where=where, fix="convert the file to UTF-8")


def _too_long(where: str) -> DataError:
    return DataError(
        f"more than {format_bytes(MAX_RECORD_BYTES)} in one record",
        where=where,
        fix="split the record, or end lines with a line feed",
    )


_READERS: Mapping[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
assert tuple(_READERS) == DATA_ENDINGS
