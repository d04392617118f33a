"""Fixtures that several test modules share."""

from __future__ import annotations

import os

# Tests never reach a network, whatever the machine allows.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
