"""What the local and the hostfile backend render for a plan, and what they refuse."""

from __future__ import annotations

import shlex
import socket
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from launcher import run_dir as rd
from launcher.dispatch import process_group
from launcher.dispatch.base import JobHandle, new_run_id, read_handle, write_handle
from launcher.dispatch.deepspeed import HostfileBackend, is_only_this_machine, read_hostfile
from launcher.dispatch.local import LocalBackend, choose_port
from launcher.dispatch.slurm import SlurmBackend
from launcher.errors import HostfileError, RunDirError, SetupError
from launcher.hardware import cpu_spec, default_cluster, find_gpu
from launcher.hostfile import Host
from launcher.model_spec import spec_from_config
from launcher.planning.plan import Plan
from launcher.predict.memory import MemoryEstimate
from launcher.predict.step_time import TimeEstimate
from launcher.recipe_sections import SlurmSection
from launcher.strategy import Method, Strategy
from launcher.units import GIB
from launcher.workload import Workload

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


def make_plan(
    device: Literal["cuda", "cpu"] = "cuda", *, num_nodes: int = 1, gpus_per_node: int = 2
) -> Plan:
    gpu = find_gpu("H100-80GB") if device == "cuda" else cpu_spec(8 * GIB)
    return Plan(
        workload=Workload(
            model=spec_from_config(LLAMA, name="tiny"),
            method=Method.lora,
            max_seq_len=128,
            global_batch_size=8,
        ),
        cluster=default_cluster(gpu, num_nodes=num_nodes, gpus_per_node=gpus_per_node),
        strategy=Strategy(zero_stage=2),
        fits=True,
        memory=MemoryEstimate(
            phases=(),
            peak_reserved_bytes=0,
            device_used_bytes=0,
            host_bytes_per_node=0,
            host_components={},
            nvme_bytes_per_node=0,
            checkpoint_bytes=0,
        ),
        time=TimeEstimate(
            step_seconds=1.0,
            components={},
            tokens_per_second_per_gpu=1.0,
            mfu=0.1,
            bound_by="compute",
        ),
        limit_bytes=0,
        safety_margin_bytes=0,
        decisions=(),
        rejected=(),
        ladder=(),
    )


def command_of(script: str) -> list[str]:
    return shlex.split(script.rpartition("exec ")[2].replace("\\\n", ""))


def local(**changes: object) -> LocalBackend:
    return replace(LocalBackend(master_port=29500, num_cores=16, run_id="id"), **changes)  # type: ignore[arg-type]


def test_a_plan_for_two_gpus_becomes_two_ranks_with_half_of_the_cores_each() -> None:
    request = local().render(make_plan(), run_dir=Path("/runs/a"), files={"plan.json": "{}"})
    script = request.files["job.sh"]
    words = command_of(script)
    assert words[words.index("--num_gpus") + 1] == "2"
    assert words[-2:] == ["--run-dir", "/runs/a"]
    assert words[words.index("--module") + 1] == "launcher.worker.train"
    assert "export OMP_NUM_THREADS=8\n" in script
    assert "export TORCH_CUDA_ARCH_LIST=9.0\n" in script
    assert request.files["plan.json"] == "{}"


def test_rendering_twice_gives_the_same_request() -> None:
    backend = local()
    first, second = (
        backend.render(make_plan(), run_dir=Path("/runs/a"), files={}) for _ in range(2)
    )
    assert first == second


def test_the_visible_gpus_are_used_and_no_others() -> None:
    request = local(visible_gpus=(4, 6, 7)).render(make_plan(), run_dir=Path("/r"), files={})
    assert "localhost:4,6" in command_of(request.files["job.sh"])


@pytest.mark.parametrize("visible", [(), (3,)])
def test_fewer_visible_gpus_than_planned_is_an_error(visible: tuple[int, ...]) -> None:
    with pytest.raises(SetupError, match=f"allows {len(visible)} GPUs and the plan needs 2"):
        local(visible_gpus=visible).render(make_plan(), run_dir=Path("/r"), files={})


def test_ranks_on_the_processor_do_not_care_about_visible_gpus() -> None:
    request = local(visible_gpus=()).render(make_plan("cpu"), run_dir=Path("/r"), files={})
    assert "export DS_ACCELERATOR=cpu\n" in request.files["job.sh"]


def test_a_plan_for_several_nodes_never_runs_on_one() -> None:
    with pytest.raises(SetupError, match="4 nodes"):
        local().render(make_plan(num_nodes=4), run_dir=Path("/r"), files={})


def test_a_hostfile_that_does_not_match_the_plan_is_an_error() -> None:
    hosts = (Host(name="node1", slots=2), Host(name="node2", slots=2))
    backend = HostfileBackend(master_port=29500, num_cores=16, hosts=hosts)
    assert backend.name == "deepspeed"
    request = backend.render(make_plan(num_nodes=2), run_dir=Path("/r"), files={})
    assert command_of(request.files["job.sh"])[1:3] == ["--hostfile", "/r/hostfile"]
    with pytest.raises(HostfileError, match="2 hosts with 2 slots each, the plan is for 2 nodes"):
        backend.render(make_plan(num_nodes=2, gpus_per_node=8), run_dir=Path("/r"), files={})


def test_ipv6_addresses_start_ranks_through_pdsh_and_are_where_they_meet() -> None:
    hosts = (Host(name="fd77::1", slots=2), Host(name="fd77::2", slots=2))
    backend = HostfileBackend(master_port=29500, num_cores=16, hosts=hosts)
    request = backend.render(make_plan(num_nodes=2), run_dir=Path("/r"), files={})
    words = command_of(request.files["job.sh"])
    assert words[words.index("--master_addr") + 1] == "fd77::1"
    assert request.files["hostfile"] == "fd77::1 slots=2\nfd77::2 slots=2\n"


@pytest.mark.parametrize(("launcher", "gpu_ids"), [("openmpi", ()), ("pdsh", (0, 3))])
def test_an_ipv6_address_where_a_colon_means_gpus_is_refused_with_the_way_out(
    launcher: Literal["pdsh", "openmpi"], gpu_ids: tuple[int, ...]
) -> None:
    hosts = tuple(Host(name=f"fd77::{i}", slots=2, gpu_ids=gpu_ids) for i in (1, 2))
    backend = HostfileBackend(master_port=29500, num_cores=16, hosts=hosts, launcher=launcher)
    with pytest.raises(HostfileError, match=r"fd77::1: .* colon .* GPUs(.|\n)*/etc/hosts"):
        backend.render(make_plan(num_nodes=2), run_dir=Path("/r"), files={})


def test_a_missing_hostfile_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(HostfileError, match="No such file"):
        read_hostfile(tmp_path / "hosts")


def test_only_a_single_local_name_counts_as_this_machine() -> None:
    here = Host(name=socket.gethostname(), slots=1)
    assert is_only_this_machine((here,))
    assert not is_only_this_machine((Host(name="elsewhere.example", slots=1),))
    assert not is_only_this_machine((here, Host(name="localhost", slots=1)))


def test_a_port_that_is_taken_is_not_chosen() -> None:
    with socket.socket() as taken:
        port = choose_port()
        taken.bind(("", port))
        taken.listen()
        assert choose_port() != port


def test_a_handle_is_read_back(tmp_path: Path) -> None:
    handle = JobHandle(
        backend="local",
        run_dir=tmp_path,
        run_id="id",
        job_id="12",
        host="node1",
        session_id=12,
        master_port=29500,
    )
    write_handle(handle)
    assert read_handle(tmp_path) == handle


def test_a_run_that_was_never_started_has_no_handle(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match=r"no job\.json"):
        read_handle(rd.create(tmp_path / "run"))


def test_a_program_that_is_missing_is_named_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    # An id that no other test on this machine has at the same time: processes are found by it.
    backend = local(run_id=new_run_id())
    request = backend.render(make_plan("cpu"), run_dir=tmp_path / "run", files={})
    with pytest.raises(SetupError, match="cannot start bash"):
        backend.submit(request, run_dir=rd.create(tmp_path / "run"))
    assert process_group.find_processes(backend.run_id) == []


def test_a_run_that_needs_more_than_the_partition_allows_is_planned_as_a_chain() -> None:
    # 10,000 steps of 1 s: 15 min + 1.7 x 10,000 s are 298 min, in quarters of an hour 300.
    alone = SlurmBackend(settings=SlurmSection(), num_steps=10_000)
    assert alone.job(make_plan(), Path("/run")).time_limit_minutes == 300
    assert alone.num_jobs(make_plan()) == 1
    # An hour a job, of which the lead (1.7 s + 60 s, at least 120 s) and the start (60 s) are not
    # trained in: 10,000 s / 3,420 s.
    chain = replace(alone, partition_minutes=60.0)
    assert chain.job(make_plan(), Path("/run")).time_limit_minutes == 60
    assert chain.num_jobs(make_plan()) == 3
    # The signal leaves half of a short job to train in.
    short = replace(alone, settings=SlurmSection(time="3"))
    assert short.job(make_plan(), Path("/run")).signal_seconds == 90
