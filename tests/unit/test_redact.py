"""Secrets in what libraries print: in pieces of any size, and fast enough for floods."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.dispatch.watch import LogRelay
from launcher.redact import StreamRedactor

ENVIRON = {"HF_TOKEN": "hf_abcabcabd", "WANDB_API_KEY": "abcabcab", "HOME": "/home/someone"}


@given(
    st.lists(st.sampled_from(["hf_", "abc", "abcabcab", "hf_abcabcabd", "d", "\n", "x"])), st.data()
)
def test_no_cut_between_pieces_lets_a_secret_through(words: list[str], data: st.DataObject) -> None:
    text = "".join(words).encode()
    redactor, shown, at = StreamRedactor(ENVIRON), b"", 0
    while at < len(text):
        size = data.draw(st.integers(1, 9))
        shown += redactor.feed(text[at : at + size])
        at += size
    shown += redactor.rest()
    assert b"hf_abcabcabd" not in shown
    assert b"abcabcab" not in shown
    if b"abcabcab" not in text:
        assert shown == text


def test_what_can_be_no_secret_is_shown_at_once() -> None:
    redactor = StreamRedactor(ENVIRON)
    assert (
        redactor.feed(b"50%|#####     | 5/10 [00:01<00:01]\r")
        == b"50%|#####     | 5/10 [00:01<00:01]\r"
    )
    assert redactor.feed(b"key: hf_abc") == b"key: "
    assert redactor.feed(b"abcabd!") == b"***!"


def test_the_terminal_shows_no_secret_and_all_else_to_the_last_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    log, console = tmp_path / "log", io.BytesIO()
    # Across the pieces in which the file is read, and at its end.
    log.write_bytes(b"x" * (2**16 - 5) + b"hf_0123456789" + b"y\nhf_0")
    relay = LogRelay(path=log, console=console)
    relay.copy_new()
    with log.open("ab") as stream:
        stream.write(b"123456789 hf")
    relay.finish()
    assert console.getvalue() == b"x" * (2**16 - 5) + b"***y\n*** hf"


def test_what_a_library_prints_in_a_program_has_no_secret() -> None:
    program = (
        "import sys\n"
        "from launcher.worker.program import hide_secrets\n"
        "hide_secrets()\n"
        "print('logging in with', 'hf_0123456789')\n"
        "sys.stderr.write('401 for hf_01234'); sys.stderr.write('56789\\n')\n"
        "sys.stdout.buffer.write(b'raw hf_0123456789')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "HF_TOKEN": "hf_0123456789"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "logging in with ***\nraw ***"
    assert done.stderr == "401 for ***\n"
