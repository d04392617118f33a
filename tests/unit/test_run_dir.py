"""Run directories: made once, proven writable, read strictly."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from launcher import run_dir as rd
from launcher.errors import RunDirError

WHEN = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Path]:
    """Mount a 64 KiB file system in memory; needs root and the right to mount."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine does not allow mounting a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_parents_are_made_and_the_run_is_created(tmp_path: Path) -> None:
    run_dir = rd.create(tmp_path / "a" / "b" / "run")
    assert rd.read_status(run_dir).state == "created"
    assert sorted(path.name for path in run_dir.iterdir()) == ["logs", "ranks", "status.json"]


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    assert rd.create(tmp_path) == tmp_path


def test_an_existing_run_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    run_dir = rd.create(tmp_path / "run")
    before = sorted(run_dir.iterdir())
    with pytest.raises(RunDirError, match="exists and is not empty"):
        rd.create(run_dir)
    assert sorted(run_dir.iterdir()) == before


@pytest.mark.parametrize("below", ["", "run"])
def test_a_file_in_the_way_is_named(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunDirError, match="file"):
        rd.create(tmp_path / "file" / below)


def test_a_relative_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert rd.create(Path("runs/one")) == tmp_path / "runs" / "one"


@pytest.mark.parametrize("name", ["a b", "x;rm", "$(id)", "quo'te\"", "ünïcode", "line\nbreak"])
def test_hostile_names_are_only_names(tmp_path: Path, name: str) -> None:
    assert rd.create(tmp_path / name) == tmp_path / name


@pytest.mark.parametrize("name", ["nul\0", "\udcff"])
def test_names_that_no_file_can_hold_as_text_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(RunDirError, match="is not text"):
        rd.create(tmp_path / name)


def test_a_full_disk_is_found_before_anything_starts(mount: Path) -> None:
    with pytest.raises(RunDirError, match="No space left on device") as caught:
        rd.create(mount / "runs" / "one")
    assert "free some disk space" in caught.value.fix
    assert list(mount.iterdir()) == []


def test_a_read_only_disk_is_found_before_anything_starts(mount: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(mount)], check=True)
    with pytest.raises(RunDirError, match="Read-only file system"):
        rd.create(mount / "one")
    with pytest.raises(RunDirError, match="Read-only file system"):
        rd.create(mount)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(RunDirError, match="Permission denied"):
        rd.create(tmp_path / "run")


def test_a_disk_too_small_for_the_checkpoints_is_refused_and_nothing_stays(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match=r"needs 1048576\.00 GiB"):
        rd.create(tmp_path / "parent" / "run", needed_bytes=2**50)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("llama2-7b", "llama2-7b-lora-20260304-050607"),
        ("meta-llama/Llama-2-7b-hf", "Llama-2-7b-hf-lora-20260304-050607"),
        ("/models/my model/", "my-model-lora-20260304-050607"),
        ("../..", "model-lora-20260304-050607"),
    ],
)
def test_default_names_are_safe_in_any_path(model: str, name: str) -> None:
    assert rd.default_name(model, "lora", WHEN) == name


def test_two_runs_of_one_second_get_two_folders(tmp_path: Path) -> None:
    first, second = (
        rd.create_default(tmp_path, model="m", method="full", when=WHEN) for _ in range(2)
    )
    assert (first.name, second.name) == ("m-full-20260304-050607", "m-full-20260304-050607-2")


def test_a_status_is_read_back_with_its_reason(tmp_path: Path) -> None:
    rd.write_status(tmp_path, "failed", reason="rank 1 raised")
    status = rd.read_status(tmp_path)
    assert (status.state, status.reason) == ("failed", "rank 1 raised")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"schema_version": 1, "sta', "not JSON"),
        ('{"schema_version": 99, "state": "running"}', "schema_version is 99"),
        ('{"schema_version": 1, "state": "walking"}', "state 'walking' is unknown"),
        ("[1]", "not a JSON object"),
        (b"\xff\xfe", "not a text file"),
    ],
)
def test_a_broken_status_is_named(tmp_path: Path, text: str | bytes, problem: str) -> None:
    path = tmp_path / rd.STATUS
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RunDirError, match=problem) as caught:
        rd.read_status(tmp_path)
    assert caught.value.where == str(path)


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match=r"no status\.json"):
        rd.read_status(tmp_path)


def test_a_rank_file_of_another_version_is_named(tmp_path: Path) -> None:
    path = rd.rank_file(tmp_path, 3)
    path.parent.mkdir()
    path.write_text(json.dumps({"schema_version": 99}))
    with pytest.raises(RunDirError, match=r"00003\.json.*schema_version is 99"):
        rd.read_ranks(tmp_path)


def test_no_ranks_yet_is_no_error(tmp_path: Path) -> None:
    assert rd.read_ranks(rd.create(tmp_path / "run")) == ()


def test_a_write_that_fails_leaves_the_old_file_and_no_other(mount: Path) -> None:
    path = mount / "status.json"
    rd.write_text(path, "old")
    with pytest.raises(OSError, match="No space"):
        rd.write_text(path, "x" * 200_000)
    assert [item.name for item in mount.iterdir()] == ["status.json"]
    assert path.read_text() == "old"


def test_a_new_file_is_never_written_over_another(tmp_path: Path) -> None:
    path = tmp_path / "new" / "recipe.yaml"
    rd.create_file(path, "a")
    with pytest.raises(RunDirError, match="exists already"):
        rd.create_file(path, "b")
    assert path.read_text() == "a"
