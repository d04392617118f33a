from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import DataError
from launcher.worker.records import (
    Conversation,
    Passage,
    alpaca_text,
    detect_format,
    read_records,
    to_example,
)

MESSAGES = {
    "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
}
SHAREGPT = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}
ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}
PAIR = {"prompt": "2+2=", "completion": "4"}
TEXT = {"text": "once upon a time"}


@pytest.mark.parametrize(
    ("record", "name"),
    [
        (MESSAGES, "messages"),
        (SHAREGPT, "sharegpt"),
        (ALPACA, "alpaca"),
        ({"instruction": "Add.", "output": "3"}, "alpaca"),
        (PAIR, "prompt_completion"),
        (TEXT, "text"),
    ],
)
def test_each_format_is_known_by_its_keys(record: dict[str, Any], name: str) -> None:
    assert detect_format(record) == name


def test_messages_and_sharegpt_give_the_same_conversation() -> None:
    one = to_example(MESSAGES, "messages", where="line 1")
    assert one == to_example(SHAREGPT, "sharegpt", where="line 1")
    assert isinstance(one, Conversation)
    assert [turn["role"] for turn in one.messages] == ["user", "assistant"]


def test_alpaca_joins_instruction_and_input_into_the_users_turn() -> None:
    example = to_example(ALPACA, "alpaca", where="line 1")
    assert isinstance(example, Conversation)
    assert example.messages[0]["content"] == "Add.\n\n1 2"


def test_alpaca_without_a_chat_template_uses_the_published_prompt() -> None:
    example = to_example({"instruction": "Add.", "output": "3"}, "alpaca", where="line 1")
    assert isinstance(example, Conversation)
    passage = alpaca_text(example)
    # README of github.com/tatsu-lab/stanford_alpaca, the prompt without an input.
    assert passage.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nAdd.\n\n### Response:\n"
    )
    assert passage.completion == "3"


def test_a_text_record_has_no_prompt() -> None:
    example = to_example(TEXT, "text", where="line 1")
    assert example == Passage(prompt="", completion="once upon a time")


def test_text_parts_of_a_message_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    record = {"messages": [{"role": "user", "content": parts}, MESSAGES["messages"][1]]}
    example = to_example(record, "messages", where="line 1")
    assert isinstance(example, Conversation)
    assert example.messages[0]["content"] == "ab"


def test_an_assistant_turn_of_tool_calls_needs_no_content() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    example = to_example({"messages": [call]}, "messages", where="line 1")
    assert isinstance(example, Conversation)
    assert example.messages[0]["content"] == ""


@pytest.mark.parametrize(
    ("record", "record_format", "problem"),
    [
        ({"messages": []}, "messages", "not a list of turns"),
        ({"messages": [{"content": "x"}]}, "messages", "turn 1 has no 'role'"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages", "'content' is int 3"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages", "no assistant turn"),
        ({"conversations": [{"from": "me", "value": "x"}]}, "sharegpt", "is from 'me'"),
        ({"prompt": "x"}, "prompt_completion", "no 'completion', found the keys ['prompt']"),
        ({"text": None}, "text", "'text' is null, not text"),
        (["x"], "text", "no 'text', found list [\"x\"]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "messages",
            "only text can be trained on",
        ),
    ],
)
def test_a_record_of_the_wrong_shape_is_named_with_its_line(
    record: Any, record_format: Any, problem: str
) -> None:
    with pytest.raises(DataError) as caught:
        to_example(record, record_format, where="train.jsonl line 7")
    assert caught.value.where == "train.jsonl line 7"
    assert problem in caught.value.problem


def test_an_unknown_shape_lists_the_shapes_that_are_accepted() -> None:
    with pytest.raises(DataError) as caught:
        detect_format({"question": "x", "answer": "y"})
    assert "found the keys ['answer', 'question']" in caught.value.problem
    for key in ("messages", "conversations", "instruction", "completion", "text"):
        assert key in caught.value.fix


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
    path = tmp_path / "train.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"\.parquet is not a format"):
        list(read_records(path))
