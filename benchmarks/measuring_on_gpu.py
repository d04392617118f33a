"""What zerofit measures on a GPU, tried there: the tests marked gpu, and what measuring costs.

    benchmarks/on_gpu.sh benchmarks/measuring_on_gpu.py FOLDER

Four to five minutes on an H100 (the tests alone 184 s), after a sweep has compiled DeepSpeed's
operators. In FOLDER are what the tests said and the cost, the runs of the tests without torch's
snapshots, and what `zerofit calibrate` makes of the runs of a sweep on the same machine. A step
that fails is said, and the others go on; the exit status counts them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ("tests/integration/test_memory_snapshot.py", "tests/integration/test_run_on_gpu.py")
# That machine has no hypothesis, which tests/conftest.py needs; and what its other versions of
# libraries warn of is shown, where elsewhere it fails a test.
PYTEST = ("-m", "pytest", "-v", "-m", "gpu", "--noconftest", "-W", "default", "--tb=short")
SWEEP_RUNS = Path("/tmp/zerofit-runs")  # noqa: S108 - of on_gpu.sh
CALIBRATE = ("-m", "launcher.cli", "calibrate", "--dry-run", str(SWEEP_RUNS))
STEP_SECONDS = 480.0


def run(log: Path, *argv: str) -> bool:
    """Run Python with arguments, show and keep what it says; return whether it went well."""
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as stream:
        try:
            status = subprocess.run(
                [sys.executable, *argv], cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT,
                timeout=STEP_SECONDS, check=False,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            status = -1
    text = log.read_text(encoding="utf-8", errors="replace")
    print(f"== {log.name}: status {status} after {time.monotonic() - started:.0f} s")
    print("\n".join(text.splitlines()[-120:]), flush=True)
    return status == 0


def keep_runs(folder: Path, archive: Path) -> None:
    """Keep what small files the runs of the tests have: not their snapshots or checkpoints."""

    def small(item: tarfile.TarInfo) -> tarfile.TarInfo | None:
        is_large = item.size > 2**21 or Path(item.name).name in ("snapshots", "checkpoints")
        return None if is_large else item

    with tarfile.open(archive, "w:gz") as stream:
        stream.add(folder, arcname="runs", filter=small)


def snapshot_sizes(folder: Path) -> str:
    """Return the size of each of torch's snapshots, a line each."""
    found = sorted(folder.rglob("snapshots/*"))
    return "".join(f"{path.stat().st_size:12,} {path.relative_to(folder)}\n" for path in found)


def main() -> int:
    """Do all of it; the exit status is the number of steps that failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="zerofit-gpu-") as name:
        runs = Path(name) / "runs"
        steps: dict[str, tuple[str, ...]] = {
            "gpu-tests.txt": (*PYTEST, f"--basetemp={runs}", *TESTS),
            "measuring-cost.jsonl": ("benchmarks/measuring_cost.py",),
        }
        if SWEEP_RUNS.is_dir():
            steps["calibrate.txt"] = CALIBRATE
            steps["calibrate.json"] = (*CALIBRATE, "--json")
        failed = [log for log, argv in steps.items() if not run(out / log, *argv)]
        if runs.is_dir():
            (out / "snapshots.txt").write_text(snapshot_sizes(runs), encoding="utf-8")
            keep_runs(runs, out / "gpu-runs.tar.gz")
    if SWEEP_RUNS.is_dir():
        keep_runs(SWEEP_RUNS, out / "sweep-runs.tar.gz")
    print(f"failed: {', '.join(failed) or 'nothing'}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
