"""Two hosts on one machine: network namespaces with names of their own, joined by a virtual cable."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

ADDRESSES = ("10.213.71.1", "10.213.71.2")
"""Of the hosts; the net exists between the two namespaces only."""

CABLE = "eth0"


class Host(NamedTuple):
    """One of the two: its namespace, and the name by which the other knows it."""

    namespace: str
    name: str

    def command(self, *words: str) -> list[str]:
        """Return a command line that runs another one on this host."""
        named = f'hostname {self.name} && exec "$@"'
        return ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", named, "sh", *words]

    def unplug(self) -> None:
        """Take the host off the net, without a word to whoever is connected to it."""
        _ip("-n", self.namespace, "link", "set", CABLE, "down")


def why_not() -> str | None:
    """Say why this machine cannot have two hosts; None where it can."""
    if os.geteuid() != 0:
        return "two hosts are network namespaces, which need root"
    if not all(map(shutil.which, ("ip", "unshare"))):
        return "two hosts need the commands ip (of iproute2) and unshare"
    trial = f"goat-{os.getpid()}-trial"
    done = subprocess.run(["ip", "netns", "add", trial], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"two hosts are network namespaces, which are not allowed here: {done.stderr.strip()}"
    _ip("netns", "delete", trial)
    return None


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Have two hosts for a while; whatever runs on them is ended with them."""
    first, second = (Host(f"goat-{os.getpid()}-{n}", f"node-{n}") for n in (1, 2))
    try:
        for host in (first, second):
            _ip("netns", "add", host.namespace)
            # "ip netns exec" puts these files over those of /etc.
            etc = Path("/etc/netns") / host.namespace
            etc.mkdir(parents=True)
            lines = [f"{address} node-{n}" for n, address in enumerate(ADDRESSES, start=1)]
            (etc / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        _ip("-n", first.namespace, "link", "add", CABLE, "type", "veth", "peer", CABLE, "netns", second.namespace)
        for host, address in zip((first, second), ADDRESSES, strict=True):
            _ip("-n", host.namespace, "address", "add", f"{address}/30", "dev", CABLE)
            for link in ("lo", CABLE):
                _ip("-n", host.namespace, "link", "set", link, "up")
        yield first, second
    finally:
        for host in (first, second):
            _remove(host)


def _remove(host: Host) -> None:
    """Take away what there is of a host; its cable goes with it."""
    if not Path("/run/netns", host.namespace).exists():
        return
    listed = subprocess.run(["ip", "netns", "pids", host.namespace], capture_output=True, text=True, check=True)
    for process in map(int, listed.stdout.split()):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    _ip("netns", "delete", host.namespace)
    shutil.rmtree(Path("/etc/netns") / host.namespace, ignore_errors=True)
    with suppress(OSError):
        # Only where nobody else has anything in it.
        Path("/etc/netns").rmdir()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
