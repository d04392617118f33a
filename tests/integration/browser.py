"""A headless Chromium, driven through its own debugging pipe: no driver program, no network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_REPLY_SECONDS = 300.0


def find_browser() -> str | None:
    """Return a Chromium of this machine, ``None`` without one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def _is_load(event: Mapping[str, Any], loader: str) -> bool:
    """Return whether an event says that this page, and not the one before, is loaded."""
    if event["method"] != "Page.lifecycleEvent":
        return False
    return event["params"]["loaderId"] == loader and event["params"]["name"] == "load"


class Browser:
    """One page; :attr:`troubles` are the console's errors and what it asked the network for."""

    def __init__(self, program: str, profile: Path) -> None:
        to_read, self._write_end = os.pipe()
        self._read_end, to_write = os.pipe()
        # Chromium reads commands from descriptor 3 and answers on 4.
        shell = f'exec "$0" "$@" 3<&{to_read} 4>&{to_write}'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, program, "--headless", "--no-sandbox", "--disable-gpu",
             "--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-pipe",
             f"--user-data-dir={profile}", "--no-first-run", "about:blank"],
            pass_fds=(to_read, to_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_read)
        os.close(to_write)
        self._buffer = b""
        self._last_id = 0
        self._events: list[Mapping[str, Any]] = []
        self.troubles: list[str] = []
        deadline = time.monotonic() + _REPLY_SECONDS
        while (page := self._first_page()) is None:  # it is still starting
            assert time.monotonic() < deadline, "the browser opens no page"
            time.sleep(0.05)
        attached = self._call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session: str | None = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        self._call("Page.setLifecycleEventsEnabled", enabled=True)

    def _first_page(self) -> Mapping[str, Any] | None:
        targets = self._call("Target.getTargets")["targetInfos"]
        return next((target for target in targets if target["type"] == "page"), None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(timeout=_REPLY_SECONDS)
        os.close(self._write_end)
        os.close(self._read_end)

    def open(self, path: Path, *, width: int, height: int, is_phone: bool) -> None:
        """Show a file in a window of CSS pixels, and wait until it is loaded."""
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=is_phone,
        )  # fmt: skip
        self._events.clear()
        url = path.resolve().as_uri()
        loader = self._call("Page.navigate", url=url)["loaderId"]
        while not any(_is_load(event, loader) for event in self._events):
            self._read()
        self.evaluate("document.fonts.ready.then(() => 0)")
        for event in self._events:
            self._note(event, url)

    def _note(self, event: Mapping[str, Any], url: str) -> None:
        what = event["params"]
        if event["method"] == "Network.requestWillBeSent" and what["request"]["url"] != url:
            self.troubles.append(f"asks for {what['request']['url']}")
        elif event["method"] == "Log.entryAdded" and what["entry"]["level"] == "error":
            self.troubles.append(what["entry"]["text"])
        elif event["method"] == "Runtime.exceptionThrown":
            self.troubles.append(str(what["exceptionDetails"]))
        elif event["method"] == "Runtime.consoleAPICalled" and what["type"] == "error":
            self.troubles.append(str(what["args"]))

    def evaluate(self, expression: str) -> Any:
        """Return the value of an expression in the page."""
        reply = self._call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        return reply["result"].get("value")

    def _call(self, method: str, **params: Any) -> Mapping[str, Any]:
        self._last_id += 1
        request: dict[str, Any] = {"id": self._last_id, "method": method, "params": params}
        if getattr(self, "_session", None):
            request["sessionId"] = self._session
        os.write(self._write_end, json.dumps(request).encode() + b"\0")
        while True:
            message = self._read()
            if message.get("id") == self._last_id:
                assert "error" not in message, message
                return dict(message["result"])

    def _read(self) -> Mapping[str, Any]:
        deadline = time.monotonic() + _REPLY_SECONDS
        while b"\0" not in self._buffer:
            piece = os.read(self._read_end, 2**20)
            assert piece, "the browser is gone"
            assert time.monotonic() < deadline, "the browser does not answer"
            self._buffer += piece
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        if "method" in message:
            self._events.append(message)
        return message
