"""What no module does, read off the sources: shells, pickles, others' code, secrets in files."""

from __future__ import annotations

import ast
import logging
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import pytest

from launcher.errors import ModelError
from launcher.redact import redacted
from launcher.worker.program import quiet_libraries

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "launcher").rglob("*.py"))

SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
RUN_CODE = {
    "eval", "exec", "pickle.load", "pickle.loads", "marshal.load", "marshal.loads",
    "shelve.open", "dill.load", "joblib.load", "yaml.unsafe_load", "yaml.full_load",
}  # fmt: skip


@cache
def trees() -> Mapping[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}


def dotted(called: ast.expr) -> str:
    """Return what a call names, as ``ast.unparse`` does, which takes ten times as long."""
    if isinstance(called, ast.Name):
        return called.id
    if isinstance(called, ast.Attribute):
        return f"{dotted(called.value)}.{called.attr}"
    return ast.unparse(called)


@cache
def calls() -> Sequence[tuple[str, str, ast.Call]]:
    """Return where each call of the package is, what it calls, and the call."""
    return [
        (f"{path.relative_to(ROOT)}:{node.lineno}", dotted(node.func), node)
        for path, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    ]


def keyword(call: ast.Call, name: str) -> str | None:
    return next((ast.unparse(item.value) for item in call.keywords if item.arg == name), None)


def test_no_program_is_started_through_a_shell() -> None:
    found = [
        where
        for where, name, call in calls()
        if name in SHELLS or keyword(call, "shell") not in (None, "False")
    ]
    assert found == []


def test_no_list_of_arguments_hands_a_shell_a_text_of_ours() -> None:
    """``bash -c TEXT`` is a shell, too, whatever starts it."""
    found = []
    for path, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.List | ast.Tuple):
                words = [item.value for item in node.elts if isinstance(item, ast.Constant)]
                if {"bash", "sh", "/bin/sh", "/bin/bash"} & set(words) and "-c" in words:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == []


def test_nothing_that_is_read_can_run_code() -> None:
    found = [where for where, name, _ in calls() if name in RUN_CODE]
    loads = [(where, call) for where, name, call in calls() if name == "torch.load"]
    assert len(loads) >= 2
    found += [where for where, call in loads if keyword(call, "weights_only") != "True"]
    # The loader of sweeps is PyYAML's safe one.
    found += [
        where
        for where, name, call in calls()
        if name == "yaml.load" and ast.unparse(call.args[1]) != "_LOADER"
    ]
    sweep = (ROOT / "launcher" / "bench" / "sweep.py").read_text()
    assert "class _Loader(yaml.SafeLoader)" in sweep or "CSafeLoader" in sweep
    assert found == []


def test_nobody_else_s_code_is_trusted_unless_the_recipe_says_so() -> None:
    said = {
        where: value
        for where, _, call in calls()
        if (value := keyword(call, "trust_remote_code")) is not None
    }
    assert len(said) >= 5
    allowed = ("recipe.model.trust_remote_code", "trust_remote_code")
    assert {where: value for where, value in said.items() if value not in allowed} == {}


def test_a_secret_s_value_is_hidden_wherever_it_stands() -> None:
    environ = {"HF_TOKEN": "hf_abcdefgh", "WANDB_API_KEY": "0123456789", "HOME": "/home/someone"}
    text = "GET https://u:hf_abcdefgh@hub/x: 0123456789 is no key of /home/someone"
    assert redacted(text, environ) == "GET https://u:***@hub/x: *** is no key of /home/someone"
    # 'true' stands in too many places to be hidden everywhere.
    assert redacted("it is true", {"USE_TOKEN": "true"}) == "it is true"


def test_errors_and_logs_show_no_token(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from launcher.console import show_error

    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    show_error(ModelError("the hub refused: hf_abcdefgh", where="hub", fix="none"))
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    monkeypatch.setattr("warnings.filters", [])
    quiet_libraries(logging.INFO)
    logging.getLogger("launcher.x").info("with hf_abcdefgh")
    said = capsys.readouterr().err
    assert "hf_abcdefgh" not in said
    assert said.count("***") == 2
