"""Write the fault table into docs/reliability.md from what ``make test-faults`` has kept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "benchmarks" / "faults.jsonl"
PAGE = ROOT / "docs" / "reliability.md"
BEGIN = "<!-- begin: benchmarks/make_fault_table.py -->\n"
END = "<!-- end -->\n"
_BACKENDS = ("local", "hostfile", "slurm")


def table(rows: list[Mapping[str, Any]]) -> str:
    """Return the rows as Markdown; of equal faults the one that was measured last."""
    last = {(row["fault"], row["backend"], row["zero_stage"]): row for row in rows}
    lines = [
        "| fault | backend | ZeRO | noticed after | steps done again | result |\n",
        "|---|---|---|---|---|---|\n",
    ]
    order = sorted(last.values(), key=lambda row: _BACKENDS.index(row["backend"]))
    for row in order:
        seconds, lost = row["noticed_seconds"], row["steps_lost"]
        noticed = "went on" if seconds is None else f"{seconds:.1f} s"
        lines.append(
            f"| {row['fault']} | {row['backend']} | {row['zero_stage']} "
            f"| {noticed} | {lost} | {row['result']} |\n"
        )
    return "".join(lines)


def page() -> str:
    """Return the page with the table of the rows that are kept."""
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n{table(rows)}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
