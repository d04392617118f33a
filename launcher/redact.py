"""Keep secrets out of what is shown and written: they live in the environment alone."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

SECRET_NAME = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|(API)?KEY|CREDENTIALS?)($|_)", re.IGNORECASE)
"""Names of variables whose values nobody else may see."""
# A shorter value could be any word; hiding that everywhere would hide what went wrong.
_SHORTEST = 8
HIDDEN = "***"


def redacted(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """Return a text without the values of variables that are secret by their names."""
    secrets = {
        value
        for name, value in environ.items()
        if len(value) >= _SHORTEST and SECRET_NAME.search(name)
    }
    # A longer one first, which may contain a shorter one.
    for value in sorted(secrets, key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return text
