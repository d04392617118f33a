from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml

from launcher.bench.sweep import parse_sweep
from launcher.errors import RecipeError
from launcher.recipe import parse_recipe, render_recipe
from launcher.recipe_sections import Recipe
from launcher.site_file import parse_site
from launcher.strategy import Checkpointing, Method, Offload, Precision

DOCS = Path(__file__).resolve().parents[2] / "docs"
MINIMAL = "model: {name_or_path: llama2-7b}\n"


def problem_of(text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, source="r.yaml", overrides=overrides)
    return str(caught.value)


def test_a_recipe_needs_nothing_but_a_model() -> None:
    recipe = parse_recipe(MINIMAL, source="r.yaml")
    assert recipe.model.name_or_path == "llama2-7b"
    assert recipe.strategy.zero_stage is None


def test_choices_are_parsed_into_their_types() -> None:
    recipe = parse_recipe(
        MINIMAL + "method: qlora\nstrategy: {zero_stage: 3, offload_optimizer: cpu,"
        " gradient_checkpointing: full, grad_accum_dtype: fp32}",
        source="r.yaml",
    )
    assert recipe.method is Method.qlora
    assert recipe.strategy.offload_optimizer is Offload.cpu
    assert recipe.strategy.gradient_checkpointing is Checkpointing.full
    assert recipe.strategy.grad_accum_dtype is Precision.fp32


def test_a_typo_in_a_key_names_the_file_the_key_and_the_nearest_key() -> None:
    problem = problem_of(MINIMAL + "strategy: {zero_stge: 2}")
    assert "r.yaml" in problem
    assert "'strategy.zero_stge'" in problem
    assert "did you mean 'zero_stage'?" in problem


def test_all_unknown_keys_are_reported_at_once() -> None:
    problem = problem_of("modl: {}\nlora: {rank: 8}\n")
    assert "'modl'" in problem
    assert "'lora.rank'" in problem


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("max_seq_len: 0", "max_seq_len is 0"),
        ("max_seq_len: -1", "max_seq_len is -1"),
        ("max_seq_len: 4k", "max_seq_len"),
        ("max_seq_len: 3.5", "max_seq_len"),
        ("optim: {learning_rate: fast}", "optim.learning_rate"),
        ("optim: {global_batch_size: 0}", "optim.global_batch_size is 0"),
        ("optim: {warmup_ratio: 1.5}", "optim.warmup_ratio is 1.5"),
        ("lora: {dropout: 1.0}", "lora.dropout is 1.0"),
        ("lora: {target_modules: []}", "lora.target_modules is empty"),
        ("method: lorra", "method"),
        ("tracking: {memory_snapshot_step: 0}", "tracking.memory_snapshot_step is 0"),
        (
            "tracking: {memory_snapshot_step: 9}\noptim: {max_steps: 8}",
            "tracking.memory_snapshot_step is 9, after optim.max_steps 8",
        ),
        ("strategy: {zero_stage: 4}", "strategy.zero_stage"),
        ("strategy: 2", "'strategy' is a section"),
        (
            "strategy: {zero_stage: 2, offload_param: cpu}",
            "strategy.offload_param needs zero_stage 3",
        ),
        ("strategy: {zero_stage: 0, offload_optimizer: cpu}", "strategy.offload_optimizer needs"),
        ("strategy: {offload_optimizer: nvme}", "strategy.nvme_path is missing"),
    ],
)
def test_an_impossible_value_is_an_error_that_names_its_key(line: str, key: str) -> None:
    assert key in problem_of(MINIMAL + line)


@pytest.mark.parametrize("text", ["[1, 2]", "just words", "model: [", "\tmodel: x"])
def test_text_that_is_no_mapping_is_an_error_and_no_traceback(text: str) -> None:
    assert "r.yaml" in problem_of(text)


def test_a_recipe_without_a_model_says_what_to_give() -> None:
    assert "model.name_or_path" in problem_of("method: lora")


def test_overrides_pass_through_the_same_checks_as_the_file() -> None:
    assert "did you mean 'zero_stage'?" in problem_of(MINIMAL, "strategy.zero_stge=2")
    assert "max_seq_len=4k" in problem_of(MINIMAL, "max_seq_len=4k")
    recipe = parse_recipe(MINIMAL, source="r.yaml", overrides=["lora.target_modules=[q_proj]"])
    assert recipe.lora.target_modules == ("q_proj",)


@pytest.mark.parametrize("override", ["strategy.zero_stage", "=2", "lora.r=[8"])
def test_an_override_that_cannot_be_read_is_shown(override: str) -> None:
    assert "command line" in problem_of(MINIMAL, override)


def test_options_are_taken_as_they_are_and_not_as_yaml() -> None:
    path = "folder: {odd}, [name"
    recipe = parse_recipe("", source="r.yaml", options={"model.name_or_path": path})
    assert recipe.model.name_or_path == path


def test_what_is_rendered_parses_back_to_the_same_recipe() -> None:
    recipe = parse_recipe(
        MINIMAL + "method: qlora\nlora: {r: 64, target_modules: [q_proj, v_proj]}\n"
        "deepspeed: {zero_optimization: {reduce_bucket_size: 1000000}}\n"
        "strategy: {zero_stage: 3, offload_optimizer: cpu}\nslurm: {extra: ['--exclusive']}",
        source="r.yaml",
    )
    text = render_recipe(recipe)
    assert parse_recipe(text, source="again") == recipe
    assert "optim" not in yaml.safe_load(text)


def test_raw_deepspeed_keys_are_kept_as_they_are() -> None:
    recipe = parse_recipe(
        MINIMAL + "deepspeed: {zero_optimization: {overlap_comm: true}}", source="r.yaml"
    )
    assert recipe.deepspeed == {"zero_optimization": {"overlap_comm": True}}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("{sources: [{path: a, wieght: 2}]}", ["data.sources[0].wieght", "did you mean 'weight'"]),
        ("{sources: [{path: a}, {weight: 2}]}", ["data.sources[1]", "path"]),
        ("{sources: [a.jsonl]}", ["data.sources[0] is not a source"]),
        ("{sources: {path: a}}", ["'data.sources' is a value or a list"]),
        ("{sources: [{path: a, weight: x}]}", ["data.sources[0].weight: 'x' is not a number"]),
        ("{sources: [{path: a, weight: 0}]}", ["data.sources[0].weight is 0.0"]),
        ("{sources: [{path: a, format: json}]}", ["data.sources[0].format"]),
        ("{path: a, sources: [{path: b}]}", ["both set"]),
        ("{sources: [{path: b}], max_train_samples: 3}", ["max_samples in data.sources"]),
        ("{columns: [a]}", ["'data.columns' is a section"]),
        ("{columns: {prompt: [a]}}", ["data.columns.prompt is ['a']"]),
        ("{columns: {prmpt: a}}", ["data.columns", "did you mean 'prompt'"]),
    ],
)
def test_wrong_data_settings_are_named(text: str, parts: list[str]) -> None:
    problem = problem_of(MINIMAL + f"data: {text}\n")
    assert [part for part in parts if part not in problem] == []


def test_sources_survive_being_written() -> None:
    text = MINIMAL + "data: {sources: [{path: a, weight: 0.5}, {path: b, columns: {text: body}}]}\n"
    recipe = parse_recipe(text, source="r.yaml")
    assert recipe.data.sources[0].weight == 0.5
    assert recipe.data.sources[1].columns == {"text": "body"}
    assert parse_recipe(render_recipe(recipe), source="r.yaml") == recipe


@pytest.mark.parametrize("text", ["5", "true", "null: 3", "model: !!set {a, b}"])
def test_yaml_that_is_no_recipe_is_refused_in_words(text: str) -> None:
    assert "r.yaml" in problem_of(text)


def test_a_broken_interpolation_is_refused_where_it_stands() -> None:
    assert "model.name_or_path" in problem_of('model: {name_or_path: "${oc.env:HOME"}')
    assert "lora.r" in problem_of(MINIMAL, "lora.r=${nothing")
    with pytest.raises(RecipeError, match=r"model\.name_or_path"):
        parse_recipe("", source="r.yaml", options={"model.name_or_path": "${nothing"})


def test_an_element_of_a_list_that_is_no_text_is_refused() -> None:
    problem = problem_of(MINIMAL + "slurm: {modules: [{cuda: 12}]}")
    assert "slurm.modules holds {'cuda': 12}, which is no text" in problem
    assert "lora.target_modules" in problem_of(MINIMAL + "lora: {target_modules: [{a: b}]}")
    assert "tracking.report_to" in problem_of(MINIMAL + "tracking: {report_to: [[wandb]]}")


@pytest.mark.parametrize(
    ("path", "reason"), [("x" * 300, "too long"), ("~no-such-user-here/x", "no such user")]
)
def test_a_path_that_cannot_exist_is_refused_with_its_key(path: str, reason: str) -> None:
    problem = problem_of(MINIMAL, f"data.path={path}")
    assert "data.path" in problem
    assert reason in problem


def test_what_is_text_stays_as_it_was_typed() -> None:
    # YAML 1.1 reads the float 12.1, the sexagesimal 45000, the octal 7 and true.
    text = (
        "model: {name_or_path: x, revision: 12.10}\nslurm: {time: 12:30:00, account: 007}\n"
        "tracking: {run_name: yes}\ndata: {sources: [{path: a, split: 1_0}]}\n"
    )
    recipe = parse_recipe(text, source="r.yaml")
    assert recipe.model.revision == "12.10"
    assert (recipe.slurm.time, recipe.slurm.account) == ("12:30:00", "007")
    assert recipe.tracking.run_name == "yes"
    assert recipe.data.sources[0].split == "1_0"
    assert (
        parse_recipe(MINIMAL, source="r.yaml", overrides=["model.revision=1e5"]).model.revision
        == "1e5"
    )
    overrides = ["model.revision=1.0", "slurm.time=1:00:00", "optim.learning_rate=1e-3"]
    recipe = parse_recipe(text, source="r.yaml", overrides=overrides)
    assert (recipe.model.revision, recipe.slurm.time) == ("1.0", "1:00:00")
    assert recipe.optim.learning_rate == 1e-3
    assert parse_recipe(text, source="r.yaml", overrides=["slurm.time=null"]).slurm.time is None
    site = parse_site("slurm: {time: 1:30:00}", source="site.yaml")
    assert site.slurm.time == "1:30:00"
    (case,) = parse_sweep(f"defaults: {{{text.splitlines()[1]}}}\ncases: [{{name: a, model: "
                          "{name_or_path: x, revision: 12.10}}]", source="s.yaml")  # fmt: skip
    assert (case.recipe.model.revision, case.recipe.slurm.time) == ("12.10", "12:30:00")
    listed = "lora: {target_modules: [010]}\ndata: {columns: {prompt: 1.10}}"
    recipe = parse_recipe(MINIMAL + listed, source="r.yaml")
    assert (recipe.lora.target_modules, recipe.data.columns) == (("010",), {"prompt": "1.10"})


def test_every_key_of_a_recipe_is_in_the_docs_with_its_default() -> None:
    pages = {name: (DOCS / name).read_text(encoding="utf-8") for name in ("recipe.md", "slurm.md")}
    parts = {text.partition("\n")[0]: text for text in pages["recipe.md"].split("\n## ")}
    parts |= {"lora": parts["lora, quantization"], "quantization": parts["lora, quantization"]}
    missing = []
    for section in fields(Recipe):
        default = getattr(Recipe(), section.name)
        if section.name == "slurm":
            missing += [
                key.name for key in fields(default) if f"`{key.name}`" not in pages["slurm.md"]
            ]
        elif is_dataclass(default):
            rows = {key.name: _row(key.name, getattr(default, key.name)) for key in fields(default)}
            # The model's name has no default.
            rows = {name: row for name, row in rows.items() if name != "name_or_path"}
            missing += [name for name, row in rows.items() if row not in parts[section.name]]
        elif f"{section.name}:" not in pages["recipe.md"]:
            missing.append(section.name)
    assert missing == []


def _row(key: str, default: object) -> str:
    value = list(default) if isinstance(default, tuple) else default
    return f"| `{key}` | `{json.dumps(value)}` |".replace('"', "")
