"""What Slurm's variables say about the allocation that zerofit is started in."""

from __future__ import annotations

from launcher.allocation import Allocation, current_allocation

# As sbatch 22.05.8 sets them for --nodes=2 --ntasks-per-node=2 --gpus-per-node=2.
BATCH = {
    "SLURM_JOB_ID": "42",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_GPUS_ON_NODE": "2",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_TASKS_PER_NODE": "2(x2)",
}


def test_outside_of_slurm_there_is_none() -> None:
    assert current_allocation({}) is None
    assert current_allocation({"SLURM_CONF": "/etc/slurm.conf"}) is None


def test_nodes_gpus_and_tasks_are_read() -> None:
    whole = Allocation(job_id="42", num_nodes=2, gpus_per_node=2, tasks_per_node=2)
    assert current_allocation(BATCH) == whole
    # salloc on a login node sees no GPUs of its own.
    salloc = {name: BATCH[name] for name in BATCH if name != "SLURM_GPUS_ON_NODE"}
    assert current_allocation({**salloc, "SLURM_GPUS_PER_NODE": "h100:2"}) == whole


def test_the_cpus_of_each_node_are_read() -> None:
    seen = current_allocation({**BATCH, "SLURM_JOB_CPUS_PER_NODE": "4(x2),8"})
    assert seen is not None
    assert (seen.cpus_of_nodes, seen.cpus_per_task) == ((4, 4, 8), 1)
    odd = current_allocation({**BATCH, "SLURM_JOB_CPUS_PER_NODE": "many"})
    assert odd is not None
    assert odd.cpus_of_nodes == ()


def test_a_job_without_gpus_has_none() -> None:
    seen = current_allocation({**BATCH, "SLURM_GPUS_ON_NODE": "0", "SLURM_NTASKS_PER_NODE": ""})
    assert seen is not None
    assert (seen.gpus_per_node, seen.tasks_per_node) == (None, 2)
