"""From conversations and passages to token ids and labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from launcher.errors import DataError
from launcher.worker.records import Conversation, Example, Passage

IGNORE_INDEX = -100
"""Label of a token that does not count, as in transformers and torch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Token ids of one example, and for each its label: the same id or ``IGNORE_INDEX``."""

    input_ids: list[int]
    labels: list[int]

    @property
    def num_loss_tokens(self) -> int:
        """Labels that count; the first token is never predicted."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])

    def truncated(self, max_seq_len: int) -> Tokens:
        """Return the first ``max_seq_len`` tokens."""
        return Tokens(input_ids=self.input_ids[:max_seq_len], labels=self.labels[:max_seq_len])


def tokenize(example: Example, tokenizer: Any, *, train_on_prompt: bool, where: str) -> Tokens:
    """Return an example's tokens; only answers count, unless ``train_on_prompt``.

    Raises:
        DataError: the chat template refuses the conversation.
    """
    if isinstance(example, Passage):
        tokens = _tokenize_passage(example, tokenizer)
    else:
        tokens = _tokenize_conversation(example, tokenizer, where=where)
    if train_on_prompt:
        return Tokens(input_ids=tokens.input_ids, labels=list(tokens.input_ids))
    return tokens


def prompt_ids(example: Example, tokenizer: Any, *, where: str) -> list[int]:
    """Return the tokens that a model is given to answer an example's last turn.

    Of a text without a prompt, the first half.
    """
    if isinstance(example, Passage):
        start = example.prompt or example.completion[: len(example.completion) // 2]
        return list(tokenizer(start)["input_ids"])
    last = max(i for i, turn in enumerate(example.messages) if turn["role"] == "assistant")
    text = _render(example, tokenizer, end=last, where=where, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _tokenize_passage(passage: Passage, tokenizer: Any) -> Tokens:
    # Apart, as at inference, where the prompt is tokenised before the answer exists.
    prompt = list(tokenizer(passage.prompt)["input_ids"]) if passage.prompt else []
    completion = list(
        tokenizer(passage.completion, add_special_tokens=not passage.prompt)["input_ids"]
    )
    # Some tokenizers end every text with their end-of-sequence token.
    while prompt and prompt[-1] == tokenizer.eos_token_id:
        prompt.pop()
    if tokenizer.eos_token_id is not None and completion[-1:] != [tokenizer.eos_token_id]:
        completion.append(tokenizer.eos_token_id)
    return Tokens(input_ids=prompt + completion, labels=[IGNORE_INDEX] * len(prompt) + completion)


def _tokenize_conversation(example: Conversation, tokenizer: Any, *, where: str) -> Tokens:
    text = _render(example, tokenizer, end=len(example.messages), where=where)
    spans = _answer_spans(example, tokenizer, text, where=where)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    input_ids = list(encoded["input_ids"])
    labels = [IGNORE_INDEX] * len(input_ids)
    for index, (start, end) in enumerate(encoded["offset_mapping"]):
        # A token that begins in the prompt's last character and ends in the answer is one
        # that the model has to produce.
        if any(start < stop and end > begin for begin, stop in spans):
            labels[index] = input_ids[index]
    return Tokens(input_ids=input_ids, labels=labels)


def _answer_spans(
    example: Conversation, tokenizer: Any, text: str, *, where: str
) -> list[tuple[int, int]]:
    """Return where the assistant's turns stand in the rendered text, in characters.

    A turn is what the template adds when the turn joins the conversation, beyond the prompt
    that it would give the model there. That holds for every template, with or without
    ``{% generation %}`` markers. Templates that shorten earlier turns (they drop the
    reasoning) leave no such text for those turns: they do not count, the last one does.
    """
    spans = []
    for index, turn in enumerate(example.messages):
        if turn["role"] != "assistant":
            continue
        before = ""
        if index:
            before = _render(example, tokenizer, end=index, where=where, add_generation_prompt=True)
        after = _render(example, tokenizer, end=index + 1, where=where)
        begin = _common_prefix_length(before, text)
        stop = _common_prefix_length(after, text)
        if stop > begin:
            spans.append((begin, stop))
    return spans


def _render(
    example: Conversation,
    tokenizer: Any,
    *,
    end: int,
    where: str,
    add_generation_prompt: bool = False,
) -> str:
    from jinja2 import TemplateError

    try:
        rendered = tokenizer.apply_chat_template(
            [dict(message) for message in example.messages[:end]],
            tools=[dict(tool) for tool in example.tools] or None,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except (TemplateError, TypeError, KeyError) as error:
        raise DataError(
            f"the model's chat template refuses the conversation: {error}",
            where=where,
            fix="bring the turns into the order and roles that the model knows",
        ) from None
    return str(rendered)


def _common_prefix_length(one: str, other: str) -> int:
    limit = min(len(one), len(other))
    if one[:limit] == other[:limit]:
        return limit
    return next(i for i in range(limit) if one[i] != other[i])
