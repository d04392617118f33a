from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from worker_runs import CHAT_TEMPLATE, make_model, make_tokenizer, tokenize_data, write_chats

from launcher.data_cache import load_summary
from launcher.errors import DataError
from launcher.recipe import parse_recipe
from launcher.recipe_sections import Recipe
from launcher.worker.batches import LongestFirst, RankBatches, RightPadding
from launcher.worker.data import main, prepare_data
from launcher.worker.data_writer import percentiles
from launcher.worker.records import Conversation, Passage
from launcher.worker.tokenization import IGNORE_INDEX, Tokens, prompt_ids, tokenize

pytestmark = pytest.mark.integration

TURNS = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "2, and so on"},
)
# As Qwen3's template: the reasoning of earlier answers is left out of the history.
FORGETFUL_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{% if message['role'] == 'assistant' and not loop.last and '</think>' in message['content'] %}"
    "{{ message['content'].split('</think>')[-1] }}"
    "{% else %}{{ message['content'] }}{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MARKED_TEMPLATE = CHAT_TEMPLATE.replace(
    "{{ message['content'] }}<|end|>",
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|end|>"
    "{% endgeneration %}{% else %}{{ message['content'] }}<|end|>{% endif %}",
)


def recipe_for(path: Path, **changes: Any) -> Recipe:
    lines = [f"data.path={path}", "model.name_or_path=none"]
    return parse_recipe(
        "", source="test", overrides=[*lines, *(f"{k}={v}" for k, v in changes.items())]
    )


def one(example: Any, tokenizer: Any, *, train_on_prompt: bool = False) -> Tokens:
    (tokens,) = tokenize([("line 1", example)], tokenizer, train_on_prompt=train_on_prompt)
    return tokens


def learned(example: Any, *, template: str | None = CHAT_TEMPLATE) -> str:
    """Return the text of the tokens that count."""
    tokenizer = make_tokenizer(chat_template=template)
    tokens = one(example, tokenizer)
    return str(tokenizer.decode([label for label in tokens.labels if label != IGNORE_INDEX]))


def test_only_the_assistants_turns_count_with_their_end_tokens() -> None:
    assert learned(Conversation(messages=TURNS)) == "1<|end|>\n2, and so on<|end|>\n"


def test_a_template_with_generation_markers_gives_the_same_answers() -> None:
    # Jinja drops the line's end after {% endif %} (trim_blocks), so no newline ends a turn.
    found = learned(Conversation(messages=TURNS), template=MARKED_TEMPLATE)
    assert found == "1<|end|>2, and so on<|end|>"


def test_a_template_that_forgets_reasoning_teaches_the_last_answer_whole() -> None:
    turns = (
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>x</think>1"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "<think>y</think>2"},
    )
    found = learned(Conversation(messages=turns), template=FORGETFUL_TEMPLATE)
    assert found == "<think>y</think>2<|end|>\n"


def test_every_token_counts_when_the_recipe_trains_on_prompts() -> None:
    tokenizer = make_tokenizer()
    tokens = one(Conversation(messages=TURNS), tokenizer, train_on_prompt=True)
    # Nothing stands before the first token to predict it from.
    assert tokens.labels == [IGNORE_INDEX, *tokens.input_ids[1:]]


def test_the_tokens_are_those_of_the_whole_rendered_conversation() -> None:
    tokenizer = make_tokenizer()
    tokens = one(Conversation(messages=TURNS), tokenizer)
    assert tokenizer.decode(tokens.input_ids) == (
        "<|system|>\nBe brief.<|end|>\n<|user|>\none<|end|>\n<|assistant|>\n1<|end|>\n"
        "<|user|>\ntwo<|end|>\n<|assistant|>\n2, and so on<|end|>\n"
    )


def test_a_completion_counts_and_ends_with_the_end_of_sequence() -> None:
    assert learned(Passage(prompt="2+2=", completion="4")) == "4<|end|>"


def test_a_text_counts_but_for_its_first_token() -> None:
    assert learned(Passage(prompt="", completion="abc")) == "bc<|end|>"


def test_the_sample_prompt_ends_where_the_last_answer_begins() -> None:
    tokenizer = make_tokenizer()
    tokens = prompt_ids(Conversation(messages=TURNS), tokenizer, where="line 1")
    assert tokenizer.decode(tokens).endswith("<|user|>\ntwo<|end|>\n<|assistant|>\n")


def test_a_conversation_that_the_template_refuses_is_named() -> None:
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="roles must alternate") as caught:
        learned(Conversation(messages=TURNS), template=strict)
    assert caught.value.where == "line 1"


def test_long_examples_are_cut_and_those_without_an_answer_left_are_dropped(
    tmp_path: Path,
) -> None:
    path = tmp_path / "train.jsonl"
    pairs = [("p" * 4, "c" * 3), ("p" * 4, "c" * 30), ("p" * 40, "c")]
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs))
    folder = prepare_data(recipe_for(path, max_seq_len=16), make_tokenizer(), tmp_path / "cache")
    summary = load_summary(folder).train
    # 4 + 3 + end = 8 tokens; 4 + 30 + end cut to 16; 40 prompt tokens leave no answer.
    assert (summary.num_records, summary.num_examples) == (3, 2)
    assert (summary.num_truncated, summary.num_dropped) == (2, 1)
    assert (summary.num_tokens, summary.num_loss_tokens) == (24, 16)
    assert summary.length_percentiles == {"50": 8, "95": 16, "99": 16, "100": 16}


def test_data_of_which_nothing_is_left_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"prompt": "p" * 40, "completion": "c"}) + "\n")
    with pytest.raises(DataError, match="none of the 1 records has a token to learn from"):
        prepare_data(recipe_for(path, max_seq_len=16), make_tokenizer(), tmp_path / "cache")


def test_the_same_data_is_tokenised_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = recipe_for(write_chats(tmp_path / "train.jsonl", 4))
    caplog.set_level(logging.INFO, logger="launcher")
    first = prepare_data(recipe, make_tokenizer(), tmp_path / "cache")
    assert "from the cache" not in caplog.text
    assert prepare_data(recipe, make_tokenizer(), tmp_path / "cache") == first
    assert "from the cache" in caplog.text


@pytest.mark.parametrize("change", ["content", "length", "template"])
def test_another_content_length_or_template_is_tokenised_anew(tmp_path: Path, change: str) -> None:
    path = write_chats(tmp_path / "train.jsonl", 4)
    before = prepare_data(recipe_for(path), make_tokenizer(), tmp_path / "cache")
    if change == "content":
        write_chats(path, 5)
    length = 100 if change == "length" else 2048
    template = CHAT_TEMPLATE + " " if change == "template" else CHAT_TEMPLATE
    after = prepare_data(
        recipe_for(path, max_seq_len=length),
        make_tokenizer(chat_template=template),
        tmp_path / "cache",
    )
    assert after != before


def test_conversations_need_a_chat_template(tmp_path: Path) -> None:
    recipe = recipe_for(write_chats(tmp_path / "train.jsonl", 1))
    with pytest.raises(DataError) as caught:
        prepare_data(recipe, make_tokenizer(chat_template=None), tmp_path / "cache")
    assert caught.value.problem == (
        "the model's tokenizer has no chat template, which messages records need"
    )
    assert caught.value.where == "train.jsonl line 1"
    assert "set data.chat_template to a file or one of zephyr, chatml, llama-3" in caught.value.fix


def test_the_end_of_sequence_pads_where_the_tokenizer_has_no_padding_token(
    tmp_path: Path,
) -> None:
    recipe = recipe_for(write_chats(tmp_path / "train.jsonl", 1))
    tokenizer = make_tokenizer()
    summary = load_summary(prepare_data(recipe, tokenizer, tmp_path / "cache"))
    assert summary.pad_token_id == tokenizer.eos_token_id
    assert "the tokenizer has no padding token: its end-of-sequence token pads" in summary.notes


def test_ranks_are_told_to_tokenise_first_when_there_is_no_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not tokenised"):
        load_summary(tmp_path)


def test_the_data_step_prints_one_line_of_json_and_fills_the_run_directory(
    tmp_path: Path,
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    make_tokenizer(model)
    data = write_chats(tmp_path / "train.jsonl", 6)
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(
        f"model: {{name_or_path: {model}}}\n"
        f"data: {{path: {data}, eval_path: {data}, max_eval_samples: 2}}\n"
    )
    done = tokenize_data(run)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    printed = json.loads(done.stdout)
    assert printed["format"] == "messages"
    assert printed["train"]["num_records"] == 6
    assert printed["eval"]["num_records"] == 2
    assert printed["sample_prompt"] == "count to 1"
    assert load_summary(run / "data").train.num_examples == 6


def test_a_bad_line_ends_the_data_step_with_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    make_tokenizer(model)
    (tmp_path / "train.jsonl").write_text('{"text": "ab"}\nnot json\n')
    (tmp_path / "recipe.yaml").write_text(
        f"model: {{name_or_path: {model}}}\ndata: {{path: {tmp_path / 'train.jsonl'}}}\n"
    )
    assert main(["--run-dir", str(tmp_path)]) == 2
    assert "train.jsonl line 2: not JSON" in capsys.readouterr().err


def test_a_model_without_a_tokenizer_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_chats(tmp_path / "train.jsonl", 1)
    (tmp_path / "model").mkdir()
    (tmp_path / "recipe.yaml").write_text(
        f"model: {{name_or_path: {tmp_path / 'model'}}}\ndata: {{path: {data}}}\n"
    )
    assert main(["--run-dir", str(tmp_path)]) == 2
    assert "the model's folder has no tokenizer" in capsys.readouterr().err


def test_percentiles_are_nearest_ranks() -> None:
    # Of 1..200: the 100th, 190th, 198th and 200th value.
    assert percentiles(range(200, 0, -1)) == {"50": 100, "95": 190, "99": 198, "100": 200}


def test_a_batch_is_padded_on_the_right_and_has_no_attention_mask() -> None:
    examples = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4], "labels": [4]}]
    batch = RightPadding(pad_token_id=9)(examples)
    assert set(batch) == {"input_ids", "labels"}
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [4, -100, -100]]


def test_padding_changes_no_real_tokens_output(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "model")).eval()
    collate = RightPadding(pad_token_id=256)
    short = {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}
    long = {"input_ids": [8] * 9, "labels": [8] * 9}
    with torch.no_grad():
        alone = model(input_ids=collate([short])["input_ids"]).logits
        padded = model(input_ids=collate([short, long])["input_ids"]).logits
    torch.testing.assert_close(padded[:1, :3], alone)


def test_the_longest_example_is_in_the_first_batch_of_every_epoch() -> None:
    lengths = [(7 * index) % 101 + 1 for index in range(300)]
    sampler = LongestFirst(lengths, group_size=8, seed=0)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        assert max(lengths) in [lengths[index] for index in list(sampler)[:8]]


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    lengths = list(range(1, 200))
    one, other = (LongestFirst(lengths, group_size=4, seed=3) for _ in range(2))
    assert list(one) == list(other) == list(one)
    one.set_epoch(1)
    assert list(one) != list(other)
    assert sorted(one) == sorted(other)


def test_grouping_leaves_little_padding() -> None:
    # 4,000 lengths spread evenly over 1..1000 in random order: unsorted groups of 8 would be
    # padded to 8/9 of 1000 on average, so 44 % of their tokens were padding.
    lengths = [(617 * index) % 1000 + 1 for index in range(4000)]
    order = list(LongestFirst(lengths, group_size=8, seed=0))
    groups = [[lengths[i] for i in order[k : k + 8]] for k in range(0, 4000, 8)]
    padded = sum(8 * max(group) for group in groups)
    assert 1 - sum(lengths) / padded < 0.05


def steps_of(
    epoch: int, *, world_size: int, micro_batch_size: int, skip: int = 0
) -> list[list[int]]:
    """Return the examples of each optimizer step of 8, as transformers asks all ranks for them."""
    from accelerate import skip_first_batches
    from torch.utils.data import DataLoader

    lengths = [(7 * index) % 29 + 1 for index in range(61)]
    accumulation = 8 // (world_size * micro_batch_size)
    ranks = []
    for rank in range(world_size):
        batches = RankBatches(
            LongestFirst(lengths, group_size=8, seed=1),
            micro_batch_size=micro_batch_size,
            gradient_accumulation_steps=accumulation,
            share=rank,
            num_shares=world_size,
        )
        loader: Any = DataLoader(range(61), batch_sampler=batches, collate_fn=list)
        if skip:
            loader = skip_first_batches(loader, skip * accumulation)
        # transformers 5.23 trainer.py:_run_epoch
        loader.batch_sampler.batch_sampler.set_epoch(epoch)
        ranks.append(list(loader))
    return [
        sorted(
            example
            for batches in ranks
            for batch in batches[step * accumulation : (step + 1) * accumulation]
            for example in batch
        )
        for step in range(len(ranks[0]) // accumulation)
    ]


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 4), (2, 2), (2, 4), (4, 1)])
def test_a_step_sees_the_same_examples_on_any_number_of_ranks(
    world_size: int, micro_batch_size: int
) -> None:
    alone = steps_of(1, world_size=1, micro_batch_size=8)
    # 61 examples are 8 steps of 8, the last one filled up.
    assert [len(step) for step in alone] == [8] * 8
    assert {example for step in alone for example in step} == set(range(61))
    assert steps_of(1, world_size=world_size, micro_batch_size=micro_batch_size) == alone


def test_a_resumed_epoch_goes_on_in_its_own_order() -> None:
    whole = steps_of(3, world_size=2, micro_batch_size=2)
    assert steps_of(3, world_size=2, micro_batch_size=2, skip=3) == whole[3:]
    assert steps_of(2, world_size=2, micro_batch_size=2) != whole
