"""Write the fault table into docs/reliability.md from what ``make test-faults`` has kept.

``python benchmarks/make_fault_table.py [--check]``: with ``--check`` nothing is written, and the
exit status is 1 when the page does not have the table.
"""

from __future__ import annotations

import json
import sys
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
        lines.append(
            f"| {row['fault']} | {row['backend']} | {row['zero_stage']} "
            f"| {seconds:.1f} s | {lost} | {row['result']} |\n"
        )
    return "".join(lines)


def main() -> int:
    """Write the table, or compare it."""
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    new = f"{before}{BEGIN}\n{table(rows)}\n{END}{after}"
    if "--check" in sys.argv[1:]:
        return int(new != page)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
