"""Training records: read strictly, recognise their shape, and bring them to one of two forms."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
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
}
_SUFFIXES = (".jsonl", ".json")


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


def read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield each JSON value of a .jsonl file, or each element of a .json list, with its place.

    Yields:
        A place for messages (``train.jsonl line 7``) and the value there.

    Raises:
        DataError: the file is missing, empty, not UTF-8, or a line is not JSON.
    """
    text = _read_text(path)
    if text.lstrip().startswith("[") and path.suffix == ".json":
        yield from _list_elements(path, text)
        return
    is_empty = True
    # Not splitlines(): JSON strings may contain U+2028 and its like unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        is_empty = False
        where = f"{path.name} line {number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"not JSON: {error.msg} at column {error.colno}: {_shorten(line)}",
                where=where,
                fix="write one JSON object on each line",
            ) from None
        yield where, value
    if is_empty:
        raise DataError("the file is empty", where=str(path), fix=_accepted_shapes())


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
        f"unknown shape: found {_describe(record)}", where="first record", fix=_accepted_shapes()
    )


def to_example(record: Any, record_format: Format, *, where: str) -> Example:
    """Return a record as a conversation or a passage.

    Raises:
        DataError: the record does not have the shape of ``record_format``; ``where`` names
            its place.
    """
    missing = [
        key for key in _KEYS[record_format] if not isinstance(record, Mapping) or key not in record
    ]
    if missing:
        raise _wrong_shape(f"no {missing[0]!r}, found {_describe(record)}", record_format, where)
    if record_format == "messages":
        return _conversation(record, "messages", record_format, where)
    if record_format == "sharegpt":
        return _conversation(record, "conversations", record_format, where)
    if record_format == "alpaca":
        return _alpaca(record, where)
    if record_format == "text":
        return Passage(prompt="", completion=_string(record, "text", record_format, where))
    if isinstance(record["prompt"], list) and isinstance(record["completion"], list):
        both = {"messages": [*record["prompt"], *record["completion"]]}
        return _conversation(both, "messages", record_format, where)
    return Passage(
        prompt=_string(record, "prompt", record_format, where),
        completion=_string(record, "completion", record_format, where),
    )


def alpaca_text(conversation: Conversation) -> Passage:
    """Return an alpaca record in the prompt that the format was published with.

    Source:
        Stanford Alpaca, README, "Data Release" (github.com/tatsu-lab/stanford_alpaca).
    """
    instruction, answer = conversation.messages
    return Passage(
        prompt=(
            "Below is an instruction that describes a task. Write a response that appropriately "
            f"completes the request.\n\n### Instruction:\n{instruction['content']}\n\n"
            "### Response:\n"
        ),
        completion=str(answer["content"]),
    )


def _read_text(path: Path) -> str:
    if path.suffix not in _SUFFIXES:
        raise DataError(
            f"{path.suffix or 'no suffix'} is not a format that is read here",
            where=str(path),
            fix="convert the data to .jsonl (one JSON object on each line)",
        )
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError("no such file", where=str(path), fix="correct data.path") from None
    except OSError as error:
        raise DataError(
            f"cannot be read: {error.strerror}", where=str(path), fix="check the file"
        ) from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(
            f"not UTF-8: byte 0x{error.object[error.start]:02x}",
            where=f"{path.name} line {line}",
            fix="convert the file to UTF-8",
        ) from None


def _list_elements(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"not JSON: {error.msg} at column {error.colno}",
            where=f"{path.name} line {error.lineno}",
            fix="mend that line, or write one JSON object on each line of a .jsonl file",
        ) from None
    if not values:
        raise DataError("the list is empty", where=str(path), fix=_accepted_shapes())
    for number, value in enumerate(values, start=1):
        yield f"{path.name} record {number}", value


def _conversation(
    record: Mapping[str, Any], key: str, record_format: Format, where: str
) -> Conversation:
    turns = record[key]
    if not isinstance(turns, list) or not turns:
        raise _wrong_shape(
            f"{key!r} is {_describe(turns)}, not a list of turns", record_format, where
        )
    messages = []
    for number, turn in enumerate(turns, start=1):
        if record_format == "sharegpt":
            message = _sharegpt_message(turn, number, where)
        else:
            message = _message(turn, number, record_format, where)
        messages.append(message)
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(
            "no assistant turn, so there is nothing to learn",
            where=where,
            fix="remove the record, or add the answer",
        )
    tools = record.get("tools")
    return Conversation(messages=tuple(messages), tools=tuple(tools) if tools else ())


def _message(turn: Any, number: int, record_format: Format, where: str) -> dict[str, Any]:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
        raise _wrong_shape(f"turn {number} has no 'role': {_describe(turn)}", record_format, where)
    content = turn.get("content")
    if "content" not in turn and not turn.get("tool_calls"):
        raise _wrong_shape(f"turn {number} has no 'content'", record_format, where)
    if isinstance(content, list):
        content = _joined_parts(content, number, where)
    # An assistant turn that only calls tools has no text.
    if content is None and turn.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise _wrong_shape(
            f"turn {number}: 'content' is {_describe(content)}, not text", record_format, where
        )
    return {**turn, "content": content}


def _joined_parts(parts: list[Any], number: int, where: str) -> str:
    texts = []
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise DataError(
                f"turn {number} holds {_describe(part)}; only text can be trained on",
                where=where,
                fix="remove the record, or keep its text parts",
            )
        texts.append(str(part.get("text", "")))
    return "".join(texts)


def _sharegpt_message(turn: Any, number: int, where: str) -> dict[str, Any]:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
        raise _wrong_shape(f"turn {number} has no 'value': {_describe(turn)}", "sharegpt", where)
    role = _SHAREGPT_ROLES.get(str(turn.get("from")))
    if role is None:
        raise DataError(
            f"turn {number} is from {turn.get('from')!r}",
            where=where,
            fix=f"use one of: {', '.join(_SHAREGPT_ROLES)}",
        )
    return {"role": role, "content": turn["value"]}


def _alpaca(record: Mapping[str, Any], where: str) -> Conversation:
    instruction = _string(record, "instruction", "alpaca", where)
    extra = record.get("input")
    if extra:
        instruction = f"{instruction}\n\n{_string(record, 'input', 'alpaca', where)}"
    answer = _string(record, "output", "alpaca", where)
    return Conversation(
        messages=(
            {"role": "user", "content": instruction},
            {"role": "assistant", "content": answer},
        )
    )


def _string(record: Mapping[str, Any], key: str, record_format: Format, where: str) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise _wrong_shape(f"{key!r} is {_describe(value)}, not text", record_format, where)
    return value


def _wrong_shape(problem: str, record_format: Format, where: str) -> DataError:
    shape = SHAPES[record_format]
    return DataError(problem, where=where, fix=f"{record_format} records look like {shape}")


def _accepted_shapes() -> str:
    return "write records of one of these shapes:\n    " + "\n    ".join(SHAPES.values())


def _describe(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return f"the keys {sorted(map(str, value))}" if value else "an empty object"
    return f"{type(value).__name__} {_shorten(json.dumps(value, ensure_ascii=False, default=str))}"


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
