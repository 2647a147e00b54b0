"""This node among the nodes of a run: where the ranks meet, and by which of its addresses others reach this one."""

from __future__ import annotations

import dataclasses
import fcntl
import ipaddress
import socket
import struct
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from moedist.config import ConfigError, require
from moedist.config.exit_codes import ExitCode
from moedist.doctor.machine import is_public

if TYPE_CHECKING:
    from moedist.train.config import LaunchConfig

RETRY_S = 1.0
"""Seconds between two tries to reach the rendezvous."""
TELL_AFTER_S = 10.0
"""Seconds of waiting for the rendezvous that need no word: nodes never start at one moment."""
_SIOCGIFADDR = 0x8915
"""Linux's ioctl for the IPv4 address of an interface."""


class RendezvousError(ConfigError):
    """A meeting point that this node cannot find: a name that does not resolve, no way there."""

    exit_code = ExitCode.ENVIRONMENT


@dataclasses.dataclass(frozen=True)
class Node:
    """This machine, as the others see it.

    Attributes:
        address: by which they reach it.
        interface: of this machine that has the address; None where none is found.
        holds_rendezvous: whether the ranks meet here.
    """

    address: str
    interface: str | None
    holds_rendezvous: bool


def join_nodes(launch: LaunchConfig) -> Node:
    """This node, once the rendezvous is known here and open. A name may come up with its machine, and torch alone waits
    for an address and for a minute only.

    Raises:
        ConfigError: ``launch.local_addr`` is no address of this machine.
        RendezvousError: why the ranks cannot meet after ``launch.meet_within_s``.
    """
    began, told = time.monotonic(), False
    while True:
        try:
            node = find_node(launch)
            _check_open(launch, node)
            return node
        except RendezvousError as error:
            waited_s = time.monotonic() - began
            if waited_s > launch.meet_within_s:
                raise
            if waited_s > TELL_AFTER_S and not told:
                print(f"moedist: waiting up to {launch.meet_within_s:g} s: {error}", file=sys.stderr)
                told = True
            time.sleep(RETRY_S)


def find_node(launch: LaunchConfig) -> Node:
    """This node: what ``launch`` says of it, and for the rest what the way to the rendezvous tells.

    Nothing is guessed from the host's name, which on many machines resolves to the loopback address.

    Raises:
        ConfigError: ``launch.local_addr`` is no address of this machine.
        RendezvousError: ``launch.rendezvous`` does not resolve, or no way leads there.
    """
    assert launch.rendezvous is not None
    host, port = split_endpoint(launch.rendezvous)
    meeting = _resolve(launch.rendezvous, host, port)
    warn_of_exposure(launch.rendezvous, meeting)
    address = launch.local_addr or _way_to(launch.rendezvous, meeting, port)
    require(
        _is_own(address),
        "launch.local_addr",
        address,
        "is no address of this machine",
        "Set it to one that `ip addr` shows and the other nodes reach, or leave it out.",
    )
    holds = _is_own(meeting) if launch.holds_rendezvous is None else launch.holds_rendezvous
    return Node(address, interface_of(address), holds)


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """Host and port of ``host:port``; an IPv6 address stands in brackets.

    Raises:
        ConfigError: it is none.
    """
    host, _, port = endpoint.rpartition(":")
    require(
        bool(host) and port.isdigit() and 0 < int(port) < 65536,
        "launch.rendezvous",
        endpoint,
        "is no host:port",
        "Write it like node0:29400.",
    )
    return host.strip("[]"), int(port)


def warn_of_exposure(endpoint: str, meeting: str) -> None:
    """Says where torch's stores, which ask nobody for a password, would listen to the world, or to nobody."""
    if is_public(meeting):
        warnings.warn(
            f"launch.rendezvous = {endpoint!r} is the public address {meeting}. The ranks' ports ask for no password, "
            "and whoever reaches them can most likely run code: name an address of a private network, or see that a "
            "firewall lets the nodes alone in.",
            stacklevel=2,
        )
    elif ipaddress.ip_address(meeting).is_loopback:
        warnings.warn(
            f"launch.rendezvous = {endpoint!r} is this machine's own {meeting}, which no other machine reaches.",
            stacklevel=2,
        )


def interface_of(address: str) -> str | None:
    """The network interface that has ``address``; None where none is found."""
    wanted = ipaddress.ip_address(address)
    if wanted.version == 6:
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            digits, *_, name = line.split()
            if int(digits, 16) == int(wanted):
                return name
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(asking, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has no IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def is_open(launch: LaunchConfig, node: Node) -> bool:
    """Whether the rendezvous answers; the node that holds it need not ask."""
    try:
        _check_open(launch, node)
    except RendezvousError:
        return False
    return True


def _check_open(launch: LaunchConfig, node: Node) -> None:
    if node.holds_rendezvous:
        return
    assert launch.rendezvous is not None
    try:
        socket.create_connection(split_endpoint(launch.rendezvous), RETRY_S).close()
    except OSError as error:
        raise RendezvousError(
            "launch.rendezvous",
            launch.rendezvous,
            f"is not open ({error.strerror or error})",
            "Start the node that has this address with the same line, and see that no firewall shuts its port.",
        ) from error


def _resolve(endpoint: str, host: str, port: int) -> str:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise RendezvousError(
            "launch.rendezvous",
            endpoint,
            f"names a host that this machine does not know ({error.strerror})",
            "Name the first node by an address or a name that every node resolves.",
        ) from error
    return str(found[0][4][0])


def _way_to(endpoint: str, meeting: str, port: int) -> str:
    """The address of this machine from which packets to ``meeting`` leave; none is sent."""
    family = socket.AF_INET6 if ":" in meeting else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as way:
        try:
            way.connect((meeting, port))
        except OSError as error:
            raise RendezvousError(
                "launch.rendezvous",
                endpoint,
                f"cannot be reached from this machine ({error.strerror})",
                "Name the first node by an address of the network that the nodes share.",
            ) from error
        return str(way.getsockname()[0])


def _is_own(address: str) -> bool:
    """Whether this machine has the address: only then can a socket be bound to it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as trial:
        try:
            trial.bind((address, 0))
        except OSError:
            return False
    return True
