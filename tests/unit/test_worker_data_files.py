from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.errors import DataError
from launcher.worker.data_files import read_records

TEXT = {"text": "once upon a time"}


def test_lines_are_numbered_as_editors_do_and_blank_ones_skipped(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"}\n')
    assert [where for where, _ in read_records(path)] == [
        "train.jsonl line 1",
        "train.jsonl line 3",
    ]


def test_a_json_list_yields_its_elements(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps([TEXT, TEXT]))
    assert list(read_records(path)) == [
        ("train.json record 1", TEXT),
        ("train.json record 2", TEXT),
    ]


def test_a_line_separator_inside_a_string_does_not_end_the_line(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "a\u2028b"}\n', encoding="utf-8")
    assert [value for _, value in read_records(path)] == [{"text": "a\u2028b"}]


def test_a_byte_order_mark_is_not_an_error(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
    assert [value for _, value in read_records(path)] == [{"text": "a"}]


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(DataError) as caught:
        list(read_records(path))
    assert caught.value.where == "train.jsonl line 2"
    assert caught.value.problem.startswith("not JSON: ")


def test_bytes_that_are_not_utf_8_are_named_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xe4"}\n')
    with pytest.raises(DataError, match="byte 0xe4") as caught:
        list(read_records(path))
    assert caught.value.where == "train.jsonl line 2"


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_an_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match="the file is empty"):
        list(read_records(path))


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        list(read_records(tmp_path / "train.jsonl"))


def test_another_kind_of_file_is_refused_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "train.xlsx"
    path.write_bytes(b"PK")
    with pytest.raises(DataError, match=r"\.xlsx is not a kind of file"):
        list(read_records(path))
