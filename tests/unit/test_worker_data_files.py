from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.errors import DataError
from launcher.recipe_paths import DATA_ENDINGS
from launcher.recipe_sections import DataSource
from launcher.worker.data_files import read_records
from launcher.worker.data_sources import open_source
from launcher.worker.records import Passage
from launcher.worker.tokenization import prompt_ids

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


def test_a_csv_file_without_rows_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_bytes(b"prompt,completion\n")
    with pytest.raises(DataError, match="the file is empty"):
        list(read_records(path))


def test_fields_of_csv_are_text_and_may_hold_line_breaks(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text('prompt,completion\n2+2=,4\n"a\nb, c","say ""x"""\n')
    assert list(read_records(path)) == [
        ("train.csv line 2", {"prompt": "2+2=", "completion": "4"}),
        ("train.csv line 4", {"prompt": "a\nb, c", "completion": 'say "x"'}),
    ]


@pytest.mark.parametrize(
    ("content", "where", "problem"),
    [
        ("a,b\n1,2\n1,2,3\n", "train.csv line 3", "3 fields, but the header names 2"),
        ("a,b\n1\n", "train.csv line 2", "1 fields, but the header names 2"),
        ("a,a\n1,2\n", "train.csv line 1", "the column 'a' occurs twice"),
        ('a,b\n1,"2\n', "train.csv line 2", "not CSV: unexpected end of data"),
        ('a,b\n1,"2"x\n', "train.csv line 2", "not CSV: ',' expected after '\"'"),
    ],
)
def test_broken_csv_is_named_with_its_line(
    tmp_path: Path, content: str, where: str, problem: str
) -> None:
    path = tmp_path / "train.csv"
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        list(read_records(path))
    assert caught.value.where == where
    assert problem in caught.value.problem


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"text": "a", "text": "b"}', "the key 'text' occurs twice"),
        ('{"x": {"k": 1, "k": 2}}', "the key 'k' occurs twice"),
        ("[" * 100_000, "nested too deeply"),
        ('{"text": 1' + "0" * 5000 + "}", "Exceeds the limit"),
        ('{"text": "a"} {"text": "b"}', "not JSON: Extra data"),
        ('{"text": "a\tb"}', "not JSON: Invalid control character at column 12"),
    ],
)
def test_a_line_that_cannot_be_taken_is_named(tmp_path: Path, line: str, problem: str) -> None:
    for name, content in (("train.jsonl", line), ("train.json", f"[{line}]")):
        if name == "train.json" and problem.startswith("not JSON"):
            continue  # other words there
        path = tmp_path / name
        path.write_text(content)
        with pytest.raises(DataError) as caught:
            list(read_records(path))
        assert caught.value.where == f"{name} line 1"
        assert problem in caught.value.problem


def test_a_line_of_more_than_64_mib_is_refused_before_it_is_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launcher.worker import data_files

    monkeypatch.setattr(data_files, "MAX_RECORD_BYTES", 1000)
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"text": "x" * 987}) + "\n" + json.dumps({"text": "x" * 989}))
    with pytest.raises(DataError, match="more than 1000 B in one record") as caught:
        list(read_records(path))
    assert caught.value.where == "train.jsonl line 2"


@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_list_is_the_same_whatever_part_of_it_is_read_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, indent: int | None
) -> None:
    from launcher.worker import data_files

    monkeypatch.setattr(data_files, "_CHUNK_BYTES", chunk_bytes)
    values = [{"text": "ä😀,]"}, [1, 22, -3.5e7], 123456, "]", {"a": {"b": []}}, None, True]
    path = tmp_path / "train.json"
    path.write_text(json.dumps(values, ensure_ascii=False, indent=indent), encoding="utf-8")
    assert [value for _, value in read_records(path)] == values


@pytest.mark.parametrize(
    ("content", "where", "problem"),
    [
        ('[\n{"a": 1},\n{"a": \n]\n', "train.json line 3", "Expecting value"),
        ('[\n{"a": 1}\n{"a": 2}\n]', "train.json line 3", "instead of ','"),
        ('[{"a": 1}', "train.json line 1", "found 'the end of the file' instead of ','"),
        ('[{"a": 1},', "train.json line 1", "the list does not end"),
        ('[{"a": 1}] x', "train.json line 1", "'x' after the end of the list"),
        ("[{'a': 1}]", "train.json line 1", "Expecting property name"),
    ],
)
def test_a_broken_json_list_is_named_with_its_line(
    tmp_path: Path, content: str, where: str, problem: str
) -> None:
    path = tmp_path / "train.json"
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        list(read_records(path))
    assert caught.value.where == where
    assert problem in caught.value.problem


@given(content=st.binary(max_size=80), suffix=st.sampled_from(DATA_ENDINGS))
@settings(
    max_examples=100,
    deadline=None,  # a busy machine
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_whatever_a_file_holds_it_is_read_or_refused_in_words(
    tmp_path: Path, content: bytes, suffix: str
) -> None:
    path = tmp_path / f"train{suffix}"
    path.write_bytes(content)
    with contextlib.suppress(DataError):
        for where, _ in read_records(path):
            assert where.startswith(path.name)


@pytest.mark.parametrize(
    ("state", "problem"),
    [
        ("{", "names no data files"),
        ("[]", "names no data files"),
        ('{"_data_files": [{"filename": "data.arrow"}]}', r"data\.arrow is missing"),
    ],
)
def test_a_saved_data_set_that_is_damaged_is_refused(
    tmp_path: Path, state: str, problem: str
) -> None:
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(DataError, match=problem):
        open_source("data.path", DataSource(path=str(tmp_path)))


def test_a_sample_prompt_with_half_a_character_is_refused_with_its_place() -> None:
    broken = Passage(prompt="\ud83d", completion="yes")
    with pytest.raises(DataError, match=r"line 1.*not Unicode"):
        prompt_ids(broken, None, where="line 1")
