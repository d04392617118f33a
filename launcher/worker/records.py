"""Training records: read strictly, recognise their shape, and bring them to one of two forms."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from launcher.errors import DataError

Format = Literal["messages", "sharegpt", "alpaca", "prompt_completion", "text"]

SHAPES: Mapping[Format, str] = {
    "messages": '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]}',
    "sharegpt": '{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", ...}]}',
    "alpaca": '{"instruction": "...", "input": "...", "output": "..."}',
    "prompt_completion": '{"prompt": "...", "completion": "..."}',
    "text": '{"text": "..."}',
}
_KEYS: Mapping[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
_OPTIONAL: Mapping[Format, tuple[str, ...]] = {
    "messages": ("tools",),
    "sharegpt": ("system", "tools"),
    "alpaca": ("input", "system", "history"),
    "prompt_completion": ("tools",),
    "text": (),
}
_TURN_KEYS: Mapping[str, tuple[str, str]] = {
    "messages": ("role", "content"),
    "sharegpt": ("from", "value"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Messages as chat templates take them, each with a role and a content."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """Plain text: a prompt, which may be empty, and what follows it."""

    prompt: str
    completion: str


Example = Conversation | Passage


def detect_format(record: Any) -> Format:
    """Return the format that a record's keys show.

    Raises:
        DataError: the record has none of the accepted shapes.
    """
    if isinstance(record, Mapping):
        for name, keys in _KEYS.items():
            if all(key in record for key in keys):
                return name
    raise DataError(
        f"unknown shape: found {describe(record)}", where="first record", fix=accepted_shapes()
    )


def rename_columns(record: Any, columns: Mapping[str, str], *, where: str) -> Any:
    """Return a record under our names, given those that the file has.

    Args:
        record: one record of the file.
        columns: the file's name of each of ours; names of a turn's keys hold in every turn.
        where: the record's place.

    Raises:
        DataError: the record lacks a column that is named and needed.
    """
    if not columns or not isinstance(record, Mapping):
        return record
    turn_names = {key for pair in _TURN_KEYS.values() for key in pair}
    optional = {name for names in _OPTIONAL.values() for name in names}
    renamed = {key: value for key, value in record.items() if key not in columns.values()}
    for ours, theirs in columns.items():
        if ours in turn_names:
            continue
        if theirs in record:
            renamed[ours] = record[theirs]
        elif ours not in optional:
            raise DataError(
                f"no column {theirs!r} for {ours!r}, found {describe(record)}",
                where=where,
                fix=f"correct data.columns.{ours}",
            )
    of_turns = {theirs: ours for ours, theirs in columns.items() if ours in turn_names}
    for key in ("messages", "conversations"):
        if of_turns and isinstance(turns := renamed.get(key), list):
            renamed[key] = [
                {of_turns.get(name, name): value for name, value in turn.items()}
                if isinstance(turn, Mapping)
                else turn
                for turn in turns
            ]
    return renamed


def unused_columns(record: Any, record_format: Format) -> list[str]:
    """Return the names in a record that training does not read."""
    read = {*_KEYS[record_format], *_OPTIONAL[record_format]}
    return sorted(str(key) for key in record if key not in read)


def to_example(record: Any, record_format: Format, *, where: str) -> Example:
    """Return a record as a conversation or a passage.

    Raises:
        DataError: the record does not have the shape of ``record_format``; ``where`` names
            its place.
    """
    is_object = isinstance(record, Mapping)
    missing = [key for key in _KEYS[record_format] if not is_object or key not in record]
    if missing:
        raise _other_shape(record, missing[0], record_format, where)
    if record_format in ("messages", "sharegpt"):
        return _conversation(record, record_format, where)
    if record_format == "alpaca":
        return _alpaca(record, where)
    if record_format == "text":
        return Passage(prompt="", completion=_string(record, "text", record_format, where))
    if isinstance(record["prompt"], list) and isinstance(record["completion"], list):
        both = {**record, "messages": [*record["prompt"], *record["completion"]]}
        return _conversation(both, "messages", where)
    return Passage(
        prompt=_string(record, "prompt", record_format, where),
        completion=_string(record, "completion", record_format, where),
    )


def _other_shape(record: Any, missing: str, record_format: Format, where: str) -> DataError:
    for other, keys in _KEYS.items():
        if isinstance(record, Mapping) and all(key in record for key in keys):
            return DataError(
                f"this record is {other}, those before it are {record_format}",
                where=where,
                fix="keep one format in a file, and name each file in data.sources",
            )
    return _wrong_shape(f"no {missing!r}, found {describe(record)}", record_format, where)


def alpaca_text(conversation: Conversation, *, where: str) -> Passage:
    """Return an alpaca record in the prompt that the format was published with.

    Raises:
        DataError: the record has a system text or earlier turns, which that prompt lacks.

    Source:
        Stanford Alpaca, README, "Data Release" (github.com/tatsu-lab/stanford_alpaca).
    """
    if len(conversation.messages) != 2:
        raise DataError(
            "the published alpaca prompt has no place for 'system' and 'history'",
            where=where,
            fix="set data.chat_template, which has",
        )
    instruction, answer = conversation.messages
    return Passage(
        prompt=(
            "Below is an instruction that describes a task. Write a response that appropriately "
            f"completes the request.\n\n### Instruction:\n{instruction['content']}\n\n"
            "### Response:\n"
        ),
        completion=str(answer["content"]),
    )


def _conversation(
    record: Mapping[str, Any], record_format: Literal["messages", "sharegpt"], where: str
) -> Conversation:
    key = _KEYS[record_format][0]
    turns = _from_json(record[key], key, where)
    if not isinstance(turns, list) or not turns:
        raise _wrong_shape(
            f"{key!r} is {describe(turns)}, not a list of turns", record_format, where
        )
    read = _sharegpt_message if record_format == "sharegpt" else _message
    messages = [read(turn, number, where) for number, turn in enumerate(turns, start=1)]
    if record_format == "sharegpt" and record.get("system"):
        system = _string(record, "system", record_format, where)
        messages.insert(0, {"role": "system", "content": system})
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(
            "no assistant turn, so there is nothing to learn",
            where=where,
            fix="remove the record, or add the answer",
        )
    tools = _from_json(record.get("tools") or [], "tools", where)
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(
            f"'tools' is {describe(tools)}, not a list of functions",
            where=where,
            fix='write {"tools": [{"type": "function", "function": {"name": ...}}]}',
        )
    return Conversation(messages=tuple(messages), tools=tuple(tools))


def _from_json(value: Any, key: str, where: str) -> Any:
    """Return a value that some files, and all of CSV, hold as JSON in a string."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else []
    except (ValueError, RecursionError):
        raise DataError(
            f"{key!r} is text, and not JSON: {shorten(value)}",
            where=where,
            fix=f"write {key!r} as a JSON list",
        ) from None


def _message(turn: Any, number: int, where: str) -> dict[str, Any]:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
        raise _wrong_shape(f"turn {number} has no 'role': {describe(turn)}", "messages", where)
    content = turn.get("content")
    if "content" not in turn and not turn.get("tool_calls"):
        raise _wrong_shape(f"turn {number} has no 'content'", "messages", where)
    if isinstance(content, list):
        content = _joined_parts(content, number, where)
    # An assistant turn that only calls tools has no text.
    if content is None and turn.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise _wrong_shape(
            f"turn {number}: 'content' is {describe(content)}, not text", "messages", where
        )
    message = {**turn, "content": content}
    if turn.get("tool_calls"):
        message["tool_calls"] = _tool_calls(turn["tool_calls"], number, where)
    else:
        # Templates ask whether there is such a key, and take null for a call.
        message.pop("tool_calls", None)
    return message


def _tool_calls(calls: Any, number: int, where: str) -> list[dict[str, Any]]:
    """Return calls whose arguments are objects, as chat templates take them.

    OpenAI's own files hold the arguments as JSON in a string, which a template would quote
    once more.
    """
    calls = _from_json(calls, "tool_calls", where)
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise DataError(
            f"turn {number}: 'tool_calls' is {describe(calls)}, not a list of calls",
            where=where,
            fix='write [{"type": "function", "function": {"name": ..., "arguments": {...}}}]',
        )
    read = []
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(
                f"turn {number}: a tool call has no function name: {describe(call)}",
                where=where,
                fix='write {"type": "function", "function": {"name": ..., "arguments": {...}}}',
            )
        arguments = _from_json(function.get("arguments") or {}, "arguments", where)
        named = {**function, "arguments": arguments}
        read.append({**call, "function": named} if "function" in call else {"function": named})
    return read


def _joined_parts(parts: list[Any], number: int, where: str) -> str:
    texts = []
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise DataError(
                f"turn {number} holds {describe(part)}; only text can be trained on",
                where=where,
                fix="remove the record, or keep its text parts",
            )
        texts.append(str(part.get("text", "")))
    return "".join(texts)


def _sharegpt_message(turn: Any, number: int, where: str) -> dict[str, Any]:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
        raise _wrong_shape(f"turn {number} has no 'value': {describe(turn)}", "sharegpt", where)
    role = _SHAREGPT_ROLES.get(str(turn.get("from")))
    if role is None:
        raise DataError(
            f"turn {number} is from {turn.get('from')!r}",
            where=where,
            fix=f"use one of: {', '.join(_SHAREGPT_ROLES)}",
        )
    if turn["from"] == "function_call":
        call = _from_json(turn["value"], "function_call", where)
        calls = _tool_calls(call if isinstance(call, list) else [call], number, where)
        return {"role": role, "content": "", "tool_calls": calls}
    return {"role": role, "content": turn["value"]}


def _alpaca(record: Mapping[str, Any], where: str) -> Conversation:
    instruction = _string(record, "instruction", "alpaca", where)
    if record.get("input"):
        instruction = f"{instruction}\n\n{_string(record, 'input', 'alpaca', where)}"
    answer = _string(record, "output", "alpaca", where)
    turns = [("user", instruction), ("assistant", answer)]
    history = _from_json(record.get("history") or [], "history", where)
    if not isinstance(history, list):
        raise _wrong_shape(f"'history' is {describe(history)}, not a list", "alpaca", where)
    for pair in reversed(history):
        if not (isinstance(pair, list | tuple) and [type(text) for text in pair] == [str, str]):
            raise _wrong_shape(
                f"'history' holds {describe(pair)}, not a question and its answer", "alpaca", where
            )
        turns[:0] = [("user", pair[0]), ("assistant", pair[1])]
    if record.get("system"):
        turns.insert(0, ("system", _string(record, "system", "alpaca", where)))
    return Conversation(
        messages=tuple({"role": role, "content": content} for role, content in turns)
    )


def _string(record: Mapping[str, Any], key: str, record_format: Format, where: str) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise _wrong_shape(f"{key!r} is {describe(value)}, not text", record_format, where)
    return value


def _wrong_shape(problem: str, record_format: Format, where: str) -> DataError:
    shape = SHAPES[record_format]
    return DataError(problem, where=where, fix=f"{record_format} records look like {shape}")


def accepted_shapes() -> str:
    """Return a fix that shows every shape that is read."""
    return "write records of one of these shapes:\n    " + "\n    ".join(SHAPES.values())


def describe(value: Any) -> str:
    """Return a value in a few words: what it holds, or its type and its beginning."""
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return f"the keys {sorted(map(str, value))}" if value else "an empty object"
    return f"{type(value).__name__} {shorten(json.dumps(value, ensure_ascii=False, default=str))}"


def shorten(text: str) -> str:
    """Return a text as a message shows it, at most 60 characters."""
    return text if len(text) <= 60 else f"{text[:57]}..."
