"""What stands in /etc of a virtual host: names, keys, and the settings of ssh."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

_SSHD_CONFIG = """\
Port 22
HostKey /etc/ssh/host_key
PidFile none
AuthorizedKeysFile /etc/ssh/authorized_keys
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
UseDNS no
MaxStartups 100:30:200
MaxSessions 100
"""
_SSH_CONFIG = """\
Host *
  IdentityFile /etc/ssh/id_ed25519
  UserKnownHostsFile /etc/ssh/known_hosts
  GlobalKnownHostsFile none
  StrictHostKeyChecking yes
"""


def write_configuration(etc: Path, addresses: Mapping[str, tuple[str, str]]) -> None:
    """Write the files that all hosts share.

    Args:
        etc: folder to make them in.
        addresses: IPv4 and IPv6 address of each host by name; the second also has a name that ends
            with -6.
    """
    for folder in ("ssh", "slurm", "munge"):
        (etc / folder).mkdir(parents=True)
    lines = ["127.0.0.1 localhost", "::1 localhost"]
    for name, (v4, v6) in addresses.items():
        # A host's own name must not mean 127.0.1.1: gloo would connect to itself.
        lines += [f"{v4} {name}", f"{v6} {name}-6"]
    (etc / "hosts").write_text("\n".join(lines) + "\n")
    ssh = etc / "ssh"
    for key in ("id_ed25519", "host_key"):
        keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", key, "-f", ssh / key]
        subprocess.run(keygen, check=True)
    shutil.copy(ssh / "id_ed25519.pub", ssh / "authorized_keys")
    host_key = " ".join((ssh / "host_key.pub").read_text().split()[:2])
    known = (f"{name},{name}-6,{v4},{v6} {host_key}\n" for name, (v4, v6) in addresses.items())
    (ssh / "known_hosts").write_text("".join(known))
    (ssh / "sshd_config").write_text(_SSHD_CONFIG)
    (ssh / "ssh_config").write_text(_SSH_CONFIG)
