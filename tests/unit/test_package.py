"""Rules that hold for the whole package, however it grows."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted((ROOT / "launcher").rglob("*.py"))
HEAVY = ["torch", "transformers", "deepspeed", "peft", "datasets", "numpy", "matplotlib"]


def test_the_modules_were_found() -> None:
    assert len(MODULES) > 20


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield all functions, looking at statements alone: no expression holds one."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        if isinstance(node, ast.stmt | ast.excepthandler | ast.match_case):
            yield from functions(node)


def test_a_module_has_at_most_400_lines_and_its_functions_60() -> None:
    long = []
    num_functions = 0
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        if (lines := len(text.splitlines())) > 400:
            long.append(f"{path}: {lines} lines")
        for node in functions(ast.parse(text)):
            num_functions += 1
            if (lines := (node.end_lineno or 0) - node.lineno + 1) > 60:
                long.append(f"{path}: {node.name}: {lines} lines")
    assert long == []
    assert num_functions > 1000


def test_no_module_has_a_name_that_says_nothing() -> None:
    banned = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "handler"}
    assert [path.name for path in MODULES if path.stem in banned] == []


@pytest.mark.parametrize("module", ["launcher.cli", "launcher.prepare", "launcher.planning.view"])
def test_planning_imports_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"
