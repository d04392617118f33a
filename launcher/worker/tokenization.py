"""From conversations and passages to token ids and labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launcher.errors import DataError
from launcher.worker.records import Conversation, Example, Passage

IGNORE_INDEX = -100
"""Label of a token that does not count, as in transformers and torch."""

Placed = tuple[str, Example]
"""An example and the place of its record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Token ids of one example, and for each its label: the same id or ``IGNORE_INDEX``.

    The first label is always ``IGNORE_INDEX``: nothing stands before it to predict it from,
    and in a packed sequence what stands there is another example.
    """

    input_ids: list[int]
    labels: list[int]
    lacks_system_text: bool = False
    """Whether the chat template left the conversation's system text out."""

    @property
    def num_loss_tokens(self) -> int:
        """Labels that count."""
        return len(self.labels) - self.labels.count(IGNORE_INDEX)

    def truncated(self, max_seq_len: int) -> Tokens:
        """Return the first ``max_seq_len`` tokens."""
        return Tokens(input_ids=self.input_ids[:max_seq_len], labels=self.labels[:max_seq_len])


def tokenize(examples: Sequence[Placed], tokenizer: Any, *, train_on_prompt: bool) -> list[Tokens]:
    """Return the examples' tokens; only answers count, unless ``train_on_prompt``.

    Many at once, because the tokenizer then uses every processor.

    Raises:
        DataError: the chat template refuses a conversation, or a text is not Unicode.
    """
    chats = [(place, example) for place, example in examples if isinstance(example, Conversation)]
    passages = [(place, example) for place, example in examples if isinstance(example, Passage)]
    of_chats = iter(_tokenize_conversations(chats, tokenizer))
    of_passages = iter(_tokenize_passages(passages, tokenizer))
    found = []
    for _, example in examples:
        if isinstance(example, Conversation):
            input_ids, labels, lacks_system = next(of_chats)
        else:
            (input_ids, labels), lacks_system = next(of_passages), False
        labels = list(input_ids) if train_on_prompt else labels
        found.append(
            Tokens(
                input_ids=input_ids,
                labels=[IGNORE_INDEX, *labels[1:]][: len(labels)],
                lacks_system_text=lacks_system,
            )
        )
    return found


def prompt_ids(example: Example, tokenizer: Any, *, where: str) -> list[int]:
    """Return the tokens that a model is given to answer an example's last turn.

    Of a text without a prompt, the first half.
    """
    if isinstance(example, Passage):
        start = example.prompt or example.completion[: len(example.completion) // 2]
        _check_unicode(start, where)
        return list(tokenizer(start)["input_ids"])
    last = max(i for i, turn in enumerate(example.messages) if turn["role"] == "assistant")
    text = _render(example, tokenizer, end=last, where=where, add_generation_prompt=True)
    _check_unicode(text, where)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _tokenize_passages(
    passages: Sequence[tuple[str, Passage]], tokenizer: Any
) -> list[tuple[list[int], list[int]]]:
    for where, passage in passages:
        _check_unicode(passage.prompt + passage.completion, where)
    end = tokenizer.eos_token_id
    # Apart, as at inference, where the prompt is tokenised before the answer exists.
    prompts = _encode([passage.prompt for _, passage in passages], tokenizer)
    # After a prompt without, else with the special tokens that begin a text.
    after = _encode(
        [p.completion if p.prompt else "" for _, p in passages], tokenizer, special=False
    )
    whole = _encode(["" if p.prompt else p.completion for _, p in passages], tokenizer)
    found = []
    for index, (_, passage) in enumerate(passages):
        prompt = prompts[index] if passage.prompt else []
        completion = after[index] if passage.prompt else whole[index]
        # Some tokenizers end every text with their end-of-sequence token.
        while prompt and prompt[-1] == end:
            prompt.pop()
        if end is not None and completion[-1:] != [end]:
            completion.append(end)
        found.append((prompt + completion, [IGNORE_INDEX] * len(prompt) + completion))
    return found


def _encode(texts: list[str], tokenizer: Any, *, special: bool = True) -> list[list[int]]:
    if not any(texts):
        return [[] for _ in texts]
    encoded = tokenizer(texts, add_special_tokens=special, return_attention_mask=False)
    return [list(ids) for ids in encoded["input_ids"]]


def _tokenize_conversations(
    chats: Sequence[tuple[str, Conversation]], tokenizer: Any
) -> list[tuple[list[int], list[int], bool]]:
    import numpy as np

    if not chats:
        return []
    texts, spans = [], []
    for where, chat in chats:
        text = _render(chat, tokenizer, end=len(chat.messages), where=where)
        _check_unicode(text, where)
        texts.append(text)
        spans.append(answer_spans(chat, tokenizer, text, where=where))
    encoded = tokenizer(
        texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False
    )
    found = []
    for (_, chat), text, ids, offsets, answers in zip(
        chats, texts, encoded["input_ids"], encoded["offset_mapping"], spans, strict=True
    ):
        ends = np.array([end for _, end in offsets])
        is_learned = np.zeros(len(ids), dtype=bool)
        for begin, stop in answers:
            # A token that begins in the prompt's last character and ends in the answer is one
            # that the model has to produce; one that goes on behind the answer is not.
            is_learned |= (ends > begin) & (ends <= stop)
        labels = np.where(is_learned, ids, IGNORE_INDEX).tolist()
        found.append((list(ids), labels, _lacks_system_text(chat, text)))
    return found


def _lacks_system_text(chat: Conversation, text: str) -> bool:
    """Return whether a system text does not stand in the rendered conversation.

    Mistral's template writes it into the last turn if that is the user's, as when the model is
    asked; a conversation to learn from ends with an answer.
    """
    systems = [str(turn["content"]) for turn in chat.messages if turn["role"] == "system"]
    return any(system.strip() not in text for system in systems)


def answer_spans(
    example: Conversation, tokenizer: Any, text: str, *, where: str
) -> list[tuple[int, int]]:
    """Return where the assistant's turns stand in the rendered text, in characters.

    A turn is what the template adds when the turn joins the conversation, beyond the prompt
    that it would give the model there. That holds with or without ``{% generation %}``
    markers. A template may also change earlier text as a conversation grows (Mistral's moves
    the system text and the tools to the last user turn); an answer is then looked for as it
    is written, behind the turns before it, and ends as those that were found end. An answer
    that the template leaves out in part (reasoning of earlier turns) is not found and does
    not count; the last one always does.
    """
    spans: list[tuple[int, int] | None] = []
    turns = [i for i, turn in enumerate(example.messages) if turn["role"] == "assistant"]
    for index in turns:
        before = ""
        if index:
            before = _render(example, tokenizer, end=index, where=where, add_generation_prompt=True)
        after = _render(example, tokenizer, end=index + 1, where=where)
        begin = common_prefix_length(before, text)
        stop = common_prefix_length(after, text)
        # Where not even the earlier turns are alike, what is common ends before the answer.
        is_found = begin == len(before) or text.startswith(
            _render(example, tokenizer, end=index, where=where)
        )
        spans.append((begin, stop) if is_found and stop > begin else None)
    if None not in spans:
        return [span for span in spans if span]
    contents = [str(example.messages[i]["content"]).strip() for i in turns]
    if spans[-1] is None and contents[-1] and turns[-1] == len(example.messages) - 1:
        place = text.rfind(contents[-1])
        spans[-1] = (place, len(text)) if place >= 0 else None
    return _spans_by_content(text, contents, spans)


def _spans_by_content(
    text: str, contents: Sequence[str], spans: Sequence[tuple[int, int] | None]
) -> list[tuple[int, int]]:
    """Return the spans that were found, and those of answers that stand in the text whole."""
    endings = []
    for content, span in zip(contents, spans, strict=True):
        if span and content and (place := text.find(content, *span)) >= 0:
            endings.append(text[place + len(content) : span[1]])
    ending = min(endings, key=len, default="")
    found, position = [], 0
    for content, span in zip(contents, spans, strict=True):
        if span is not None:
            found.append(span)
        elif content and (place := text.find(content, position)) >= 0:
            stop = place + len(content)
            found.append((place, stop + len(ending) if text.startswith(ending, stop) else stop))
        position = found[-1][1] if found else 0
    return found


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


def common_prefix_length(one: str, other: str) -> int:
    """Return how many characters two texts begin with alike."""
    if other.startswith(one):
        return len(one)
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _check_unicode(text: str, where: str) -> None:
    r"""Raise DataError on half a surrogate pair, which JSON can hold (``\ud83d``)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text is not Unicode: {text[error.start]!r} is half of a character",
            where=where,
            fix=r"write both halves of the surrogate pair (\ud83d\ude00), or the character",
        ) from None
