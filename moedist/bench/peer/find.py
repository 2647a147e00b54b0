"""Whom to compare with."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence

import moedist.bench.peer
from moedist.bench.ours import fused, twins
from moedist.bench.peer.contract import Peer
from moedist.config import require

NOT_PEERS = {"contract", "find"}


def find_peers() -> list[Peer]:
    """One of each, in the order of their files' names; none of their packages is imported."""
    modules = [m.name for m in pkgutil.iter_modules(moedist.bench.peer.__path__) if m.name not in NOT_PEERS]
    return [peer for name in modules for peer in importlib.import_module(f"moedist.bench.peer.{name}").PEERS]


def choose_peers(names: Sequence[str] | None) -> list[Peer]:
    """Those that a user names, by their own names or their packages'; None: everybody, our twins among them.

    Raises:
        ConfigError: nobody has a name.
    """
    everybody: list[Peer] = [*fused(), *twins(), *find_peers()]
    if names is None:
        return everybody
    known = ", ".join(peer.name for peer in everybody)
    chosen: list[Peer] = []
    for name in names:
        found = [peer for peer in everybody if name in (peer.name, peer.package)]
        require(bool(found), "--peer", name, "is not known", f"Name some of {known}.")
        chosen += found
    return chosen
