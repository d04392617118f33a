"""The doctor's checks: each says what it found and what to do, and none hides another."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from test_probe import CPU_MACHINE, GPU_MACHINE, H100

from launcher.dispatch import check_machine, check_software, doctor
from launcher.dispatch.check import Check, run_guarded, warn
from launcher.dispatch.process_group import shared_memory_leftovers
from launcher.units import GIB


def by_name(checks: Iterator[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_every_check_that_is_not_well_says_what_to_do() -> None:
    checks = doctor.run_checks()
    assert {check.status for check in checks} <= {"ok", "warn", "fail"}
    assert all((check.fix is not None) == (check.status != "ok") for check in checks)
    assert len({check.name for check in checks}) == len(checks)
    json.dumps([check.to_json() for check in checks])


def test_a_check_that_breaks_is_reported_and_hides_no_other() -> None:
    def breaks() -> Iterator[Check]:
        raise KeyError("surprise")

    (check,) = run_guarded("limits", breaks)
    assert (check.name, check.status) == ("limits", "fail")
    assert "KeyError: 'surprise'" in check.value


def test_an_unreadable_gpu_choice_fails_and_the_other_checks_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1234")
    checks = doctor.run_checks()
    assert checks[0].status == "fail"
    assert "CUDA_VISIBLE_DEVICES" in checks[0].value
    assert "python" in {check.name for check in checks}


def test_the_table_shows_text_as_it_is() -> None:
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    console.print(doctor.render_checks([warn("disk", "[bold]/a[/bold]", "make room")]))
    console.file.close()
    shown = console.export_text()
    assert "[bold]/a[/bold]" in shown
    assert "fix: make room" in shown


def test_a_gpu_in_use_is_a_warning() -> None:
    checks = by_name(check_machine.check_gpus(GPU_MACHINE))
    assert checks["GPU 0"].status == "ok"
    assert checks["GPU 1"].status == "warn"
    assert "40.00 GiB free" in checks["GPU 1"].value


def test_a_gpu_outside_the_table_is_a_warning() -> None:
    machine = replace(GPU_MACHINE, gpus=(replace(H100, device_name="Voodoo 2"),))
    assert by_name(check_machine.check_gpus(machine))["GPU 0"].status == "warn"


@pytest.mark.parametrize(
    ("value", "status", "advice"),
    [
        ("", "ok", None),
        ("8.0;9.0+PTX", "ok", None),
        ("9.0a", "warn", "'9.0'"),
        ("10.0a 9.0a", "warn", "'9.0;10.0'"),
        ("Hopper", "warn", "9.0, or whatever"),
    ],
)
def test_an_architecture_that_deepspeed_cannot_read_is_a_warning(
    value: str, status: str, advice: str | None
) -> None:
    (check,) = check_software.check_arch_list({"TORCH_CUDA_ARCH_LIST": value})
    assert check.status == status
    if advice:
        assert check.fix is not None
        assert advice in check.fix


@pytest.mark.parametrize(
    ("version", "status"),
    [("2.13.0+cpu", "fail"), ("2.13.0+cu140", "fail"), ("2.13.0+cu130", "ok"), ("2.13.0", "ok")],
)
def test_a_torch_that_cannot_use_the_gpus_fails(version: str, status: str) -> None:
    (check,) = check_software.check_torch_build(GPU_MACHINE, torch_version=version)
    assert check.status == status
    (on_cpu,) = check_software.check_torch_build(CPU_MACHINE, torch_version=version)
    assert on_cpu.status == "ok"


def test_missing_compilers_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    monkeypatch.delenv("CXX", raising=False)
    checks = by_name(check_software.check_compilers(CPU_MACHINE))
    assert checks["C++ compiler"].status == "fail"
    assert checks["ninja"].status == "fail"
    assert "nvcc" not in checks


def test_leftovers_in_shared_memory_are_counted_for_this_user_and_port_only(
    tmp_path: Path,
) -> None:
    uid = os.getuid()
    mine = [f"deepspeed_allreduce_buffer_{uid}_127.0.0.1_29501_{rank}" for rank in (0, 1)]
    others = [
        f"deepspeed_allreduce_buffer_{uid}_127.0.0.1_29502_0",
        f"deepspeed_allreduce_buffer_{uid + 1}_127.0.0.1_29501_0",
        "nccl-29501_0",
    ]
    for name in mine + others:
        (tmp_path / name).write_bytes(b"x" * 1000)
    found = shared_memory_leftovers(master_port=29501, folder=tmp_path)
    assert [path.name for path in found] == mine
    checks = by_name(check_machine.check_shared_memory(tmp_path))
    leftovers = checks[f"{tmp_path} leftovers"]
    assert leftovers.status == "warn"
    assert leftovers.value.startswith("3 buffers")


def test_disks_are_checked_where_files_will_go_even_if_the_folder_is_not_there_yet(
    tmp_path: Path,
) -> None:
    environ = {"HOME": str(tmp_path), "HF_HOME": str(tmp_path / "not" / "yet")}
    checks = by_name(check_machine.check_disks(environ))
    assert str(tmp_path / "not" / "yet") in checks["disk of HF_HOME"].value
    assert str(tmp_path / ".cache" / "zerofit") in checks["disk of ZEROFIT_HOME"].value


def test_little_free_host_memory_is_a_warning() -> None:
    full = replace(CPU_MACHINE, available_bytes=1 * GIB)
    assert by_name(check_machine.check_host(full))["host memory"].status == "warn"
    assert by_name(check_machine.check_host(CPU_MACHINE))["host memory"].status == "ok"
