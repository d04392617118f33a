"""Checkpoints on disk: whole or absent, the newest whole one found, the old ones removed."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from launcher import run_dir as rd
from launcher.run_checkpoints import MANIFEST
from launcher.strategy import Offload, Precision, Strategy
from launcher.worker import checkpoints as cp

LAYOUT = cp.layout_of(
    Strategy(zero_stage=2), Precision.bf16, {"zero_optimization": {"stage": 2}}, world_size=2
)
STATES = "global_step/states.pt"


def save(folder: Path, step: int) -> Path:
    """Save a checkpoint of two files as the trainer does."""
    staged = cp.staging_folder(folder) / f"checkpoint-{step}"
    (staged / STATES).parent.mkdir(parents=True)
    (staged / STATES).write_bytes(bytes(range(256)) * 40)
    (staged / "trainer_state.json").write_text("{}")
    cp.sync_files(staged)
    target = folder / f"checkpoint-{step}"
    cp.complete(staged, target, step=step, layout=LAYOUT, parameter_groups=(("a.weight",),))
    return target


def test_a_complete_checkpoint_is_read_back(tmp_path: Path) -> None:
    path = save(tmp_path, 10)
    found, skipped = cp.find_newest(tmp_path)
    assert skipped == []
    assert found == cp.Checkpoint(
        path=path, step=10, layout=LAYOUT, parameter_groups=(("a.weight",),)
    )
    assert not cp.staging_folder(tmp_path).exists()


def test_steps_are_compared_as_numbers(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        save(tmp_path, step)
    found, _ = cp.find_newest(tmp_path)
    assert found is not None
    assert found.step == 100


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        ("truncate", "skipped checkpoint-20: global_step/states.pt has 100 of 10,240 bytes"),
        ("flip", "skipped checkpoint-20: global_step/states.pt is not what was saved"),
        ("lose", "skipped checkpoint-20: global_step/states.pt cannot be read: No such file or"),
        ("unmark", "skipped checkpoint-20: it was never finished"),
        ("garble", "skipped checkpoint-20: its zerofit_checkpoint.json cannot be read: JSON"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_with_a_line_and_the_previous_one_used(
    tmp_path: Path, damage: str, line: str
) -> None:
    save(tmp_path, 10)
    newest = save(tmp_path, 20)
    states = newest / STATES
    if damage == "truncate":
        states.write_bytes(states.read_bytes()[:100])
    elif damage == "flip":
        content = bytearray(states.read_bytes())
        content[5000] ^= 1
        states.write_bytes(content)
    elif damage == "lose":
        states.unlink()
    elif damage == "unmark":
        (newest / MANIFEST).unlink()
    else:
        (newest / MANIFEST).write_text('{"files":')
    found, skipped = cp.find_newest(tmp_path)
    assert found is not None
    assert found.step == 10
    assert len(skipped) == 1
    assert skipped[0].startswith(line)


def test_a_large_file_is_known_by_its_beginning_and_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cp, "HASHED_BYTES", 64)
    path = save(tmp_path, 1)
    content = bytearray((path / STATES).read_bytes())
    content[-1] ^= 1
    (path / STATES).write_bytes(content)
    assert cp.find_newest(tmp_path)[0] is None


def test_what_was_being_written_never_counts(tmp_path: Path) -> None:
    save(tmp_path, 10)
    staged = cp.staging_folder(tmp_path) / "checkpoint-20"
    staged.mkdir(parents=True)
    (staged / "half").write_bytes(b"x")
    found, skipped = cp.find_newest(tmp_path)
    assert found is not None
    assert (found.step, skipped) == (10, [])
    cp.clear_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10"]


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    for step in (5, 10, 15, 100):
        save(tmp_path, step)
    cp.prune(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-100", "checkpoint-15"]
    cp.prune(tmp_path, keep=None)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_broken_checkpoint_is_replaced_by_one_of_the_same_step(tmp_path: Path) -> None:
    (save(tmp_path, 10) / STATES).unlink()
    save(tmp_path, 10)
    assert cp.find_newest(tmp_path)[0] is not None


def test_a_full_disk_names_the_checkpoint_that_is_left(tmp_path: Path) -> None:
    folder = tmp_path / rd.CHECKPOINTS
    path = save(folder, 10)
    error = cp.save_failure(OSError(errno.ENOSPC, "No space left on device"), folder)
    assert error.exit_code == 4
    assert "the disk is full" in error.problem
    assert str(path) in error.problem
    assert "zerofit resume" in error.fix


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.EFBIG, "File too large"), True),
        # torch 2.13 inline_container.cc
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"), True),
        (RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"), True),
        (RuntimeError("expected scalar type Float"), False),
        (ValueError("no"), False),
    ],
)
def test_only_failed_writes_are_called_so(error: Exception, expected: bool) -> None:
    assert cp.is_write_failure(error) is expected


def test_the_layout_is_what_the_states_depend_on() -> None:
    config = {"zero_optimization": {"stage": 3, "sub_group_size": 10**9, "overlap_comm": True}}
    layout = cp.layout_of(
        Strategy(zero_stage=3, offload_optimizer=Offload.cpu),
        Precision.fp32,
        config,
        world_size=4,
    )
    assert (layout.world_size, layout.zero_stage, layout.sub_group_size) == (4, 3, 10**9)
    assert layout.offload_optimizer == "cpu"
    assert LAYOUT.sub_group_size is None
