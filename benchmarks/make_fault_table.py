"""Write the fault table into docs/reliability.md from what ``make test-faults`` has kept.

Rows of GPUs come from what ``benchmarks/scenarios.py`` has kept on two of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "benchmarks" / "faults.jsonl"
SCENARIOS = ROOT / "benchmarks" / "scenarios_h200x2.jsonl"
PAGE = ROOT / "docs" / "reliability.md"
BEGIN = "<!-- begin: benchmarks/make_fault_table.py -->\n"
END = "<!-- end -->\n"
_BACKENDS = ("local", "hostfile", "slurm", "local, 2 x H200")
_ON_GPUS = {
    "oom-recovers": "a GPU's memory runs out (a recipe that does not fit)",
    "sigterm-ends-the-run": "SIGTERM to zerofit",
    "sigusr1-ends-the-run": "SIGUSR1 to zerofit",
    "resume-2-to-1": "one of two ranks is left",
}
_STAGES = {"too-large": 2, "lora-z2": 2, "full-z3": 3}
"""Of the runs in benchmarks/scenarios.py."""


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as Markdown; of equal faults the one that was measured last."""
    last = {(row["fault"], row["backend"], row["zero_stage"]): row for row in rows}
    lines = [
        "| fault | backend | ZeRO | noticed after | steps done again | result |\n",
        "|---|---|---|---|---|---|\n",
    ]
    first = {row["fault"]: number for number, row in reversed([*enumerate(rows)])}
    order = sorted(
        last.values(),
        key=lambda row: (_BACKENDS.index(row["backend"]), first[row["fault"]], row["zero_stage"]),
    )
    for row in order:
        seconds, lost = row["noticed_seconds"], row["steps_lost"]
        noticed = "" if seconds is None else f"{seconds:.1f} s"
        lines.append(
            f"| {row['fault']} | {row['backend']} | {row['zero_stage']} "
            f"| {noticed} | {lost} | {row['result']} |\n"
        )
    return "".join(lines)


def rows_of_gpus(lines: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Yield a row for each scenario that held on GPUs; why it held is its result."""
    for line in lines:
        if line["scenario"] in _ON_GPUS and line["held"]:
            seconds = re.search(r"after (\d+\.\d) s, state", line["why"])
            yield {
                "fault": _ON_GPUS[line["scenario"]],
                "backend": _BACKENDS[-1],
                "zero_stage": _STAGES[line["run"]],
                "noticed_seconds": float(seconds[1]) if seconds else None,
                "steps_lost": 0,
                "result": line["why"].replace("|", "/").partition("; losses now")[0],
            }


def page() -> str:
    """Return the page with the table of the rows that are kept."""
    rows = [
        *(json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()),
        *rows_of_gpus(
            [json.loads(line) for line in SCENARIOS.read_text(encoding="utf-8").splitlines()]
        ),
    ]
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n{table(rows)}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
