"""Sweep files: what they expand to, and what is refused."""

from __future__ import annotations

from functools import cache

import pytest

from launcher.bench.runner import planned
from launcher.bench.sweep import Case, parse_sweep
from launcher.errors import RecipeError
from launcher.strategy import Checkpointing, Method

MATRIX = """
defaults: {method: lora, optim: {max_steps: 3}}
matrix:
  models: [llama2-7b, llama3-8b]
  contexts: [256]
  zero_stages: [1, 2]
  strategies:
    plain: {}
    gc: {method: full, strategy: {gradient_checkpointing: full}}
cases:
- name: by-hand
  model: {name_or_path: llama3.2-1b}
  optim: {global_batch_size: 4}
"""


@cache
def matrix() -> tuple[Case, ...]:
    return parse_sweep(MATRIX, source="x")


def test_a_matrix_is_the_product_of_its_axes_with_the_listed_cases_behind() -> None:
    cases = matrix()
    assert [case.name for case in cases] == [
        "llama2-7b-256-z1-plain", "llama2-7b-256-z1-gc",
        "llama2-7b-256-z2-plain", "llama2-7b-256-z2-gc",
        "llama3-8b-256-z1-plain", "llama3-8b-256-z1-gc",
        "llama3-8b-256-z2-plain", "llama3-8b-256-z2-gc",
        "by-hand",
    ]  # fmt: skip
    recipe = cases[1].recipe
    assert recipe.model.name_or_path == "llama2-7b"
    assert recipe.max_seq_len == 256
    assert recipe.strategy.zero_stage == 1
    assert recipe.strategy.gradient_checkpointing is Checkpointing.full
    assert recipe.method is Method.full
    assert cases[1].strategy_label == "gc"
    assert cases[2].recipe.method is Method.lora
    assert cases[-1].strategy_label is None


def test_a_case_is_laid_over_the_defaults_section_by_section() -> None:
    by_hand = matrix()[-1].recipe
    assert by_hand.optim.max_steps == 3
    assert by_hand.optim.global_batch_size == 4


def test_several_matrices_have_defaults_of_their_own() -> None:
    text = """
    matrix:
    - {models: [llama2-7b], contexts: [256], strategies: {a: {}},
       defaults: {cluster: {num_nodes: 1}}}
    - {models: [falcon-180b], contexts: [256], strategies: {a: {}},
       defaults: {cluster: {num_nodes: 2}}}
    """
    assert [case.recipe.cluster.num_nodes for case in parse_sweep(text, source="x")] == [1, 2]


def test_overrides_reach_every_case() -> None:
    text = "cases: [{name: a, model: {name_or_path: x}}, {name: b, model: {name_or_path: x}}]"
    cases = parse_sweep(text, source="x", overrides=["optim.max_steps=7"])
    assert {case.recipe.optim.max_steps for case in cases} == {7}


def test_a_matrix_reads_numbers_and_text_as_recipes_do() -> None:
    # YAML 1.1 reads the text 5e-5, the octal 8, the float 1.1, the date of a day, sexagesimals.
    text = """
    matrix:
      models: [1.10]
      contexts: [256]
      strategies:
        "010": {model: {revision: 010}, deepspeed: {fp16: {hysteresis: 5e-5}}}
        b: {model: {revision: 2024-05-01}, optim: {learning_rate: 1e-4}, slurm: {time: 1:30:00}}
      defaults: {slurm: {account: 007}}
    cases: [{name: 1.10, model: {name_or_path: 1e5}}]
    """
    first, second, listed = parse_sweep(text, source="x")
    assert [case.name for case in (first, second, listed)] == ["1.10-256-010", "1.10-256-b", "1.10"]
    assert first.recipe.model.name_or_path == "1.10"
    assert first.recipe.model.revision == "010"
    assert first.recipe.deepspeed == {"fp16": {"hysteresis": 5e-5}}
    assert second.recipe.model.revision == "2024-05-01"
    assert second.recipe.optim.learning_rate == 1e-4
    assert (second.recipe.slurm.time, second.recipe.slurm.account) == ("1:30:00", "007")
    assert listed.recipe.model.name_or_path == "1e5"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "there is no case"),
        ("cases: []", "there is no case"),
        ("- a", "a mapping"),
        ("cases: {a: 1}", "a list"),
        ("cases: [3]", "case 1: this is a mapping"),
        ("a: [", "not YAML"),
        ("casess: []", "did you mean 'cases'"),
        ("cases: [{model: {name_or_path: x}}]", "it has no name"),
        ("cases: [{name: a/b, model: {name_or_path: x}}]", "cannot be a case's name"),
        ("cases: [{name: .., model: {name_or_path: x}}]", "cannot be a case's name"),
        (
            "cases: [{name: a, model: {name_or_path: x}}, {name: a, model: {name_or_path: y}}]",
            "several cases have the name a",
        ),
        ("cases: [{name: a, modle: {}}]", "case a: .*unknown key 'modle'"),
        ("cases: [{name: a}]", "case a: no model"),
        ("matrix: {models: [], contexts: [1], strategies: {a: {}}}", "models: it is empty"),
        ("matrix: {models: [a], strategies: {a: {}}}", "contexts: it is empty"),
        ("matrix: {models: [a], contexts: [1]}", "strategies: it is empty"),
        ("matrix: {models: [a], contexts: [1], strategies: [b]}", "strategies: this is a mapping"),
        ("matrix: {models: [a], contexts: [1], strategies: {a: 3}}", "strategies: a: this is a"),
        (
            "matrix: {models: [a], contexts: [1], strategies: {a: {}}, zero_stages: []}",
            "zero_stages: it is empty",
        ),
        ("matrix: {model: [a]}", "did you mean 'models'"),
        ("matrix: {models: [a], contexts: [1], strategies: {no: {}}}", "False is no text"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_an_error_that_says_where(text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=f"(?s){said}"):
        parse_sweep(text, source="sweep.yaml")


def test_an_override_that_no_case_knows_is_one_problem() -> None:
    with pytest.raises(
        RecipeError, match=r"case llama2-7b-256-z1-plain and 8 others: .*'foo'"
    ) as e:
        parse_sweep(MATRIX, source="sweep.yaml", overrides=("foo=1",))
    assert "\n  - " not in e.value.problem


def test_all_wrong_cases_are_named_at_once() -> None:
    text = "cases: [{name: one, modle: {}}, {name: two, method: lorra, model: {name_or_path: x}}]"
    with pytest.raises(RecipeError, match=r"(?s)2 problems.*case one.*case two"):
        parse_sweep(text, source="x")


@pytest.mark.parametrize(("chosen", "expected"), [("null", False), ("true", True)])
def test_a_sweep_writes_no_sample_answers_unless_asked(chosen: str, expected: bool) -> None:
    keys = "model: {name_or_path: llama3.2-1b}, cluster: {gpu: H100-80GB, gpus_per_node: 1}"
    text = f"cases: [{{name: a, {keys}, tracking: {{sample_answer: {chosen}}}}}]"
    (case,) = parse_sweep(text, source="sweep.yaml")
    _, prepared = planned(case)
    assert prepared is not None
    assert prepared.recipe.tracking.sample_answer is expected
