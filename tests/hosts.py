"""Two hosts on one machine: network namespaces, joined by a link that can be cut."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

NEW_NETWORK, NEW_HOST_NAME = 0x40000000, 0x04000000
LINK = "link0"


@dataclass(frozen=True)
class Host:
    """A namespace of its own, and the address of the end of the link in it."""

    namespace: str
    name: str
    address: str

    def enter(self) -> None:
        """Let this process be on the host, with what it starts from now on."""
        libc = ctypes.CDLL(None, use_errno=True)
        handle = os.open(f"/run/netns/{self.namespace}", os.O_RDONLY)
        if libc.setns(handle, NEW_NETWORK) or libc.unshare(NEW_HOST_NAME):
            raise OSError(ctypes.get_errno(), "cannot enter the namespace")
        os.close(handle)
        socket.sethostname(self.name)
        os.environ["GLOO_SOCKET_IFNAME"] = LINK  # the name of the host has no address

    def join(self) -> None:
        """Join the host to the link, also after it was cut."""
        _ip("-n", self.namespace, "link", "set", LINK, "up")


def cut() -> None:
    """Cut the link of the host that this process is on."""
    _ip("link", "set", LINK, "down")


@contextmanager
def two_hosts() -> Iterator[list[Host]]:
    """Yield two hosts with a link between them.

    Raises:
        OSError, subprocess.CalledProcessError: where this user, or this system, cannot make any.
    """
    ends = [
        Host(f"trl-{os.getpid()}-{end}", f"host-{end}", f"10.77.0.{n}")
        for n, end in ((1, "a"), (2, "b"))
    ]
    try:
        for host in ends:
            _ip("netns", "add", host.namespace)
        here, there = (host.namespace for host in ends)
        pair = ("type", "veth", "peer", "name", LINK, "netns", there)
        _ip("-n", here, "link", "add", LINK, *pair)
        for host in ends:
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", LINK)
            _ip("-n", host.namespace, "link", "set", "lo", "up")
            host.join()
        yield ends
    finally:
        for host in ends:
            subprocess.run(["ip", "netns", "del", host.namespace], check=False, capture_output=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
