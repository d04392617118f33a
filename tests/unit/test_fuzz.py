"""Whatever files and programs hold or print: an answer, or an error in words, and soon.

A few inputs of each kind here; ``make fuzz`` draws 10,000.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher import run_dir as rd
from launcher.allocation import current_allocation
from launcher.bench.result import describe_result, parse_results, results_to_csv
from launcher.bench.sweep import parse_sweep
from launcher.data_cache import load_summary
from launcher.dispatch import slurm_commands as slurm
from launcher.dispatch.base import read_handle
from launcher.dispatch.rank_lines import lines_of_rank
from launcher.dispatch.run_state import observe_all
from launcher.dispatch.slurm_failure import describe_slurm_failure
from launcher.errors import LauncherError
from launcher.hostfile import filter_hosts, parse_hostfile
from launcher.machine_file import hosts_of_node_list, parse_machine_file
from launcher.measured_rates import rates_from_json
from launcher.model_source import resolve_model
from launcher.model_spec import spec_from_config
from launcher.peaks import PhasePeaks, RankPeaks, peaks_to_json
from launcher.prepare import prepare
from launcher.recipe import parse_recipe
from launcher.run_checkpoints import newest_checkpoint
from launcher.site_file import parse_site
from launcher.worker.checkpoints import read_checkpoint

# Of each kind; `make fuzz` asks for 500.
NUM_EACH = int(os.environ.get("ZEROFIT_FUZZ_EACH", "5"))
# Far above what any of them takes, also on a busy machine: more is a hang.
LONGEST = timedelta(seconds=120)

drawn = settings(
    max_examples=NUM_EACH,
    deadline=LONGEST,
    derandomize="ZEROFIT_FUZZ_EACH" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)

_numbers = st.integers() | st.floats() | st.sampled_from([0, -1, 2**63, 1e308, True])
_words = st.text(max_size=12) | st.sampled_from(["", "a b", "$(id)", "\0", "../..", "é", "null"])
anything: st.SearchStrategy[Any] = st.recursive(
    st.none() | _numbers | _words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_words, inner, max_size=3),
    max_leaves=6,
)
lines = st.text(max_size=200)


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """Draw the value with one of its parts, or several, replaced, left out or added."""
    tree = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        parent: Any = tree
        while True:
            keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(parent[key], dict | list) and draw(st.booleans()):
                parent = parent[key]
                continue
            if draw(st.integers(0, 4)) == 0:
                del parent[key]
            else:
                parent[key] = draw(anything)
            break
        if isinstance(parent, dict) and draw(st.integers(0, 4)) == 0:
            parent[draw(_words)] = draw(anything)
    return tree


@st.composite
def damaged(draw: st.DrawFn, text: str) -> str:
    """Draw the text cut off, or with something else in the middle."""
    start, stop = sorted(draw(st.tuples(*[st.integers(0, len(text))] * 2)))
    return text[:start] + draw(lines) + (text[stop:] if draw(st.booleans()) else "")


def json_text(value: Any) -> st.SearchStrategy[str]:
    return st.one_of(
        lines, anything.map(json.dumps), changed(value).map(json.dumps), damaged(json.dumps(value))
    )


def yaml_text(value: Any) -> st.SearchStrategy[str]:
    dump = partial(yaml.safe_dump, allow_unicode=True)
    return st.one_of(
        lines, anything.map(dump), changed(value).map(dump), damaged(yaml.safe_dump(value))
    )


def survives(action: Callable[..., object], *arguments: Any, **options: Any) -> None:
    """Call it; an error must be one in words, with something to do about it."""
    try:
        action(*arguments, **options)
    except LauncherError as error:
        is_said = bool(error.problem and error.fix)
        str(error).encode("utf-8", errors="strict")
        assert is_said, repr(error)  # noqa: PT017  a result or an error: either is right


RECIPE = {
    "model": {"name_or_path": "smollm2-135m", "precision": "bf16", "random_weights": True},
    "method": "lora",
    "max_seq_len": 128,
    "data": {"path": "train.jsonl", "columns": {"prompt": "q"}, "sources": []},
    "optim": {"global_batch_size": 8, "max_steps": 3, "learning_rate": 1e-4},
    "lora": {"r": 8, "target_modules": ["all-linear"]},
    "cluster": {"gpu": "H100-80GB", "num_nodes": 2, "gpus_per_node": 2},
    "strategy": {"zero_stage": 2, "offload_optimizer": "cpu", "optimizer": "adamw_torch"},
    "slurm": {"partition": "gpu", "extra": ["--mail-type=END"], "modules": ["cuda/12"]},
    "deepspeed": {"zero_optimization": {"reduce_bucket_size": 100000}},
}
PLANNED = {key: value for key, value in RECIPE.items() if key not in ("data", "slurm")}
SWEEP = {
    "defaults": PLANNED,
    "cases": [{"name": "a", "max_seq_len": 64}],
    "matrix": {"models": ["smollm2-135m"], "contexts": [64], "strategies": {"s": {}}},
}
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 300,
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "tie_word_embeddings": True, "sliding_window": 64, "torch_dtype": "bfloat16",
    "rope_scaling": {"type": "linear", "factor": 2.0}, "quantization_config": None,
}  # fmt: skip
RATES = {
    "schema": 1, "intra_node_all_reduce_gbit_per_s": 100.0,
    "inter_node_all_reduce_gbit_per_s": 10.0, "gemm_tflop_per_s": 500.0, "hosts": [],
}  # fmt: skip
HOSTFILE = "# two\nnode[01-02] slots=8\nfd77::17 slots=8\n"
MACHINES = "node1 slots=4 max_slots=8\nnode2:4\nnode3\n"
SQUEUE = "7|RUNNING|None|node[1-2]|2026-11-22T21:00:00\n8_1|PENDING|Resources||N/A\n"
SACCT = "7|CANCELLED by 1000|node1|None\n8|NODE_FAIL|node[1-2]|None\n9_[0-1]|PENDING||\n"
SINFO = "node1|idle|none\nnode2|down*|Not responding\n"
SRUN = (
    "0: step 1/3\nsrun: error: Node failure on node2\nsrun: error: node2: task 1: Killed\n"
    "slurmstepd: error: *** STEP 1.0 ON node1 CANCELLED ***\n"
)
ALLOCATION = {
    "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_GPUS_ON_NODE": "h100:2",
    "SLURM_TASKS_PER_NODE": "2(x4)", "SLURM_JOB_NUM_NODES": "2",
}  # fmt: skip
RESULT = {
    "case": "a", "state": "finished", "recipe": PLANNED, "strategy_label": None,
    "predicted": {"step_seconds": 2.0, "peak_allocated_bytes": 5, "fits": True},
    "measured": [{"peak_allocated_bytes": 4, "step_seconds": 1.0}], "failure": None,
    "wall_seconds": 3.0,
}  # fmt: skip
_PHASE = PhasePeaks(
    peak_allocated_bytes=10, peak_reserved_bytes=11, device_used_bytes=None, host_rss_bytes=5,
    seconds=1.0, count=1,
)  # fmt: skip
_PEAKS = RankPeaks(
    rank=0, local_rank=0, world_size=1, host="n", pid=1, device="cuda", device_name="H",
    state="running", steps_done=3, phases={"step": _PHASE}, step_seconds=(1.0, 1.0),
)  # fmt: skip
RUN_FILES: Mapping[str, Any] = {
    rd.STATUS: {"schema_version": 1, "state": "failed", "changed_at": "2026", "reason": "why"},
    rd.JOB: {
        "schema_version": 1, "backend": "local", "run_id": "id", "job_id": "12", "host": "n",
        "session_id": 12, "master_port": 29500, "watcher_pid": 1, "run_dir": "/r",
    },
    "ranks/00000.json": peaks_to_json(_PEAKS),
    rd.TRAINER_LOG: {"step": 3, "loss": 2.5, "learning_rate": 0.1},
    rd.RESULTS: {"eval_loss_before": 1.0, "samples": []},
}  # fmt: skip


@drawn
@given(text=yaml_text(RECIPE))
def test_recipes(text: str) -> None:
    survives(parse_recipe, text, source="recipe")


@drawn
@given(item=_words | damaged("optim.max_steps=3") | damaged("data.sources=[{path: a}]"))
def test_overrides(item: str) -> None:
    survives(parse_recipe, yaml.safe_dump(RECIPE), source="recipe", overrides=[item])


@drawn
@given(content=changed(PLANNED))
def test_plans(content: Any) -> None:
    def plan() -> None:
        prepare(parse_recipe(yaml.safe_dump(content), source="recipe"), source="recipe")

    survives(plan)


@drawn
@given(text=yaml_text(SWEEP))
def test_sweeps(text: str) -> None:
    survives(parse_sweep, text, source="sweep")


@drawn
@given(text=yaml_text({"slurm": RECIPE["slurm"]}))
def test_site_files(text: str) -> None:
    survives(parse_site, text, source="site.yaml")


@drawn
@given(text=lines | damaged(HOSTFILE))
def test_hostfiles(text: str) -> None:
    survives(parse_hostfile, text, source="hosts")


@drawn
@given(text=lines | damaged("node01@node02:0,2"))
def test_filters_of_hosts(text: str) -> None:
    hosts = parse_hostfile(HOSTFILE, source="hosts")
    survives(filter_hosts, hosts, include=text, exclude=None, source="hosts")
    survives(filter_hosts, hosts, include=None, exclude=text, source="hosts")


@drawn
@given(text=lines | damaged(MACHINES))
def test_machine_files(text: str) -> None:
    survives(parse_machine_file, text, source="machines")


@drawn
@given(text=lines | damaged("node[01-03,07],gpu1"))
def test_node_lists(text: str) -> None:
    survives(hosts_of_node_list, text, where="SLURM_JOB_NODELIST")


@drawn
@given(config=changed(CONFIG))
def test_configs_of_models(config: Any) -> None:
    survives(spec_from_config, config, name="model")


@drawn
@given(text=json_text(CONFIG))
def test_files_of_configs(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "model"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(text, errors="replace")
    survives(resolve_model, str(folder))


@drawn
@given(text=json_text(RATES))
def test_measured_rates(text: str) -> None:
    survives(rates_from_json, text, source="rates.json")


@drawn
@given(name=st.sampled_from(sorted(RUN_FILES)), data=st.data())
def test_files_of_runs(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "runs" / "one"
    (folder / rd.RANKS).mkdir(parents=True, exist_ok=True)
    (folder / rd.RECIPE).touch()
    for path, value in RUN_FILES.items():
        (folder / path).write_text(json.dumps(value) + "\n")
    (folder / name).write_text(data.draw(json_text(RUN_FILES[name])), errors="replace")
    for action in (rd.read_status, rd.read_ranks, read_handle, newest_checkpoint):
        survives(action, folder)
    # The list hides no run because another is broken.
    assert len(observe_all(folder.parent)) == 1


@drawn
@given(text=lines | damaged(SQUEUE), accounting=lines | damaged(SACCT))
def test_what_squeue_and_sacct_print(text: str, accounting: str) -> None:
    ended = slurm.parse_accounting(accounting, ["7", "8", "9_1"])
    for job in (*slurm.parse_jobs(text).values(), *ended.values()):
        assert job.is_pending in (True, False)
        assert job.has_ended in (True, False)


@drawn
@given(text=lines | damaged(SINFO))
def test_what_sinfo_prints(text: str) -> None:
    assert isinstance(slurm.parse_failed_nodes(text), str)


@drawn
@given(
    log=lines | damaged(SRUN),
    state=st.sampled_from(["COMPLETED", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "?"]) | _words,
)
def test_logs_of_jobs(tmp_path_factory: pytest.TempPathFactory, log: str, state: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "log"
    (folder / rd.LOGS).mkdir(parents=True, exist_ok=True)
    (folder / rd.LAUNCHER_LOG).write_text(log, errors="replace")
    seen = slurm.SlurmJobState(job_id="7", state=state, reason="", nodes="")
    assert describe_slurm_failure(folder, seen).problem
    list(lines_of_rank(log.splitlines(keepends=True), 1, is_labelled=True))


@drawn
@given(environment=changed(ALLOCATION))
def test_variables_of_slurm(environment: dict[str, Any]) -> None:
    survives(current_allocation, {key: str(value) for key, value in environment.items()})


@drawn
@given(text=json_text(RESULT))
def test_results_of_sweeps(text: str) -> None:
    def read() -> None:
        results = parse_results(text + "\n", source="results")
        results_to_csv(results)
        for result in results:
            describe_result(result)

    survives(read)


@drawn
@given(text=json_text({"schema_version": 1, "step": 3, "files": {"a": {"bytes": 1}}}))
def test_manifests_of_checkpoints(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "checkpoint-3"
    folder.mkdir(exist_ok=True)
    (folder / "zerofit_checkpoint.json").write_text(text, errors="replace")
    survives(read_checkpoint, folder)


@drawn
@given(text=json_text({"schema_version": 1, "train": {"num_sequences": 3}}))
def test_summaries_of_data(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "data"
    folder.mkdir(exist_ok=True)
    (folder / "summary.json").write_text(text, errors="replace")
    survives(load_summary, folder)
