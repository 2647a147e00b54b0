"""Nodes that are network namespaces of this machine: own addresses, own host names, one disk."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]


def why_not() -> str | None:
    """Why there can be none here."""
    if shutil.which("ip") is None:
        return "needs ip (apt-get install iproute2)"
    name = f"moedist-{uuid.uuid4().hex[:6]}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode != 0:
        return "needs the right to make network namespaces"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return None


class Nodes:
    """``count`` nodes on one bridge; node ``i`` has the address 10.77.0.(10 + i) and the host name n<i>."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._tag = uuid.uuid4().hex[:6]
        self._processes: list[subprocess.Popen[str]] = []

    @staticmethod
    def address(index: int) -> str:
        return f"10.77.0.{10 + index}"

    def make(self) -> None:
        bridge = self._name("br")
        _ip("netns", "add", bridge)
        _ip("-n", bridge, "link", "add", "br0", "type", "bridge")
        _ip("-n", bridge, "link", "set", "br0", "up")
        for index in range(self.count):
            node, port = self._name(f"n{index}"), f"p{index}"
            _ip("netns", "add", node)
            _ip("link", "add", "veth0", "netns", node, "type", "veth", "peer", "name", port, "netns", bridge)
            _ip("-n", bridge, "link", "set", port, "master", "br0", "up")
            _ip("-n", node, "addr", "add", f"{self.address(index)}/24", "dev", "veth0")
            _ip("-n", node, "link", "set", "veth0", "up")
            _ip("-n", node, "link", "set", "lo", "up")

    def start(self, index: int, command: list[str], environment: dict[str, str], folder: Path) -> subprocess.Popen[str]:
        """Starts a command on a node, in a process group of its own."""
        inside = ["ip", "netns", "exec", self._name(f"n{index}"), "unshare", "--uts", "sh", "-c"]
        inside += [f'hostname n{index}; exec "$@"', "sh", *command]
        process = subprocess.Popen(
            inside,
            cwd=folder,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._processes.append(process)
        return process

    def cut(self, index: int) -> None:
        """Takes a node's link down, as if its cable were pulled."""
        _ip("-n", self._name("br"), "link", "set", f"p{index}", "down")

    def slow_down(self, rate: str, only: int | None = None) -> None:
        """Lets each node, or one, send no faster than ``rate`` (``200mbit``) to others; inside a node nothing
        changes."""
        for index in range(self.count) if only is None else [only]:
            shape = ["root", "tbf", "rate", rate, "burst", "64kb", "latency", "400ms"]
            tc = ["tc", "-n", self._name(f"n{index}"), "qdisc", "add", "dev", "veth0", *shape]
            subprocess.run(tc, check=True, capture_output=True)

    def kill(self, index: int) -> None:
        """Kills everything that runs on a node, at once; its connections fall silent, as of a machine without power."""
        self.cut(index)
        found = subprocess.run(["ip", "netns", "pids", self._name(f"n{index}")], capture_output=True, text=True)
        for pid in found.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def processes(self) -> list[int]:
        """What still runs on any node."""
        names = [self._name(f"n{index}") for index in range(self.count)]
        said = [subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout for name in names]
        return [int(pid) for pids in said for pid in pids.split()]

    def remove(self) -> None:
        for index in range(self.count):
            self.kill(index)
        for process in self._processes:
            process.kill()
            process.communicate()
        for name in ["br", *(f"n{index}" for index in range(self.count))]:
            subprocess.run(["ip", "netns", "delete", self._name(name)], capture_output=True)

    def _name(self, node: str) -> str:
        return f"moedist-{self._tag}-{node}"


@contextlib.contextmanager
def nodes(count: int) -> Iterator[Nodes]:
    """Nodes that are gone afterwards, whatever happened."""
    made = Nodes(count)
    try:
        made.make()
        yield made
    finally:
        made.remove()


def environment(home: Path, root: Path = ROOT) -> dict[str, str]:
    """Of a user without a W&B key, who has activated an environment with moedist on its PATH."""
    programs = home / "bin"
    programs.mkdir(parents=True, exist_ok=True)
    program = programs / "moedist"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m moedist "$@"\n')
    program.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "OUTSIDE_", "SLURM_"))}
    plugins = root / "tests" / "plugin" / "src"
    return kept | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": f"{root}:{plugins}",
        "HOME": str(home),
        "WANDB_MODE": "offline",
    }


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
