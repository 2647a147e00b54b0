"""Starts the ranks of a run with torchrun, watches over them, and says how they ended.

The parent stays: it passes signals on, ends what does not end, and turns what is left behind (`status.json`, the
launcher's own log) into one exit code. torchrun's own exit code is always 1.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, TYPE_CHECKING, Literal

from moedist.launch.environment import rank_environment, without_users
from moedist.launch.nodes import Node, is_open, join_nodes
from moedist.launch.outcome import Stop, conclude, launcher_log, unwritten
from moedist.launch.process import LAUNCH_ID, die_with_parent, kill_launch, launch_processes
from moedist.train.status import Status, read_status

if TYPE_CHECKING:
    from moedist.train.config import LaunchConfig

POLL_S = 0.05
LOOK_S = 1.0
"""Seconds between two looks at what other nodes have written to the shared folder."""
LOST_S = 30.0
"""Seconds that a node without ranks waits for a rendezvous that nobody answers at any more."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@dataclasses.dataclass(frozen=True)
class Ranks:
    """How many ranks run where.

    Attributes:
        nproc: ranks on this node.
        nnodes: nodes.
        threads: OMP threads of each rank.
    """

    nproc: int
    nnodes: int
    threads: int

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.nproc * self.nnodes


def plan_ranks(launch: LaunchConfig, device: Literal["auto", "cpu", "cuda"]) -> Ranks:
    """The ranks of a run: one per GPU, or one per core up to 4 where there is none, unless ``launch.nproc`` says so."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    nproc = launch.nproc
    if nproc is None:
        import torch

        num_gpus = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
        nproc = num_gpus or min(4, cores)
    return Ranks(nproc, launch.nnodes, launch.threads or max(1, cores // nproc))


def torchrun_command(
    ranks: Ranks, launch: LaunchConfig, name: str, target: Sequence[str], node: Node | None = None
) -> list[str]:
    """The command that starts ``python -m <target>`` on every rank.

    The c10d rendezvous, because ranks restarted after a kill find each other with no other; on one node over the
    loopback address and a free port, so that two runs never meet. ``node`` is this one among several,
    which know by ``name`` that they start the same thing.
    """
    command = [sys.executable, "-m", "torch.distributed.run"]
    command += [f"--nnodes={ranks.nnodes}", f"--nproc-per-node={ranks.nproc}", f"--max-restarts={launch.max_restarts}"]
    command += ["--rdzv-backend=c10d"]
    if ranks.nnodes == 1:
        command += ["--rdzv-endpoint=127.0.0.1:0", f"--rdzv-id={uuid.uuid4().hex}", "--local-addr=127.0.0.1"]
    else:
        assert node is not None
        run_id = hashlib.sha256(name.encode()).hexdigest()[:16]
        command += [f"--rdzv-endpoint={launch.rendezvous}", f"--rdzv-id=moedist-{run_id}"]
        command += [f"--local-addr={node.address}"]
        command += [f"--rdzv-conf=is_host={int(node.holds_rendezvous)},join_timeout={math.ceil(launch.meet_within_s)}"]
    return [*command, "-m", *target]


def run_ranks(
    ranks: Ranks,
    launch: LaunchConfig,
    run_dir: Path,
    target: Sequence[str],
    *,
    name: str | None = None,
    lock: int | None = None,
    terminal: IO[str] | None = None,
) -> Status:
    """Starts the ranks, waits for their end and returns how it came; `status.json` says the same.

    SIGTERM, SIGINT and SIGUSR1 to this process ask the ranks to save and leave; ``launch.stop_after_s`` later, or at a
    second SIGINT, they are killed. No process of the launch is alive on return, and none outlives this process.

    Args:
        ranks, launch, run_dir, target, name, lock, terminal: as of `Launch`.

    Raises:
        OSError: the log cannot be written.
        ConfigError: this node does not find its way to the others (`join_nodes`).
    """
    node = join_nodes(launch) if ranks.nnodes > 1 else None
    with (
        StopSignals() as signals,
        Launch(ranks, launch, run_dir, target, node=node, name=name, lock=lock, terminal=terminal) as started,
    ):
        while (status := started.poll()) is None:
            if signals.interrupts >= 2:
                started.kill()
            elif signals.count:
                started.stop()
            time.sleep(POLL_S)
        return status


class Launch:
    """Ranks that have been started. Poll it until it says how they ended; left earlier, it kills them.

    Args:
        ranks: how many.
        launch: of the run.
        run_dir: the run folder; the launcher's own words go to its ``logs/`` (`launcher_log`).
        target: module and arguments of each rank.
        node: this one among several; None for a run on one.
        name: by which nodes know that they start the same thing; None for the run folder, which they share.
        lock: descriptor to hand to the launcher, so that the folder stays locked while ranks live.
        terminal: where rank 0 speaks to people; None for this process's standard output.
        environment: variables beside those of this process.
        cores: that the ranks may use; none for all of this process's.

    Raises:
        OSError: the log cannot be written.
    """

    def __init__(
        self,
        ranks: Ranks,
        launch: LaunchConfig,
        run_dir: Path,
        target: Sequence[str],
        *,
        node: Node | None = None,
        name: str | None = None,
        lock: int | None = None,
        terminal: IO[str] | None = None,
        environment: Mapping[str, str] | None = None,
        cores: Collection[int] = (),
    ) -> None:
        self._launch, self._run_dir, self._id = launch, run_dir, uuid.uuid4().hex
        self._stop: Stop = "none"
        self._deadline: float | None = None
        self._log = launcher_log(run_dir, ranks.nnodes)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._earlier = read_status(run_dir)
        self._node, self._next_look, self._last_met = node, 0.0, time.monotonic()
        users = {**os.environ, **(environment or {})}
        sets, lines = without_users(rank_environment(ranks.threads, run_dir, node), users)
        with open(self._log, "a", encoding="utf-8") as log_of_sets:
            log_of_sets.writelines(f"{line}\n" for line in lines)
        if node is not None:
            print("\n".join(lines), file=sys.stderr)
        self._log_start = self._log.stat().st_size
        parent = os.getpid()

        def become_ours() -> None:
            die_with_parent(parent)
            # SLURM signals every process of a step, and torchrun would die of this one: its parent answers for it.
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
            if cores:
                os.sched_setaffinity(0, cores)

        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                torchrun_command(ranks, launch, name or str(run_dir), target, node),
                stdin=subprocess.DEVNULL,
                stdout=terminal,
                stderr=log,
                env={**users, **sets, LAUNCH_ID: self._id},
                start_new_session=True,  # a terminal's Ctrl-C reaches this process alone
                pass_fds=() if lock is None else (lock,),
                preexec_fn=become_ours,
            )

    def stop(self) -> None:
        """Asks the ranks to save and leave; ``launch.stop_after_s`` later they are killed."""
        if self._stop == "none":
            self._stop = "asked"
            self._start_to_wait()
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Lets the next `poll` end the ranks as they stand."""
        self._stop = "at_once"

    def poll(self) -> Status | None:
        """How it ended; None while the launcher or one of its ranks lives and may."""
        ended = self._process.poll() is not None
        if ended and not launch_processes(self._id):
            return self._end()
        if ended:  # an ended launcher's ranks get the same time to leave
            self._start_to_wait()
        elif self._stop == "none" and self._node is not None and time.monotonic() > self._next_look:
            self._next_look = time.monotonic() + LOOK_S
            self._look_at_others(self._node)
        late = self._deadline is not None and time.monotonic() > self._deadline
        if late and self._stop == "asked":
            self._stop = "late"
        return self._end() if late or self._stop in ("at_once", "lost") else None

    def close(self) -> None:
        """Kills what is left of it; harmless when done twice."""
        kill_launch(self._id)
        self._process.wait()

    def __enter__(self) -> Launch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _look_at_others(self, node: Node) -> None:
        """Follows other nodes where torchrun would wait for them: those that were stopped and have saved, and the one
        that held the rendezvous, whose silence torchrun takes for slowness."""
        status = read_status(self._run_dir)
        if status is not None and status != self._earlier and status.reason == "preempted":
            self.stop()
        has_ranks = len(launch_processes(self._id)) > 1
        if has_ranks or is_open(self._launch, node):
            self._last_met = time.monotonic()
        elif time.monotonic() - self._last_met > LOST_S:
            self._stop = "lost"

    def _start_to_wait(self) -> None:
        if self._deadline is None:
            self._deadline = time.monotonic() + self._launch.stop_after_s

    def _end(self) -> Status:
        """Nothing of the launch lives on; what it left behind, in one status."""
        kill_launch(self._id)
        returncode = self._process.wait()
        with open(self._log, encoding="utf-8", errors="replace") as lines:
            lines.seek(self._log_start)
            said = lines.read()
        status = read_status(self._run_dir)
        if status == self._earlier:  # of an earlier start: this one's ranks have said nothing
            status = None
        try:
            return conclude(self._run_dir, returncode, said, self._stop, self._launch, status)
        except OSError as error:
            return unwritten(self._run_dir, error)


class StopSignals:
    """Counts the signals that ask for a stop, while it is entered. In the main thread only, as Python demands."""

    def __init__(self) -> None:
        self.count = self.interrupts = 0
        self._before: dict[signal.Signals, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        self.interrupts += number == signal.SIGINT
