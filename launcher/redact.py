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
    for value in _secrets(environ):
        text = text.replace(value, HIDDEN)
    return text


def has_secrets(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether there is anything to hide."""
    return bool(_secrets(environ))


class StreamRedactor:
    """Takes secrets out of bytes that come in pieces, of which each may end within a secret."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        # As text of the file system: what a shell passes on need not be UTF-8.
        self._secrets = [os.fsencode(value) for value in _secrets(environ)]
        self._held = b""

    def feed(self, piece: bytes) -> bytes:
        """Return what can be shown by now; an end that may be the start of a secret is kept."""
        if not self._secrets:
            return piece
        piece = self._held + piece
        for secret in self._secrets:
            piece = piece.replace(secret, HIDDEN.encode())
        kept = max(_overlap(piece, secret) for secret in self._secrets)
        cut = len(piece) - kept
        self._held = piece[cut:]
        return piece[:cut]

    def rest(self) -> bytes:
        """Return what was kept: nothing follows it."""
        held, self._held = self._held, b""
        return held


def _secrets(environ: Mapping[str, str]) -> list[str]:
    found = {
        value
        for name, value in environ.items()
        if len(value) >= _SHORTEST and SECRET_NAME.search(name)
    }
    # A longer one first, which may contain a shorter one.
    return sorted(found, key=len, reverse=True)


def _overlap(piece: bytes, secret: bytes) -> int:
    """Return how many bytes at the end of a piece may be the start of a secret."""
    longest = min(len(piece), len(secret) - 1)
    return next((n for n in range(longest, 0, -1) if piece.endswith(secret[:n])), 0)
