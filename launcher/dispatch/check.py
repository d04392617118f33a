"""One line of ``zerofit doctor``: what was looked at, whether it will do, what to change."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Literal

_log = logging.getLogger(__name__)

CheckStatus = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """The result of one check; ``fix`` is there unless all is well."""

    name: str
    status: CheckStatus
    value: str
    fix: str | None = None

    def to_json(self) -> dict[str, str | None]:
        """Return the check as JSON values."""
        return asdict(self)


def ok(name: str, value: str) -> Check:
    """Return a check that is well."""
    return Check(name=name, status="ok", value=value)


def warn(name: str, value: str, fix: str) -> Check:
    """Return a check that some runs will trip over."""
    return Check(name=name, status="warn", value=value, fix=fix)


def fail(name: str, value: str, fix: str) -> Check:
    """Return a check without which nothing trains."""
    return Check(name=name, status="fail", value=value, fix=fix)


def run_guarded(name: str, check: Callable[[], Iterable[Check]]) -> list[Check]:
    """Run one check; if it breaks, that is its result, and the others still run."""
    try:
        return list(check())
    except Exception as error:  # noqa: BLE001  a broken check must not hide the others
        _log.debug("check %s broke", name, exc_info=True)
        return [
            fail(
                name,
                f"the check itself broke: {type(error).__name__}: {error}",
                "please report this; the other checks are not affected",
            )
        ]
