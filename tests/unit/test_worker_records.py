from __future__ import annotations

from typing import Any

import pytest

from launcher.errors import DataError
from launcher.worker.records import (
    Conversation,
    Passage,
    alpaca_text,
    detect_format,
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
    passage = alpaca_text(example, where="line 1")
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
