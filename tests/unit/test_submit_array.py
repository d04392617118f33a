"""A job array whose runs cannot be written down; sbatch and scancel are scripted."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from launcher import submit
from launcher.dispatch import slurm
from launcher.dispatch.base import JobHandle
from launcher.errors import RunDirError
from launcher.prepare import prepare
from launcher.recipe import parse_recipe


def test_an_array_whose_handles_cannot_be_written_is_cancelled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    cancelled, asked = tmp_path / "cancelled", tmp_path / "asked"
    for name, body in {
        **dict.fromkeys(("squeue", "scontrol"), "exit 1"),
        "sinfo": f"echo >> {asked}; exit 1",
        "sbatch": "echo 42",
        "scancel": f'echo "$@" > {cancelled}',
    }.items():
        (programs / name).write_text(f"#!/bin/sh\n{body}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))

    def disk_is_full(_handle: JobHandle) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(slurm, "write_handle", disk_is_full)
    overrides = ["cluster.backend=slurm", "cluster.gpu=H100-80GB", "model.random_weights=true"]
    recipe = parse_recipe(
        "model: {name_or_path: llama2-7b}", source="x", overrides=[*overrides, "optim.max_steps=2"]
    )
    folder = tmp_path / "sweep"
    with pytest.raises(RunDirError, match="No space left on device; job 42 is cancelled again"):
        submit.submit_array(
            [prepare(recipe, source="x")] * 2,
            folder,
            say=lambda _line: None,
            tokenize=False,
            max_parallel=None,
        )
    assert cancelled.read_text() == "42\n"
    assert not folder.exists()
    # Of the partition that all runs of the array are in, it was asked once.
    assert asked.read_text() == "\n"
