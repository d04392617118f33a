"""docs/plan-json.md names every key of a plan, and every key that it names exists."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

from generators import ROOT
from planning_inputs import cluster, model, workload

from launcher.planning.matrix import make_matrix, matrix_to_json
from launcher.planning.plan import plan_to_json, strategy_from_json, strategy_to_json
from launcher.planning.planner import choose_strategy, make_plan
from launcher.strategy import Method

DOCUMENT = (ROOT / "docs" / "plan-json.md").read_text(encoding="utf-8")
# Their keys are names of components, of time's parts and of phases, which the page describes.
OPEN_MAPPINGS = {"host_components", "components", "phases"}


@cache
def plan() -> dict[str, Any]:
    place = cluster("V100-32GB")
    work = workload(place=place, method=Method.full, tokens=4096)
    return json.loads(json.dumps(plan_to_json(make_plan(work, place))))


def keys(value: object) -> set[str]:
    """All keys below a JSON value, those of open mappings left out."""
    if isinstance(value, list):
        return set().union(*map(keys, value)) if value else set()
    if not isinstance(value, dict):
        return set()
    found = set(value)
    for key, item in value.items():
        if key == "phases":
            found |= set().union(*(set(phase) for phase in item.values()))
        elif key not in OPEN_MAPPINGS:
            found |= keys(item)
    return found


def matrix() -> dict[str, Any]:
    place = cluster()
    return matrix_to_json(
        make_matrix(
            [model("llama2-7b")],
            (512,),
            method=Method.lora,
            cluster=place,
            choose=lambda spec, tokens: choose_strategy(workload(spec.name, tokens=tokens), place),
        )
    )


def test_every_key_is_documented() -> None:
    named = set(re.findall(r"`([a-z0-9_]+)`", DOCUMENT))
    assert keys(plan()) - named == set()
    assert keys(matrix()) - named == set()


def test_every_documented_key_exists() -> None:
    # The first cell of a table row names keys.
    first_cells = re.findall(r"^\| ([^|]+) \|", DOCUMENT, re.MULTILINE)
    named = {key for cell in first_cells for key in re.findall(r"`([a-z0-9_]+)`", cell)}
    assert len(named) > 40
    assert named - keys(plan()) - keys(matrix()) == set()


def test_components_add_up_to_their_phase() -> None:
    for phase in plan()["memory"]["phases"].values():
        assert sum(phase["components"].values()) == phase["allocated_bytes"]


def test_headroom_is_what_the_margin_leaves() -> None:
    content = plan()
    used = content["memory"]["device_used_bytes"]
    assert content["headroom_bytes"] == content["limit_bytes"] - used
    total = cluster("V100-32GB").gpu.memory_bytes
    assert content["limit_bytes"] + content["safety_margin_bytes"] == total


def test_a_strategy_survives_the_round_trip() -> None:
    strategy = choose_strategy(workload(), cluster()).best.strategy
    assert strategy_from_json(json.loads(json.dumps(strategy_to_json(strategy)))) == strategy
