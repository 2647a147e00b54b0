"""Starts the ranks of a run with torchrun, watches over them, and says how they ended.

The parent stays: it passes signals on, ends what does not end, and turns what is left behind (`status.json`, the
launcher's own log) into one exit code. torchrun's own exit code is always 1.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, TYPE_CHECKING, Literal

from moedist.config.exit_codes import ExitCode
from moedist.launch.environment import rank_environment, without_users
from moedist.launch.nodes import Node, is_open, join_nodes
from moedist.launch.process import LAUNCH_ID, die_with_parent, kill_launch, launch_processes
from moedist.train.status import EXIT_CODES, Reason, Status, read_status, write_status

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


Stop = Literal["none", "asked", "late", "at_once", "lost"]
"""How a launch was stopped from outside: not, politely, or killed: for being late, at a second Ctrl-C, for a
rendezvous that nobody answers at."""


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
            return _unwritten(self._run_dir, error)


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


@dataclasses.dataclass(frozen=True)
class Failure:
    """The first failure that torchrun saw.

    Attributes:
        rank: global rank.
        exit_code: of its process; minus the signal's number where a signal ended it.
    """

    rank: int
    exit_code: int

    @property
    def signal_name(self) -> str | None:
        """The signal that ended it; None for an exit of its own."""
        if self.exit_code >= 0:
            return None
        try:
            return signal.Signals(-self.exit_code).name
        except ValueError:
            return f"signal {-self.exit_code}"


def first_failure(said: str) -> Failure | None:
    """The root cause in torchrun's report; None where it has none."""
    report = said.rpartition("Root Cause (first observed failure)")[2]
    found = re.search(r"rank\s*:\s*(\d+) \(local_rank.*?exitcode\s*:\s*(-?\d+)", report, re.DOTALL)
    return Failure(int(found[1]), int(found[2])) if found else None


def conclude(
    run_dir: Path, returncode: int, said: str, stop: Stop, launch: LaunchConfig, status: Status | None
) -> Status:
    """How the ranks ended, from what they and the launcher left behind; written to `status.json` where it is not there.

    Args:
        run_dir: the run folder.
        returncode: the launcher's.
        said: what the launcher wrote.
        stop: whether this process was asked to stop.
        launch: of the run.
        status: what the ranks wrote; None where they wrote nothing.
    """
    failure = first_failure(said)
    if returncode == 0:
        return status or write_status(run_dir, "done", "All ranks ended well.")
    if stop == "at_once":
        return _stopped(run_dir, status, "The ranks were killed at a second interrupt, before they had saved.")
    if stop == "late":
        given = f"launch.stop_after_s = {launch.stop_after_s:g} s"
        message = f"The ranks were killed {given} after the signal, before they had saved."
        return _stopped(run_dir, status, message)
    by_signal = failure is not None and failure.signal_name is not None
    if status is not None and status.reason != "done" and not (status.reason == "peer_lost" and by_signal):
        return status
    if stop == "asked" and (failure is None or by_signal or failure.exit_code == 75):
        message = "Stopped before the first step: there was nothing to save."
        return write_status(run_dir, "preempted", message, what_to_do=_how_to_go_on(run_dir))
    if failure is None:
        return _launcher_failed(run_dir, said, launch, lost=stop == "lost")
    if status is None and failure.exit_code in (ExitCode.CONFIG, ExitCode.ENVIRONMENT):
        return _refused(failure.exit_code, said)
    checkpoint = last_good_checkpoint(run_dir)
    if by_signal:
        message = f"Rank {failure.rank} was ended by {failure.signal_name}."
        hint = " SIGKILL often is the kernel short of memory: see dmesg." if failure.exit_code == -9 else ""
        step = status.step if status is not None else None
        return write_status(
            run_dir,
            "peer_lost",
            message,
            rank=failure.rank,
            step=step,
            last_good_checkpoint=checkpoint,
            what_to_do=_how_to_go_on(run_dir) + hint,
        )
    when = " after the run was done" if status is not None and status.reason == "done" else ""
    return write_status(
        run_dir,
        "bug",
        f"Rank {failure.rank} failed{when} (exit code {failure.exit_code}): {last_line(run_dir, failure.rank)}",
        rank=failure.rank,
        last_good_checkpoint=checkpoint,
        what_to_do=f"See {rank_log(run_dir, failure.rank)}.",
    )


def _stopped(run_dir: Path, status: Status | None, message: str) -> Status:
    if status is not None and status.reason != "peer_lost":
        return status  # what the ranks managed to say themselves is better
    return write_status(
        run_dir,
        "preempted",
        message,
        exit_code=5,
        last_good_checkpoint=last_good_checkpoint(run_dir),
        what_to_do=_how_to_go_on(run_dir),
    )


def _launcher_failed(run_dir: Path, said: str, launch: LaunchConfig, *, lost: bool = False) -> Status:
    """Torchrun ended without a rank to blame: mostly it could not meet the others."""
    text = said.strip().splitlines()
    last = text[-1] if text else "torchrun ended without a word"
    if re.search(r"EADDRINUSE|[Aa]ddress already in use", said):
        message = f"launch.rendezvous = {launch.rendezvous!r} is taken by another program."
        remedy = (
            "Set launch.rendezvous to a free port of the first node; where nodes share a machine, "
            "launch.holds_rendezvous to false on all but one."
        )
        return write_status(run_dir, "io", message, what_to_do=remedy)
    if lost or re.search(r"Rendezvous\w*Error|RendezvousTimeout|Dist(?:Network|Store)Error", said):
        logs = sorted((run_dir / "logs").glob("launcher_*.log"))
        came = ", ".join(log.stem.removeprefix("launcher_") for log in logs)
        message = (
            f"{launch.nnodes} nodes did not meet at launch.rendezvous = {launch.rendezvous!r}, or the node that holds "
            f"it is gone. Nodes that have ever started this run: {came or 'none'}. {last}"
        )
        remedy = "See that all nodes run the same command, and that they reach the first node's address and port."
        return write_status(run_dir, "io", message, what_to_do=remedy)
    return write_status(
        run_dir, "bug", f"The launcher failed: {last}", what_to_do=f"See {launcher_log(run_dir, launch.nnodes)}."
    )


def _refused(exit_code: int, said: str) -> Status:
    """Rank 0 would not begin. Nothing is written: the folder may be another run's."""
    start = "moedist train: "
    lines = [line.removeprefix(start) for line in said.splitlines() if line.startswith(start)]
    reason: Reason = "config" if exit_code == ExitCode.CONFIG else "io"
    return Status(reason, exit_code, "\n".join(lines) or "Rank 0 refused to begin; its node's launcher log says why.")


def _unwritten(run_dir: Path, error: OSError) -> Status:
    """An end that nobody could write down: the ranks' own words are lost to the same disk."""
    checkpoint = last_good_checkpoint(run_dir)
    return Status(
        "io",
        EXIT_CODES["io"],
        f"The run failed, and {run_dir} cannot be written: {error.strerror}.",
        last_good_checkpoint=None if checkpoint is None else str(checkpoint),
        what_to_do=f"Make room or mend the disk. {_how_to_go_on(run_dir)}",
    )


def last_good_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run folder whose files have the sizes that its manifest says; None for none."""
    folders = sorted((run / "checkpoints").glob("step_*"), reverse=True)
    if not folders:
        return None
    from moedist.train.checkpoint.errors import CheckpointError
    from moedist.train.checkpoint.manifest import check_sizes

    for path in folders:
        try:
            check_sizes(path)
        except CheckpointError:
            continue
        return path
    return None


def launcher_log(run_dir: Path, nnodes: int) -> Path:
    """Where torchrun's own words go; a file per node, because nodes share the folder."""
    return run_dir / "logs" / ("launcher.log" if nnodes == 1 else f"launcher_{socket.gethostname()}.log")


def rank_log(run_dir: Path, rank: int) -> Path:
    """Where a rank's output goes."""
    return run_dir / "logs" / f"rank_{rank}.log"


def tail(path: Path, num_lines: int = 20) -> list[str]:
    """The last lines of a file; none where it cannot be read."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 65536))
            return file.read().decode(errors="replace").splitlines()[-num_lines:]
    except OSError:
        return []


def last_line(run_dir: Path, rank: int) -> str:
    """The last line of a rank's log that is not empty: of an exception, its message."""
    lines = [line.strip() for line in tail(rank_log(run_dir, rank)) if line.strip()]
    return lines[-1] if lines else "it wrote nothing"


def _how_to_go_on(run_dir: Path) -> str:
    return f"Continue with the same command and run.dir={run_dir} run.resume=auto."
