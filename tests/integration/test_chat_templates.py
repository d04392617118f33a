"""What counts in the loss under the chat templates of published models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from worker_runs import make_tokenizer

from launcher.errors import DataError
from launcher.worker.chat_templates import KNOWN_TEMPLATES
from launcher.worker.records import Conversation, to_example
from launcher.worker.tokenization import IGNORE_INDEX, tokenize

pytestmark = pytest.mark.integration

TEMPLATES = Path(__file__).parents[1] / "data" / "chat_templates"
# The special tokens of all templates, so that no header is cut into pieces.
SPECIAL_TOKENS = [
    "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>",
    "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "[TOOL_CALLS]",
    "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
]  # fmt: skip

USER = {"role": "user", "content": "2+2?"}
FOUR = {"role": "assistant", "content": "four"}
MORE = [{"role": "user", "content": "3+3?"}, {"role": "assistant", "content": "six, then"}]
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Add.", "parameters": {"type": "object"}},
}
# As OpenAI writes it: the arguments are JSON in a string.
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}
    ],
}
RESULT = {"role": "tool", "content": "4"}


def learned(template: str, messages: list[dict[str, Any]], tools: Any = None) -> str:
    """Return the text of the tokens that count."""
    known = KNOWN_TEMPLATES.get(template)
    path = TEMPLATES / f"{template}.jinja"
    tokenizer = make_tokenizer(chat_template=known[0] if known else path.read_text())
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL_TOKENS})
    tokenizer.add_special_tokens({"bos_token": "<|begin_of_text|>"})
    example = to_example({"messages": messages, "tools": tools}, "messages", where="line 1")
    assert isinstance(example, Conversation)
    (tokens,) = tokenize([("line 1", example)], tokenizer, train_on_prompt=False)
    return str(tokenizer.decode([label for label in tokens.labels if label != IGNORE_INDEX]))


# <|end|> is the end-of-sequence token of the tests' tokenizer.
@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("llama3_1", "four<|eot_id|>six, then<|eot_id|>"),
        ("qwen2_5", "four<|im_end|>\nsix, then<|im_end|>\n"),
        ("phi3", "four<|end|>\nsix, then<|end|>\n<|end|>"),
        ("mistral", "four<|end|>six, then<|end|>"),
        ("chatml", "four<|im_end|>\nsix, then<|im_end|>\n"),
        ("llama-3", "four<|eot_id|>six, then<|eot_id|>"),
        ("zephyr", "four<|end|>\nsix, then<|end|>\n"),
    ],
)
def test_every_answer_counts_with_its_end_and_nothing_else_does(
    template: str, expected: str
) -> None:
    assert learned(template, [SYSTEM, USER, FOUR, *MORE]) == expected


def test_gemma_learns_its_answers_and_refuses_a_system_text() -> None:
    assert learned("gemma", [USER, FOUR, *MORE]) == "four<end_of_turn>\nsix, then<end_of_turn>\n"
    with pytest.raises(DataError, match="System role not supported") as caught:
        learned("gemma", [SYSTEM, USER, FOUR])
    assert caught.value.where == "line 1"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            "llama3_1",
            (
                '{"name": "add", "parameters": {"a": 2, "b": 2}}<|eot_id|>four<|eot_id|>'
                "six, then<|eot_id|>"
            ),
        ),
        (
            "qwen2_5",
            (
                '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call>'
                "<|im_end|>\n"
                "four<|im_end|>\nsix, then<|im_end|>\n"
            ),
        ),
        # Tools stand before the last user turn only, so the first turns' answers are found by
        # what they say; the call, which the template writes in its own words, is not.
        ("mistral", "four<|end|>six, then<|end|>"),
    ],
)
def test_calls_of_tools_count_and_their_results_do_not(template: str, expected: str) -> None:
    messages = [SYSTEM, USER, CALL, RESULT, FOUR, *MORE]
    assert learned(template, messages, tools=[TOOL]) == expected


def test_mistrals_call_counts_when_the_conversation_ends_with_its_answer() -> None:
    found = learned("mistral", [USER, CALL, RESULT, FOUR], tools=[TOOL])
    assert found == '[TOOL_CALLS][{"name": "add", "arguments": {"a": 2, "b": 2}}]<|end|>four<|end|>'


@pytest.mark.parametrize("template", ["llama3_1", "qwen2_5"])
def test_tools_reach_the_prompt(template: str) -> None:
    tokenizer = make_tokenizer(chat_template=(TEMPLATES / f"{template}.jinja").read_text())
    tokenizer.add_special_tokens({"bos_token": "<|end|>"})
    record = {"messages": [USER, FOUR], "tools": [TOOL]}
    example = to_example(record, "messages", where="line 1")
    (tokens,) = tokenize([("line 1", example)], tokenizer, train_on_prompt=False)
    assert '"description": "Add."' in tokenizer.decode(tokens.input_ids)
