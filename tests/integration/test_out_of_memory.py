"""Real ranks run out of memory in every phase, and the run goes on as if they had not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from fault_rows import losses_of_steps
from worker_runs import Nursery, make_model, write_chats

from launcher import run_dir as rd
from launcher.dispatch.base import write_files
from launcher.dispatch.failure import describe_failure
from launcher.failure_kind import EXIT_STATUS, FailureKind
from launcher.launch import create_run, render_again
from launcher.post_mortem import read_post_mortems
from launcher.predict.memory import estimate_memory
from launcher.prepare import Prepared, prepare
from launcher.recipe import parse_recipe
from launcher.recovery.judge import Verdict, judge
from launcher.resume import set_aside
from launcher.run_checkpoints import newest_checkpoint

pytestmark = pytest.mark.integration

NUM_STEPS = 6
# (phase, step, rank, step of the newest whole checkpoint afterwards). The second step is the
# first one in which Adam's states, made in the first, are there from the beginning.
FAULTS: Sequence[tuple[str, int | None, int, int]] = (
    ("load", None, 1, 0),
    ("init", None, 0, 0),
    ("eval", 0, 1, 0),
    ("forward", 1, 0, 0),
    ("step", 2, 1, 0),
    ("save", 2, 0, 0),
    ("backward", 5, 1, 4),
)
TOLERANCE = 1e-5  # float32, losses near 5: sums over another number of micro-batches


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    root = tmp_path_factory.mktemp("oom")
    make_model(root / "model")
    write_chats(root / "train.jsonl", 48)
    write_chats(root / "eval.jsonl", 4)
    recipe = f"""
model: {{name_or_path: {root / "model"}, precision: fp32}}
method: lora
max_seq_len: 64
data: {{path: {root / "train.jsonl"}, eval_path: {root / "eval.jsonl"}}}
optim: {{global_batch_size: 8, max_steps: {NUM_STEPS}, learning_rate: 0.02, save_steps: 2}}
strategy:
  {{zero_stage: 2, micro_batch_size_per_gpu: 4, gradient_checkpointing: none, loss: full}}
cluster: {{gpus_per_node: 2}}
"""
    return prepare(parse_recipe(recipe, source="test"), source="test")


def fault(phase: str, step: int | None, rank: int) -> str:
    return f"oom:{phase}:rank={rank}" + ("" if step is None else f":step={step}")


def judged(run: Path, prepared: Prepared) -> Verdict:
    error = describe_failure(run, exit_code=1)
    return judge(run, prepared, error, [], supervisor="test")


def test_a_run_survives_lack_of_memory_in_every_phase(
    nursery: Nursery, prepared: Prepared, tmp_path: Path
) -> None:
    undisturbed, _, _ = create_run(prepared, tmp_path / "undisturbed")
    nursery.tokenize(undisturbed)
    assert nursery.train(undisturbed).returncode == 0

    run, _, request = create_run(prepared, tmp_path / "run")
    nursery.tokenize(run)
    faults = ",".join(fault(phase, step, rank) for phase, step, rank, _ in FAULTS)
    for phase, _, rank, checkpoint in FAULTS:
        outcome = nursery.train(run, ZEROFIT_FAULT=faults)
        assert outcome.statuses[rank] == EXIT_STATUS[FailureKind.gpu_oom], outcome.stderr
        # The other one only noticed, and may have been ended.
        assert outcome.statuses[1 - rank] not in (0, EXIT_STATUS[FailureKind.gpu_oom])
        (found,) = read_post_mortems(run)
        assert (found.rank, found.phase, found.kind) == (rank, phase, FailureKind.gpu_oom)
        assert found.predicted_bytes == sum(found.predicted.values()) > 0
        verdict = judged(run, prepared)
        assert (verdict.record.rank, verdict.record.phase) == (rank, phase)
        assert verdict.record.resumes_from_step == checkpoint
        if verdict.following is None:
            # Nothing less can be loaded: the last word says what would help.
            assert verdict.error.fix.startswith("no plan is left")
        else:
            plan, failed = verdict.following.prepared.plan, prepared.plan
            now = estimate_memory(plan.workload, failed.strategy, plan.cluster)
            name = next(item.phase for item in now.phases if item.phase == phase)
            then = plan.memory.phase(name).allocated_bytes
            assert then <= 0.95 * now.phase(name).allocated_bytes
        set_aside(run)
        write_files(request, run)
    assert verdict.following is not None
    assert verdict.record.changes["micro_batch_size_per_gpu"] == (4, 2)
    _, frugal = render_again(verdict.following.prepared, run)
    write_files(frugal, run)
    assert nursery.train(run, ZEROFIT_FAULT=faults).returncode == 0
    assert rd.read_status(run).state == "finished"
    losses = losses_of_steps(run)
    assert sorted(losses) == list(range(1, NUM_STEPS + 1))
    assert losses == pytest.approx(losses_of_steps(undisturbed), abs=TOLERANCE)
    last = newest_checkpoint(run)
    assert last is not None
    assert last.name == f"checkpoint-{NUM_STEPS}"
