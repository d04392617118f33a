"""``zerofit doctor``: is this machine ready?"""

from __future__ import annotations

import json

import click

from launcher.commands.options import json_option
from launcher.console import out


@click.command()
@json_option
def doctor(*, as_json: bool) -> None:
    """Check this machine: GPUs, driver, versions, compilers, memory, disk, limits."""
    from launcher.dispatch.doctor import render_checks, run_checks

    checks = run_checks()
    if as_json:
        print(json.dumps([check.to_json() for check in checks], indent=1))
    else:
        out.print(render_checks(checks))
    if any(check.status == "fail" for check in checks):
        raise SystemExit(2)
