"""What is said of nodes before a job, from their reports."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console

from launcher.dispatch.job_preflight import why_not
from launcher.dispatch.node_report import MISSING, NodeReport, hash_tree
from launcher.dispatch.on_nodes import Answer, run_by_srun, run_by_ssh
from launcher.dispatch.preflight import Needs, Preflight, judge, needs_from_json
from launcher.dispatch.preflight_view import render_preflight
from launcher.errors import HardwareError, HostfileError
from launcher.hostfile import Host
from launcher.machine_file import hosts_of_node_list, parse_machine_file
from launcher.measured_rates import rates_from_json
from launcher.units import GIB

REPORT = NodeReport(
    host="n",
    clock_seconds=1000.0,
    gpu_names=("NVIDIA H100 80GB HBM3",) * 8,
    smallest_gpu_free_bytes=79 * GIB,
    driver="550.54.15",
    cuda="12.4",
    versions={"python": "3.11.7", "torch": "2.13.0", "deepspeed": "0.19.8", "nccl": "2.27.3"},
    memory_available_bytes=1000 * GIB,
    shared_memory_free_bytes=500 * GIB,
    disk_free_bytes=900 * GIB,
    hashes={"/data/train.jsonl": "0123456789abcdef"},
    listener=None,
    locked_memory_bytes=None,
    open_files=65536,
)
NEEDS = Needs(disk_bytes=100 * GIB, host_memory_bytes=400 * GIB, gpus_per_node=8)


def problems_of(changed: NodeReport, *, at_seconds: float = 1000.1, index: int = 2) -> list[str]:
    """Return what is said of one node among five, the others being alike."""
    hosts = [Host(name=f"n{number}", slots=8) for number in range(5)]
    answers = [
        Answer(
            host=host.name,
            value=asdict(changed if number == index else REPORT),
            at_seconds=at_seconds if number == index else 1000.1,
        )
        for number, host in enumerate(hosts)
    ]
    nodes = judge(hosts, answers, NEEDS)
    assert [node.is_good for node in nodes].count(False) <= 1
    assert nodes[index - 1].is_good
    return list(nodes[index].problems)


def test_equal_nodes_are_good() -> None:
    assert problems_of(REPORT) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"gpu_names": ("NVIDIA H100 80GB HBM3",) * 7}, "7 GPUs, 8 are needed"),
        ({"gpu_names": ()}, "no GPUs, 8 are needed"),
        ({"gpu_names": ("NVIDIA A100-SXM4-80GB",) * 8}, "GPUs is NVIDIA A100"),
        ({"driver": "535.1"}, "driver is 535.1, 550.54.15 on most nodes"),
        ({"cuda": "12.2"}, "CUDA is 12.2, 12.4 on most nodes"),
        ({"versions": {**REPORT.versions, "nccl": "2.20"}}, "nccl is 2.20, 2.27.3 on most"),
        ({"versions": {**REPORT.versions, "torch": None}}, "torch is None, 2.13.0 on most"),
        ({"memory_available_bytes": 300 * GIB}, "host memory: 300.00 GiB free, 400.00"),
        ({"shared_memory_free_bytes": 64 * 2**20}, "/dev/shm: 64"),
        ({"disk_free_bytes": 9 * GIB}, "disk of the run: 9.00 GiB free, 100.00"),
        ({"hashes": {"/data/train.jsonl": MISSING}}, "/data/train.jsonl is not there"),
        ({"hashes": {"/data/train.jsonl": "f" * 16}}, "has other content than on most nodes"),
        ({"open_files": 256}, "ulimit -n is 256"),
        ({"locked_memory_bytes": 2**16}, "ulimit -l is 64.00 KiB, unlimited on most nodes"),
    ],
)
def test_a_node_that_differs_is_named_with_the_reason(
    changes: dict[str, object], problem: str
) -> None:
    assert problem in "; ".join(problems_of(replace(REPORT, **changes)))  # type: ignore[arg-type]


def test_a_clock_that_is_off_is_a_problem() -> None:
    assert problems_of(REPORT, at_seconds=990.0) == ["its clock is +10.0 s off"]


def test_the_port_matters_on_the_first_node_only() -> None:
    taken = replace(REPORT, listener="port 20001 is taken by process 12 (python)")
    assert problems_of(taken) == []
    assert problems_of(taken, index=0) == ["port 20001 is taken by process 12 (python)"]


def test_the_json_has_every_key_that_plan_measured_reads() -> None:
    hosts = [Host(name="n1", slots=8)]
    answer = Answer(host="n1", problem="it refuses ssh connections", fix="start sshd on n1")
    nodes = judge(hosts, [answer], Needs())
    rates = {
        "intra_node_all_reduce_gbit_per_s": 2900.0,
        "inter_node_all_reduce_gbit_per_s": 9.6,
        "gemm_tflop_per_s": 798.0,
    }
    written = json.dumps(Preflight(nodes=nodes, rates=rates).to_json())
    read = rates_from_json(written, source="rates.json")
    assert read.intra_node_bytes_per_s == pytest.approx(362.5e9)
    assert read.inter_node_bytes_per_s == pytest.approx(1.2e9)
    assert read.gemm_flops_per_s == pytest.approx(798e12)
    assert json.loads(written)["hosts"][0]["problems"] == ["it refuses ssh connections"]


def test_a_preflight_without_rates_cannot_be_planned_with() -> None:
    hosts = [Host(name="n1", slots=8)]
    nodes = judge(hosts, [Answer(host="n1", problem="it refuses ssh connections")], Needs())
    made = Preflight(nodes=nodes, rates_problem="the all-reduce failed; n1: no route")
    with pytest.raises(HardwareError, match="it has no rates: the all-reduce failed; n1: no route"):
        rates_from_json(json.dumps(made.to_json()), source="rates.json")


def test_a_report_of_another_version_is_a_problem_of_that_node() -> None:
    value = asdict(REPORT)
    del value["open_files"]
    (node,) = judge([Host(name="n1", slots=8)], [Answer(host="n1", value=value)], Needs())
    assert node.problems == ("its report is of another version of zerofit",)


def test_a_program_that_is_missing_here_is_said_and_no_crash(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (answer,) = run_by_ssh(["n1"], "m", lambda _: [], timeout_seconds=1)
    assert answer.problem == "cannot start ssh: No such file or directory"
    values, said = run_by_srun("m", [], nodes=["n1"], timeout_seconds=1)
    assert (values, said) == ([], "cannot start srun: No such file or directory")


def test_a_large_file_s_hash_changes_with_its_size_and_its_blocks(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with file.open("wb") as stream:
        stream.truncate(2**25)
    before = hash_tree(tmp_path)
    with file.open("r+b") as stream:
        stream.write(b"x")
    changed = hash_tree(tmp_path)
    assert before != changed
    with file.open("ab") as stream:
        stream.write(b"\0")
    assert hash_tree(tmp_path) != changed
    assert hash_tree(tmp_path / "nothing") == MISSING


def test_machine_files_of_open_mpi_and_mpich_are_read() -> None:
    text = "# nodes\nnode1 slots=4 max_slots=8\nnode2:2\nnode3\nnode4\nnode4\n"
    assert parse_machine_file(text, source="machines") == {
        "node1": 4,
        "node2": 2,
        "node3": None,
        "node4": 2,
    }


@pytest.mark.parametrize(
    "line", ["node1 rest", "node1:0", "node1 slots=0", "$(id)", "a;b", "node1:x", "-oX"]
)
def test_a_machine_file_s_bad_line_is_named(line: str) -> None:
    with pytest.raises(HostfileError, match="machines:2"):
        parse_machine_file(f"node9\n{line}\n", source="machines")


def test_slurm_s_node_lists_are_expanded() -> None:
    names = hosts_of_node_list("node[01-03,07],gpu1,r[1-2]n[1-2]", where="here")
    assert names == (
        *("node01", "node02", "node03", "node07", "gpu1"),
        *("r1n1", "r1n2", "r2n1", "r2n2"),
    )


def test_the_needs_of_a_job_are_read_back_in_it() -> None:
    needs = replace(NEEDS, paths=(Path("/data/a b.jsonl"),), run_parent=Path("/runs"))
    assert needs_from_json(json.loads(json.dumps(needs.to_json()))) == needs
    with pytest.raises(ValueError, match="not the needs of a job"):
        needs_from_json({"paths": []})


def test_a_job_goes_on_with_spare_nodes_and_names_the_bad_ones_when_they_do_not_suffice() -> None:
    hosts = [Host(name=f"n{number}", slots=8) for number in range(3)]
    bad = replace(REPORT, disk_free_bytes=0)
    answers = [
        Answer(host=host.name, value=asdict(bad if host.name == "n1" else REPORT), at_seconds=1000)
        for host in hosts
    ]
    made = Preflight(nodes=judge(hosts, answers, NEEDS))
    assert why_not(made, num_nodes=2) is None
    assert [host.name for host in made.good[:2]] == ["n0", "n2"]
    said = why_not(made, num_nodes=3)
    assert said == "2 of 3 nodes are good; n1: disk of the run: 0 B free, 100.00 GiB needed"


def test_gpu_memory_that_somebody_else_uses_is_a_reason() -> None:
    hosts = [Host(name="n0", slots=8)]
    needs = replace(NEEDS, gpu_memory_bytes=80 * GIB)
    nodes = judge(hosts, [Answer(host="n0", value=asdict(REPORT), at_seconds=1000)], needs)
    assert nodes[0].problems == ("GPU memory: 79.00 GiB free, 80.00 GiB needed",)


def test_what_is_the_same_on_all_nodes_is_said_once_and_the_rest_fits_a_terminal() -> None:
    hosts = tuple(Host(name=f"node{number}", slots=8) for number in (1, 2, 3))
    reports = [replace(REPORT, host="node1"), replace(REPORT, host="node2", driver="1.2")]
    answers = [Answer(host=item.host, value=asdict(item), at_seconds=1000.0) for item in reports]
    answers.append(Answer(host="node3", problem="it is down"))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render_preflight(Preflight(nodes=judge(hosts, answers, NEEDS))))
    lines = console.export_text().splitlines()
    assert "python" not in lines[0]
    starts = [line.split()[:2] for line in lines if "GiB" in line]
    assert starts == [["ok", "node1"], ["fail", "node2"]]
    assert "torch 2.13.0; deepspeed 0.19.8" in " ".join(" ".join(lines).split())
    assert "node3: it is down" in lines
