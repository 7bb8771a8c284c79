"""Make two hosts on this machine: network namespaces joined by a virtual cable, each with its own addresses."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

# The addresses of the cable's ends.
CABLE = "eth0"
ADDRESSES = ("10.77.0.1", "10.77.0.2")


@dataclass(frozen=True)
class Host:
    """One of the two hosts.

    Attributes:
        name: host name, and name of the network namespace.
        address: IP address on the cable.
    """

    name: str
    address: str

    def command(self, *command: str) -> list[str]:
        """Return the command that runs on this host; it replaces its starter, so that a signal reaches it."""
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.name]
        return ["ip", "netns", "exec", self.name, *named, *command]

    def start(self, *command: str, **options) -> subprocess.Popen:
        return subprocess.Popen(self.command(*command), **options)

    def sent_bytes(self) -> int:
        """Return the bytes that this host has sent over the cable so far."""
        counter = f"/sys/class/net/{CABLE}/statistics/tx_bytes"
        return int(_ip("netns", "exec", self.name, "cat", counter).stdout)

    def processes(self) -> list[int]:
        return [int(line) for line in _ip("netns", "pids", self.name).stdout.split()]

    def kill(self) -> None:
        """Kill every process of the host, as a power cut would; but the other host's kernel notices closed sockets."""
        for process in self.processes():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def pull_cable(self) -> None:
        """Cut the cable: nothing arrives any more, and no host is notified."""
        _ip("-n", self.name, "link", "set", CABLE, "down")


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Yield two hosts and remove them at the end; skip the test where namespaces are not allowed."""
    # The names contain this process's id: another process may have its own two hosts.
    names = [f"megavit-{os.getpid()}-{letter}" for letter in "ab"]
    hosts = tuple(Host(name, address) for name, address in zip(names, ADDRESSES, strict=True))
    try:
        _join(hosts)
        yield hosts  # type: ignore[misc]
    finally:
        for host in hosts:
            _remove(host)


def _join(hosts: tuple[Host, ...]) -> None:
    known = "127.0.0.1 localhost\n" + "".join(f"{host.address} {host.name}\n" for host in hosts)
    try:
        for host in hosts:
            _ip("netns", "add", host.name)
            # `ip netns exec` shows this file in place of /etc/hosts.
            _own_files(host).mkdir(parents=True)
            (_own_files(host) / "hosts").write_text(known)
        first, second = (host.name for host in hosts)
        _ip("link", "add", CABLE, "netns", first, "type", "veth", "peer", "name", CABLE, "netns", second)
        subprocess.run(hosts[0].command("true"), check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no two hosts here: {getattr(error, 'stderr', None) or error}".strip())
    for host in hosts:
        _ip("-n", host.name, "link", "set", "lo", "up")
        _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", CABLE)
        _ip("-n", host.name, "link", "set", CABLE, "up")


def _remove(host: Host) -> None:
    with suppress(OSError, subprocess.CalledProcessError):
        deadline = time.monotonic() + 10
        while host.processes() and time.monotonic() < deadline:
            host.kill()
            time.sleep(0.05)
        _ip("netns", "delete", host.name)
    with suppress(FileNotFoundError):
        (_own_files(host) / "hosts").unlink()
        _own_files(host).rmdir()


def _own_files(host: Host) -> Path:
    return Path("/etc/netns") / host.name


def _ip(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
