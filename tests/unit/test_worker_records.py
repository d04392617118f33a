from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.errors import DataError
from launcher.recipe_sections import DATA_COLUMNS
from launcher.worker.records import (
    _KEYS,
    _OPTIONAL,
    _TURN_KEYS,
    SHAPES,
    Conversation,
    Passage,
    alpaca_text,
    detect_format,
    rename_columns,
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


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def messages_of(record: Any, record_format: Any) -> list[dict[str, Any]]:
    example = to_example(record, record_format, where="line 1")
    assert isinstance(example, Conversation)
    return [dict(message) for message in example.messages]


def test_the_columns_of_a_recipe_are_those_that_formats_have() -> None:
    named = {*_TURN_KEYS["messages"], *_TURN_KEYS["sharegpt"]}
    for table in (_KEYS, _OPTIONAL):
        named |= {key for keys in table.values() for key in keys}
    assert named == set(DATA_COLUMNS)


def test_columns_are_renamed_and_others_stay() -> None:
    record = {"question": "2+2=", "answer": "4", "id": 7}
    columns = {"prompt": "question", "completion": "answer"}
    renamed = rename_columns(record, columns, where="line 1")
    assert renamed == {"prompt": "2+2=", "completion": "4", "id": 7}
    assert detect_format(renamed) == "prompt_completion"


def test_two_columns_can_change_places() -> None:
    columns = {"prompt": "completion", "completion": "prompt"}
    assert rename_columns(PAIR, columns, where="line 1") == {"prompt": "4", "completion": "2+2="}


def test_keys_of_turns_are_renamed_in_every_turn() -> None:
    record = {"dialog": [{"speaker": "human", "says": "hi"}, {"speaker": "gpt", "says": "hello"}]}
    columns = {"conversations": "dialog", "from": "speaker", "value": "says"}
    renamed = rename_columns(record, columns, where="line 1")
    assert to_example(renamed, "sharegpt", where="x") == to_example(SHAREGPT, "sharegpt", where="x")


def test_a_named_column_that_a_record_lacks_is_an_error_unless_it_is_optional() -> None:
    with pytest.raises(DataError, match="no column 'question' for 'prompt'") as caught:
        rename_columns({"q": "x"}, {"prompt": "question"}, where="train.csv line 2")
    assert caught.value.where == "train.csv line 2"
    assert "found the keys ['q']" in caught.value.problem
    assert rename_columns(ALPACA, {"system": "persona"}, where="line 1") == ALPACA


def test_another_format_later_in_a_file_is_said() -> None:
    with pytest.raises(DataError) as caught:
        to_example(PAIR, "alpaca", where="train.jsonl line 9")
    assert caught.value.problem == ("this record is prompt_completion, those before it are alpaca")
    assert caught.value.where == "train.jsonl line 9"


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_and_turns_may_be_json_in_a_string_as_in_csv(as_text: bool) -> None:
    record: dict[str, Any] = {**MESSAGES, "tools": [TOOL]}
    if as_text:
        record = {key: json.dumps(value) for key, value in record.items()}
    example = to_example(record, "messages", where="line 1")
    assert isinstance(example, Conversation)
    assert example.tools == (TOOL,)
    assert [turn["content"] for turn in example.messages] == ["hi", "hello"]


def test_arguments_of_calls_become_objects_and_a_null_call_goes() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    turns = [
        {"role": "user", "content": "1?", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    user, assistant = messages_of({"messages": turns}, "messages")
    assert "tool_calls" not in user
    assert assistant["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}


def test_sharegpt_calls_results_and_system_text_find_their_places() -> None:
    record = {
        "system": "Be brief.",
        "conversations": [
            {"from": "human", "value": "1+1?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "two"},
        ],
    }
    messages = messages_of(record, "sharegpt")
    roles = [message["role"] for message in messages]
    assert roles == ["system", "user", "assistant", "tool", "assistant"]
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    assert messages[2]["tool_calls"] == [call]


def test_a_history_that_is_no_list_is_refused() -> None:
    with pytest.raises(DataError, match="'history' is int 5, not a list"):
        to_example({**ALPACA, "history": 5}, "alpaca", where="line 1")


def test_alpacas_system_text_and_history_become_turns() -> None:
    record = {**ALPACA, "system": "Be brief.", "history": [["a", "b"], ["c", "d"]]}
    said = [(message["role"], message["content"]) for message in messages_of(record, "alpaca")]
    assert said == [
        ("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c"),
        ("assistant", "d"), ("user", "Add.\n\n1 2"), ("assistant", "3"),
    ]  # fmt: skip
    example = to_example(record, "alpaca", where="line 1")
    assert isinstance(example, Conversation)
    with pytest.raises(DataError, match="no place for 'system' and 'history'"):
        alpaca_text(example, where="line 1")


_LEAVES = st.sampled_from(
    [None, True, 0, 1.5, "", "x", "user", "assistant", "gpt", "function_call", "[]", "{", "\ud83d"]
)
_NAMES = st.sampled_from([*DATA_COLUMNS, "tool_calls", "function", "name", "arguments", "type"])
_FLAT = st.dictionaries(_NAMES, _LEAVES, max_size=4)
_VALUES = _LEAVES | _FLAT | st.lists(_LEAVES | _FLAT, max_size=3)
_TURNS = st.lists(st.dictionaries(_NAMES, _VALUES, max_size=4), max_size=3)


@given(
    record=_VALUES | st.dictionaries(_NAMES, _VALUES | _TURNS, max_size=5),
    columns=st.dictionaries(_NAMES, _NAMES, max_size=2),
)
@settings(max_examples=100)
def test_whatever_a_record_is_it_becomes_an_example_or_an_error_in_words(
    record: Any, columns: dict[str, str]
) -> None:
    for record_format in SHAPES:
        with contextlib.suppress(DataError):
            renamed = rename_columns(record, columns, where="line 1")
            example = to_example(renamed, record_format, where="line 1")
            texts = (
                [example.prompt, example.completion]
                if isinstance(example, Passage)
                else [message["content"] for message in example.messages]
            )
            assert all(isinstance(text, str) for text in texts)
