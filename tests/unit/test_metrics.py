"""What a node serves to Prometheus, from the files of its ranks."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from report_inputs import PLAN, rank

from launcher import run_dir
from launcher.peaks import MemoryNow, peaks_to_json
from launcher.units import GIB
from launcher.worker.metrics import METRICS, NodeMetrics, serve_metrics
from launcher.worker.ranks import Ranks

MONITORING = Path(__file__).parents[2] / "monitoring"
NOW = MemoryNow(
    allocated_bytes=4 * GIB, reserved_bytes=5 * GIB, device_used_bytes=6 * GIB, host_rss_bytes=7
)
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two ranks on this host and one on another, in the middle of training."""
    folder = tmp_path / "a-run"
    (folder / run_dir.RANKS).mkdir(parents=True)
    run_dir.write_json(folder / run_dir.PLAN, PLAN | {"gpus_per_node": 2, "world_size": 3})
    for number, host in enumerate((socket.gethostname(), socket.gethostname(), "elsewhere")):
        peaks = rank(number, host=host, world_size=3, state="running", now=NOW)
        run_dir.write_json(run_dir.rank_file(folder, number), peaks_to_json(peaks))
    log = [{"step": 3, "total_steps": 9, "loss": 2.5}, {"step": 3, "eval_loss": 2.75}]
    lines = "".join(json.dumps(entry) + "\n" for entry in log)
    (folder / run_dir.TRAINER_LOG).write_text(lines + '{"step": 4, "lo')
    return folder


def scrape(folder: Path, *, first_rank: int = 0) -> Samples:
    registry = CollectorRegistry()
    registry.register(NodeMetrics(folder, first_rank=first_rank, world_size=3))
    text = generate_latest(registry).decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    found = [v for (n, have), v in samples.items() if n == name and labels.items() <= set(have)]
    assert len(found) == 1, (name, labels, found)
    return found[0]


def test_each_rank_of_the_node_has_its_memory_pace_and_prediction(run: Path) -> None:
    samples = scrape(run)
    for number in ("0", "1"):
        assert value(samples, "zerofit_memory_allocated_bytes", rank=number) == 4 * GIB
        assert value(samples, "zerofit_memory_device_used_bytes", rank=number) == 6 * GIB
        # 4,096 tokens a step; the median of 9, 1, 3 and 2 s is 2.5 s.
        assert value(samples, "zerofit_tokens_per_second", rank=number) == 4096 / 2.5
        assert value(samples, "zerofit_peak_allocated_bytes", rank=number, phase="backward") == (
            5 * GIB
        )
        predicted = "zerofit_predicted_peak_allocated_bytes"
        assert value(samples, predicted, rank=number, phase="backward") == 6 * GIB


def test_ranks_of_other_nodes_are_left_to_them(run: Path) -> None:
    assert {dict(labels).get("rank") for _, labels in scrape(run)} == {"0", "1", None}


def test_only_the_node_of_rank_0_tells_the_loss(run: Path) -> None:
    samples = scrape(run)
    assert value(samples, "zerofit_loss") == 2.5
    assert value(samples, "zerofit_eval_loss") == 2.75
    assert value(samples, "zerofit_total_steps") == 9
    assert not any(name == "zerofit_loss" for name, _ in scrape(run, first_rank=2))


def test_a_hostile_name_of_a_run_reaches_prometheus_unchanged(run: Path) -> None:
    name = 'we"ird\\n{run="x"} 1\nzerofit_loss 7'
    samples = scrape(run.rename(run.with_name(name)))
    assert {dict(labels)["run"] for _, labels in samples} == {name}
    assert value(samples, "zerofit_loss") == 2.5


@pytest.mark.parametrize("content", ["", '{"schema_version": 1, "ra', "[]", '{"rank": "x"}'])
def test_a_broken_file_of_a_rank_is_counted_and_hides_no_other(run: Path, content: str) -> None:
    run_dir.rank_file(run, 1).write_text(content)
    samples = scrape(run)
    assert value(samples, "zerofit_ranks_unreadable") == 1
    assert value(samples, "zerofit_steps_done", rank="0") == 4


def test_a_run_that_has_written_nothing_yet_is_served(tmp_path: Path) -> None:
    samples = scrape(tmp_path)
    assert value(samples, "zerofit_ranks_unreadable") == 0


def test_nothing_is_served_unless_the_recipe_names_a_port_and_by_one_rank_of_a_node() -> None:
    from launcher.recipe_sections import TrackingSection

    first, second = (Ranks(rank=n, local_rank=n, world_size=2) for n in (0, 1))
    assert serve_metrics(TrackingSection(), Path("run"), first) is None
    assert serve_metrics(TrackingSection(metrics_port=0), Path("run"), second) is None


@pytest.mark.parametrize("port", ["taken", 70_000, -5])
def test_a_port_that_cannot_be_had_is_said_and_ends_nothing(
    port: int | str, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from launcher.recipe_sections import TrackingSection

    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1] if port == "taken" else int(port)
        only = Ranks(rank=0, local_rank=0, world_size=1)
        assert serve_metrics(TrackingSection(metrics_port=number), run, only) is None
    assert f"no metrics at 127.0.0.1 port {number}" in caplog.text


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    text = (MONITORING / "grafana-dashboard.json").read_text()
    dashboard = json.loads(text)
    queries = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"zerofit_\w+", query)}
    assert len(dashboard["panels"]) == 10
    assert len(asked) > 15
    assert asked <= set(METRICS)
    assert set(re.findall(r"zerofit_\w+", text)) <= set(METRICS)


def test_the_example_for_prometheus_names_targets() -> None:
    (job,) = yaml.safe_load((MONITORING / "prometheus.yml").read_text())["scrape_configs"]
    assert job["static_configs"][0]["targets"]
