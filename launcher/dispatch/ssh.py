"""Programs on other hosts through ssh: how they are called, and what ssh's errors mean."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence

# With it a host that accepts connections and then says nothing is given up, too.
CONNECT_SECONDS = 8
_OPTIONS = (
    "-T",
    "-oBatchMode=yes",
    f"-oConnectTimeout={CONNECT_SECONDS}",
    "-oServerAliveInterval=5",
    "-oServerAliveCountMax=2",
)


def ssh_argv(host: str, argv: Sequence[str]) -> list[str]:
    """Return the command that runs ``argv`` on a host; ssh hands it to a shell, so it is quoted."""
    return ["ssh", *_OPTIONS, host, shlex.join(argv)]


def python_argv(module: str, args: Sequence[str]) -> list[str]:
    """Return the command that runs a module of zerofit with the same Python on another host."""
    # Where our code is, and what steers NCCL and gloo; nothing here is secret.
    passed = ("PYTHONPATH", "NCCL_", "GLOO_")
    env = ["PYTHONSAFEPATH=1", "OMP_NUM_THREADS=1"]
    env += [f"{name}={value}" for name, value in os.environ.items() if name.startswith(passed)]
    return ["env", *env, sys.executable, "-m", module, *args]


# What OpenSSH and the remote shell print, and what it means for the user.
_MEANINGS = (
    (
        r"Host key verification failed",
        "its host key is unknown, or not the one that it had before",
        "`ssh {host}` by hand shows which; accept the key, or `ssh-keygen -R {host}` first",
    ),
    (
        r"during banner exchange|kex_exchange_identification",
        "it accepts connections and then says nothing, or hangs up",
        "log in on its console: it may be out of memory or processes, or hang",
    ),
    (r"Connection refused", "it refuses ssh connections", "start sshd on {host}"),
    (
        r"Connection timed out|No route to host|Network is unreachable|Operation timed out",
        "it cannot be reached",
        "check that it is up and on the network: `ping {host}`",
    ),
    (
        r"Could not resolve hostname",
        "its name is not known here",
        "correct the name, or add it to /etc/hosts or ~/.ssh/config",
    ),
    (
        r"Permission denied",
        "it does not let you in without a password",
        "copy your key: `ssh-copy-id {host}`",
    ),
    (
        r"No module named '?(launcher|psutil)",
        "zerofit is not installed there for the same Python",
        "install it in the same folder on all hosts, or in one that they share",
    ),
    (
        r"No such file or directory",
        f"it has no {sys.executable}",
        "install zerofit in the same folder on all hosts, or in one that they share",
    ),
    (
        r"closed by (remote host|.* port \d+)|Connection reset|Broken pipe|not responding",
        "the connection broke",
        "check whether it crashed or was switched off",
    ),
)


def explain(said: Sequence[str], *, host: str) -> tuple[str, str]:
    """Return what was wrong and what to do about it, from what ssh and the host printed."""
    text = "\n".join(said)
    for pattern, problem, fix in _MEANINGS:
        match = re.search(pattern, text)
        if match is not None:
            line = next(line for line in said if match.group(0) in line)
            return f"{problem} ({line.strip()})", fix.format(host=host)
    last = next((line.strip() for line in reversed(said) if line.strip()), "it said nothing")
    return f"ssh ended: {last}", f"try `ssh {host} true`"
