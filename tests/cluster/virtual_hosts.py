"""Virtual hosts on one machine: each a set of namespaces with its own address, sshd and /tmp.

A host has its own network, processes, host name, /tmp, /run and /dev/shm; all else is shared as
on a network file system. Nothing is added to the machine itself: no interface, route, name or
key. Killing a host's process 1 ends every process of the host, and the kernel kills process 1
when the test process dies, so nothing outlives the tests.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import psutil
from host_files import write_configuration
from host_processes import (
    WAIT_SECONDS,
    HostProcess,
    has_become_another,
    identity,
    is_stopped,
    namespace,
    wait_until,
)

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NETWORK = "10.77.0"
NETWORK_V6 = "fd77:"
PROGRAMS = ("ip", "nsenter", "pdsh", "setpriv", "ssh", "ssh-keygen", "sshd", "unshare")


def missing_requirement(programs: Sequence[str] = PROGRAMS) -> str | None:
    """Return why virtual hosts cannot run here, or None."""
    if os.geteuid() != 0:
        return "virtual hosts need root"
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    missing = [name for name in programs if shutil.which(name, path=path) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (run tests/cluster/install.sh)"
    probe = subprocess.run(
        ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "true"],
        capture_output=True,
        text=True,
        check=False,
    )
    return f"no namespaces here: {probe.stderr.strip()}" if probe.returncode else None


@dataclass(kw_only=True)
class _Host:
    parent: subprocess.Popen[bytes]
    init: psutil.Process
    daemons: frozenset[tuple[int, float]] = frozenset()
    """Process id and start time of what runs on an idle host."""


@dataclass(kw_only=True)
class VirtualCluster:
    """Hosts ``head`` and ``node1`` to ``nodeN`` on one switch; made by the fixture ``cluster``."""

    folder: Path
    """Empty; all hosts see it. Holds logs, keys and configuration."""
    num_nodes: int = 4
    shared: tuple[Path, ...] = ()
    """Folders below /tmp that all hosts see, beside the repository and the Python environment."""
    _hosts: dict[str, _Host] = field(default_factory=dict)
    _switch: subprocess.Popen[bytes] | None = None
    _is_hurt: set[str] = field(default_factory=set)
    _started: list[HostProcess] = field(default_factory=list)

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of all hosts but the head."""
        return tuple(f"node{number}" for number in range(1, self.num_nodes + 1))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all hosts."""
        return ("head", *self.nodes)

    def address(self, name: str) -> str:
        """Return a host's IPv4 address."""
        return f"{NETWORK}.{self._number(name)}"

    def up(self) -> None:
        """Start all hosts; takes about half a second."""
        addresses = {
            name: (self.address(name), f"{NETWORK_V6}:{self._number(name)}") for name in self.names
        }
        write_configuration(self.folder / "etc", addresses)
        self._switch = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "sleep", "infinity"],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        switch = self._switch.pid
        wait_until(lambda: namespace(switch, "net") != namespace(os.getpid(), "net"), "switch")
        self._on_switch("link", "add", "br0", "type", "bridge")
        self._on_switch("link", "set", "br0", "up")
        for name in self.names:
            self._power_on(name)
        for name in self.names:
            self._wait_ready(name)

    def down(self) -> None:
        """End everything; nothing is left."""
        for name in list(self._hosts):
            self._power_off(name)
        if self._switch is not None:
            self._switch.kill()
            self._switch.wait()
            self._switch = None

    def run(
        self,
        host: str,
        argv: Sequence[str | Path],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = WAIT_SECONDS,
        check: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program on a host to its end; ``env`` is added to :meth:`environment`."""
        return subprocess.run(
            self._command(host, argv, cwd),
            env={**self.environment(), **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=check,
        )

    def start(
        self,
        host: str,
        argv: Sequence[str | Path],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> HostProcess:
        """Start a program on a host, as if at a terminal, and return when it is that program."""
        log = self.folder / f"start-{time.monotonic_ns()}.log"
        with log.open("wb") as stream:
            entering = subprocess.Popen(
                self._command(host, argv, cwd),
                env={**self.environment(), **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        wait_until(
            lambda: entering.poll() is not None or has_become_another(entering),
            f"{argv[0]} on {host}",
        )
        self._started.append(HostProcess(entering=entering, log=log))
        return self._started[-1]

    @staticmethod
    def environment() -> dict[str, str]:
        """Return what a user has after logging in, with this Python's programs on PATH."""
        return {
            "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": os.environ.get("HOME", "/root"),
            "USER": "root",
            "LANG": "C.UTF-8",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }

    def crash(self, host: str) -> None:
        """End every process of a host at once; its peers see connections break."""
        self._is_hurt.add(host)
        self._power_off(host)

    def boot(self, host: str) -> None:
        """Start a host that is down."""
        self._power_on(host)
        self._wait_ready(host)

    def cut(self, host: str) -> None:
        """Pull a host's cable: silence, as after a loss of power."""
        self._is_hurt.add(host)
        self._on_switch("link", "set", _port(host), "down")

    def mend(self, host: str) -> None:
        """Plug the cable in again."""
        self._on_switch("link", "set", _port(host), "up")

    def freeze(self, host: str) -> None:
        """Stop every process of a host without ending it; the network still answers."""
        self._is_hurt.add(host)
        # Again for what others have started while they were not stopped yet.
        while running := [item for item in self._processes(host) if not is_stopped(item)]:
            for process in running:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.suspend()
            time.sleep(0.01)

    def thaw(self, host: str) -> None:
        """Let the processes of a host that was frozen go on."""
        for process in self._processes(host):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()

    def stop_sshd(self, host: str) -> None:
        """End a host's sshd, so that connections are refused."""
        self._is_hurt.add(host)
        self.run(host, ["sh", "-c", 'kill "$(cat /run/sshd.pid)"'], check=True)

    def will_need_reboot(self, host: str) -> None:
        """Say that a test leaves something behind on a host, which a reboot takes away."""
        self._is_hurt.add(host)

    def heal(self) -> None:
        """Boot hosts that a test has hurt anew, and end what it started and left running."""
        for process in self._started:
            process.kill()
        for host in sorted(self._is_hurt):
            self._power_off(host)
            self.boot(host)
        self._is_hurt.clear()
        while self._started:
            self._started.pop().wait()

    def leftovers(
        self, *, but: Mapping[str, list[str]] = MappingProxyType({}), within: float = WAIT_SECONDS
    ) -> dict[str, list[str]]:
        """Wait until all has ended that an idle host does not have; return what has not, by host.

        Args:
            but: command lines that stay.
            within: seconds in which the others may still end; 0 for a look at what runs now.
        """
        deadline = time.monotonic() + within
        while (found := self._leftovers()) != but and time.monotonic() < deadline:
            time.sleep(0.1)
        return found

    def note_daemons(self) -> None:
        """Take what runs on the hosts now for what runs on an idle host."""
        for name in self._hosts:
            self._hosts[name].daemons = self._identities(name)

    def _leftovers(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name, host in self._hosts.items():
            for process in self._processes(name):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if identity(process) in host.daemons:
                        continue
                    if process.status() != psutil.STATUS_ZOMBIE:
                        found.setdefault(name, []).append(" ".join(process.cmdline()))
        return found

    def _processes(self, host: str) -> Iterator[psutil.Process]:
        """Yield the processes of a host, process 1 left out."""
        init = self._hosts[host].init
        own = namespace(init.pid, "pid")
        assert own
        # Not psutil.process_iter, which keeps what it knows of a pid that another process has now.
        for pid in psutil.pids():
            if pid != init.pid and namespace(pid, "pid") == own:
                with contextlib.suppress(psutil.NoSuchProcess):
                    yield psutil.Process(pid)

    def _identities(self, host: str) -> frozenset[tuple[int, float]]:
        found = set()
        for process in self._processes(host):
            with contextlib.suppress(psutil.NoSuchProcess):
                found.add(identity(process))
        return frozenset(found)

    def _command(self, host: str, argv: Sequence[str | Path], cwd: Path | None) -> list[str]:
        where = ["-t", str(self._hosts[host].init.pid), "-n", "-u", "-i", "-m", "-p"]
        return ["nsenter", *where, f"--wdns={cwd or '/'}", "--", *map(str, argv)]

    def _on_switch(self, *arguments: str) -> None:
        assert self._switch is not None
        enter = ["nsenter", "-t", str(self._switch.pid), "-n", "ip"]
        subprocess.run([*enter, *arguments], check=True, capture_output=True)

    def _number(self, name: str) -> int:
        return 254 if name == "head" else int(name.removeprefix("node"))

    def _power_on(self, name: str) -> None:
        assert self._switch is not None
        folder = self.folder / "hosts" / name
        folder.mkdir(parents=True, exist_ok=True)
        for stale in ("ready", "sshd.log"):
            (folder / stale).unlink(missing_ok=True)
        namespaces = ["--net", "--uts", "--ipc", "--mount", "--pid", "--fork"]
        with (folder / "console.log").open("ab") as console:
            parent = subprocess.Popen(
                [
                    *("setpriv", "--pdeathsig", "KILL"),
                    *("unshare", *namespaces, "--kill-child", "--mount-proc"),
                    *("bash", HERE / "host_init.sh", name, self.folder, *self._shared_folders()),
                ],
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
            )
        wait_until(lambda: parent.poll() is not None or psutil.Process(parent.pid).children(), name)
        (init,) = psutil.Process(parent.pid).children()
        self._hosts[name] = _Host(parent=parent, init=init)
        port = ["link", "add", _port(name), "netns", str(self._switch.pid), "type", "veth"]
        # The same hardware address after each boot: peers remember it for minutes.
        hardware = f"02:00:00:00:00:{self._number(name):02x}"
        peer = ["peer", "name", "eth0", "address", hardware, "netns", str(init.pid)]
        subprocess.run(
            ["ip", *port, *peer],
            check=True,
            capture_output=True,
        )
        self._on_switch("link", "set", _port(name), "master", "br0", "up")
        enter = ["nsenter", "-t", str(init.pid), "-n", "ip"]
        v6 = f"{NETWORK_V6}:{self._number(name)}/64"
        for arguments in (
            ["-6", "addr", "add", v6, "dev", "eth0", "nodad"],
            ["link", "set", "eth0", "up"],
            ["addr", "add", f"{self.address(name)}/24", "dev", "eth0"],
        ):
            subprocess.run([*enter, *arguments], check=True, capture_output=True)

    def _shared_folders(self) -> list[str]:
        """Return the folders to share, those within others left out."""
        wanted = {self.folder, ROOT, Path(sys.prefix), *self.shared}
        below_tmp = sorted(path for path in wanted if path.is_relative_to("/tmp"))
        kept: list[Path] = []
        for path in below_tmp:
            if not any(path.is_relative_to(other) for other in kept):
                kept.append(path)
        return [str(path) for path in kept]

    def _wait_ready(self, name: str) -> None:
        folder = self.folder / "hosts" / name
        host = self._hosts[name]
        wait_until(
            lambda: (folder / "ready").exists() or host.parent.poll() is not None,
            f"{name}, see {folder}",
        )
        assert host.parent.poll() is None, (folder / "console.log").read_text()
        host.daemons = self._identities(name)

    def _power_off(self, name: str) -> None:
        host = self._hosts.pop(name, None)
        if host is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                host.init.kill()
            host.parent.wait(timeout=WAIT_SECONDS)
            # Else it goes with the last connection, which waits for an answer for minutes when
            # the cable is cut.
            with contextlib.suppress(subprocess.CalledProcessError):
                self._on_switch("link", "del", _port(name))


def _port(host: str) -> str:
    """Return the name of a host's port on the switch."""
    return f"p-{host}"
