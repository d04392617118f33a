"""Job scripts of typical sites; `python tests/golden/sbatch_cases.py` writes them anew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from launcher.job_script import DeepSpeedJob
from launcher.recipe_sections import SlurmSection
from launcher.sbatch_script import JOB_SBATCH, SlurmJob, render_array, render_slurm_job

FOLDER = Path(__file__).parent / "sbatch"
_GPU_RANKS = DeepSpeedJob(
    run_dir=PurePosixPath("/scratch/runs/one"),
    run_id="0123abcd",
    python=PurePosixPath("/home/me/venv/bin/python"),
    ranks_per_node=2,
    device_type="cuda",
    master_port=0,
    omp_num_threads=1,
    compute_capability=(9, 0),
    has_data=True,
)
_CPU_RANKS = replace(_GPU_RANKS, device_type="cpu", compute_capability=None, ranks_per_node=1)


def _job(ranks: DeepSpeedJob = _GPU_RANKS, **settings: Any) -> SlurmJob:
    return SlurmJob(
        ranks=ranks,
        num_nodes=2,
        settings=SlurmSection(**settings),
        signal_seconds=120,
        time_limit_minutes=60,
    )


JOBS = {
    "gpus-per-node": _job(partition="main"),
    "gres-with-type": _job(gres="gpu:h100", mem="3G", cpus_per_task=2, exclusive=True),
    "modules-and-account": _job(
        account="proj42",
        qos="long",
        time="1-00:00:00",
        modules=("cuda/12.4", "gcc/12"),
        extra=("--mail-type=END", "--comment=a b; $(id)"),
    ),
    "constraint": _job(constraint="h100|a100", requeue=False, signal_seconds=300),
    "pyxis": _job(
        container="nvcr.io#nvidia/pytorch:25.01-py3",
        container_runtime="pyxis",
        container_mounts=("/models:/models:ro",),
    ),
    "apptainer": _job(
        container="/images/zerofit 1.sif",
        container_runtime="apptainer",
        container_mounts=("/models",),
        python="/opt/venv/bin/python",
    ),
    "fewer-nodes": replace(_job(partition="main"), min_nodes=1),
    "cpu": _job(_CPU_RANKS, cpus_per_task=4),
    "hostile-names": _job(
        replace(_CPU_RANKS, run_dir=PurePosixPath("/scratch/a b/x;rm -rf $(id) 'q\" ü `id` #1")),
        job_name="a b;rm $(id) 'q\" ü # \\",
    ),
}


def scripts() -> dict[str, str]:
    """Return the text of every golden script by file name."""
    made = {
        f"{name}.sbatch": render_slurm_job(job, files={}).files[JOB_SBATCH]
        for name, job in JOBS.items()
    }
    runs = [
        replace(JOBS["cpu"], ranks=replace(_CPU_RANKS, run_dir=PurePosixPath(f"/scratch/s/{i}")))
        for i in range(3)
    ]
    array = render_array(runs, folder=PurePosixPath("/scratch/s"), max_parallel=2)
    return {**made, "array.sbatch": array.files[JOB_SBATCH]}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for file_name, text in scripts().items():
        (FOLDER / file_name).write_text(text, encoding="utf-8")
