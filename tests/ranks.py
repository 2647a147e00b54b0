"""Several ranks on one machine, for tests: gloo on the CPU, started once per world size and reused by every test.

Starting a rank costs seconds (it imports torch), a job on a started one a millisecond; so loop the cases inside a job
where they share a layout.

    def sums(here: Here, value: int) -> float:          # at module level; runs on every rank
        mesh = here.mesh_of(ep=2)
        return all_sum(torch.tensor([here.rank + value]), mesh.dp).item()

    def test_sums(ranks):
        assert ranks(4).run(sums, 1) == [10] * 4        # one result per rank
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import faulthandler
import functools
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

LIMIT_S = 60.0
"""Seconds that a job may take before its ranks are killed."""
GRACE_S = 3.0
"""Seconds that the other ranks get to report once one has failed."""
START_S = 180.0
"""Seconds that ranks may take to import torch and to meet; generous for two busy cores."""


class RankError(AssertionError):
    """A rank failed, died or hung; the message holds what each rank said."""


@dataclasses.dataclass
class Here:
    """The rank that a job runs on; its first argument."""

    rank: int
    world: int
    _meshes: dict[tuple[Any, ...], Any] = dataclasses.field(default_factory=dict)

    def mesh_of(self, ep: int, fsdp: int | None = None, ranks_per_node: int | None = None) -> Any:
        """The mesh of these sizes on the CPU. Kept for later jobs: sub-groups cost time. Call it on all ranks alike."""
        import torch

        from moedist.mesh.mesh import grid

        sizes = (ep, fsdp, ranks_per_node)
        if sizes not in self._meshes:
            self._meshes[sizes] = grid(self.world, ep, torch.device("cpu"), fsdp=fsdp, ranks_per_node=ranks_per_node)
        return self._meshes[sizes]


class RankPool:
    """``world`` processes with a default process group, waiting for jobs; started by the first one."""

    def __init__(self, world: int):
        self.world = world
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, function: Callable[..., Any], *args: Any, limit_s: float = LIMIT_S, **kwargs: Any) -> list[Any]:
        """Calls ``function(here, *args, **kwargs)`` on every rank; returns the results in the order of the ranks.

        Args:
            function: at the module level of a file; its file is imported on the ranks by path.
            args, kwargs: anything that can be pickled; the same for all ranks.
            limit_s: seconds until the job counts as hung.

        Raises:
            RankError: with the traceback of each rank that failed or hung. The ranks are then started anew by the next
                job, since a failed one may have left the others in the middle of a collective.
        """
        assert "<" not in function.__qualname__, f"{function.__qualname__} is not at the level of its module"
        source = (inspect.getfile(function), function.__module__, function.__qualname__)
        if not self._processes:
            self._start()
        try:
            for pipe in self._pipes:
                pipe.send_bytes(pickle.dumps((source, limit_s)))
                pipe.send_bytes(pickle.dumps((args, kwargs)))
            return self._collect(function.__qualname__, limit_s)
        except BaseException:
            self.kill()
            raise

    def close(self) -> None:
        """Ends the ranks: politely, then by force."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send_bytes(pickle.dumps(None))
        for process in self._processes:
            process.join(5.0)
        self.kill()

    def kill(self) -> None:
        """Ends the ranks at once."""
        for process in self._processes:
            process.kill()
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.join()
            pipe.close()
        self._processes, self._pipes = [], []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        context = multiprocessing.get_context("spawn")
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.world, self._folder.name, theirs), name=f"rank-{rank}", daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        try:
            self._collect("start", START_S)
        except BaseException:
            self.kill()
            raise

    def _collect(self, job: str, limit_s: float) -> list[Any]:
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + limit_s
        waiting = dict(enumerate(self._pipes))
        while waiting and (left := deadline - time.monotonic()) > 0:
            for pipe in wait(list(waiting.values()), left):
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                del waiting[rank]
                try:
                    good, value = pickle.loads(self._pipes[rank].recv_bytes())
                except (EOFError, OSError):
                    self._processes[rank].join(1.0)
                    good, value = False, f"died, exit code {self._processes[rank].exitcode}"
                (results if good else failures)[rank] = value
                if not good:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        if failures or waiting:
            for rank in waiting:
                failures[rank] = "did not end\n" + self._stack(rank)
            said = "\n".join(f"--- rank {rank} of {self.world}: {text}" for rank, text in sorted(failures.items()))
            raise RankError(f"{job} failed on {len(failures)} of {self.world} ranks\n{said}")
        return [results[rank] for rank in range(self.world)]

    def _stack(self, rank: int) -> str:
        """Where a hung rank sits, if it could still say so."""
        assert self._folder is not None
        path = Path(self._folder.name, f"stack_{rank}")
        return path.read_text() if path.exists() else ""


def _serve(rank: int, world: int, folder: str, pipe: Connection) -> None:
    """The life of a rank: meet the others, then job after job until told to leave or until the test process is gone."""
    os.environ["OMP_NUM_THREADS"] = "1"
    if Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # host names need not resolve on a test machine
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    _share_a_device()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=LIMIT_S),
    )
    here = Here(rank, world)
    pipe.send_bytes(pickle.dumps((True, None)))
    with contextlib.suppress(EOFError), open(Path(folder, f"stack_{rank}"), "w") as stack:
        while (job := pickle.loads(pipe.recv_bytes())) is not None:
            (path, module, name), limit_s = job
            payload = pipe.recv_bytes()
            faulthandler.dump_traceback_later(max(limit_s - 1.0, limit_s / 2), file=stack)
            try:
                function = functools.reduce(getattr, name.split("."), _module(path, module))
                args, kwargs = pickle.loads(payload)
                # by value: torch's own way through a pipe shares memory with a process that may be killed
                answer = pickle.dumps((True, function(here, *args, **kwargs)))
            except BaseException:
                answer = pickle.dumps((False, traceback.format_exc()))
            faulthandler.cancel_dump_traceback_later()
            pipe.send_bytes(answer)
    dist.destroy_process_group()


def _share_a_device() -> None:
    """Lets all process groups of this rank talk through one gloo device.

    Each device has a thread that wakes a hundred times a second, and tests make hundreds of groups: with a device for
    each, which is what torch gives them, idle ranks took both cores from the tests.
    """
    from torch.distributed import ProcessGroupGloo

    device = ProcessGroupGloo.create_default_device()
    first = ProcessGroupGloo.__init__

    def over_the_device(self: Any, store: Any, rank: int, size: int, timeout: datetime.timedelta) -> None:
        options = ProcessGroupGloo._Options()
        options._devices, options._threads, options._timeout = [device], 2, timeout
        first(self, store, rank, size, options)

    ProcessGroupGloo.__init__ = over_the_device


def _module(path: str, name: str) -> Any:
    """The module in a file, under the name it has in the test process, so that what was pickled there is found."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
