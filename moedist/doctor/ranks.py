"""One rank of ``moedist doctor``: meets the others, exchanges with them what a run would, and measures it."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import math
import os
import socket
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from moedist.config import ConfigError
from moedist.config.exit_codes import ExitCode
from moedist.doctor.links import Collective, Links
from moedist.doctor.roll_call import MissingRanksError, RollCall
from moedist.mesh import Mesh, MeshConfig, close_mesh, join_mesh
from moedist.mesh.collectives import all_gather, all_max, all_sum, all_to_all, barrier
from moedist.train.watchdog import Watchdog

RESULT = "links.json"
"""Where every rank leaves the outcome, in the folder of its node: all write the same."""
BYTES = {"cpu": 4 * 2**20, "cuda": 128 * 2**20}
"""That a rank puts into a collective, where the network is not too slow for it."""
TRIES = 5
BUDGET_S = 5.0
"""Seconds that one collective's tries may take together; fewer or smaller ones beyond."""
PAIRS_BUDGET_S = 15.0
LEAST_BYTES = 2**14
WIDTH = {"cpu": 512, "cuda": 4096}
"""Of the matrices that every rank multiplies alone."""
MARGIN_S = 30.0
"""Beyond the collectives' own time-out, before a rank that is stuck is ended."""


def check_rank(config: MeshConfig, folder: Path) -> int:
    """Called on every rank that torchrun started; every rank leaves `RESULT`. Returns the exit code.

    Args:
        config: device, and how long a rank may be waited for; the layout does not matter.
        folder: of this node.
    """
    rank = int(os.environ["RANK"])
    with Watchdog(folder / "logs", rank, 2 * config.timeout_s + MARGIN_S) as watchdog:
        try:
            links = measure(config, lambda phase: watchdog.enter(phase, 0))
        except MissingRanksError as error:
            traceback.print_exception(error, file=sys.stderr)
            leave(folder, {"missing": error.ranks, "phase": error.phase, "message": str(error)})
            return ExitCode.RANK_FAILED
        except ConfigError as error:
            print(error, file=sys.stderr)
            return ExitCode.CONFIG
        finally:
            close_mesh()
    leave(folder, dataclasses.asdict(links))
    return 0


def leave(folder: Path, result: dict[str, Any]) -> None:
    """Writes `RESULT`, whole or not at all."""
    draft = folder / f".{RESULT}.{os.environ['RANK']}"
    draft.write_text(json.dumps(result), encoding="utf-8")
    draft.replace(folder / RESULT)


def measure(config: MeshConfig, enter: Callable[[str], None]) -> Links:
    """All measurements, each after a roll call.

    Args:
        config: as of a run.
        enter: told the name of each phase.

    Raises:
        MissingRanksError: a rank did not come, or hung in a collective.
    """
    enter("meeting")
    with meet(config.timeout_s) as roll:
        came = roll.begin("the meeting", socket.gethostname())
        with together(roll, enter, "the process group"):
            mesh = join_mesh(dataclasses.replace(config, ep=1, fsdp=None), PrefixStore("group", roll.store))
        trial = Trial(mesh, roll, enter)
        compute_s = trial.compute()
        collectives = {
            "barrier": trial.barrier(),
            "all-reduce": trial.all_reduce(),
            "all-to-all even": trial.all_to_all(even=True),
            "all-to-all uneven": trial.all_to_all(even=False),
        }
        pair_bytes, pair_s = trial.pairs() if len(came) > 1 else (0, ((None,),))
    return Links(
        device=mesh.device.type,
        backend=dist.get_backend(),
        hosts=tuple(host for host, _ in came),
        came_s=tuple(seconds for _, seconds in came),
        compute_s=compute_s,
        collectives=collectives,
        pair_bytes=pair_bytes,
        pair_s=pair_s,
    )


def meet(limit_s: float) -> RollCall:
    """Reaches the store of rank 0, as torchrun's environment names it.

    Raises:
        MissingRanksError: rank 0 does not answer.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    timeout = datetime.timedelta(seconds=limit_s)
    keeps_it = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun does
    try:
        store = TCPStore(host, port, world_size, keeps_it, timeout, wait_for_workers=False)
    except (RuntimeError, dist.DistError) as error:
        raise MissingRanksError(f"{host}:{port}, where it should keep the store,", [0], limit_s) from error
    return RollCall(store, rank, world_size, limit_s)


@contextlib.contextmanager
def together(roll: RollCall, enter: Callable[[str], None], phase: str) -> Iterator[None]:
    """All ranks begin a phase together; one that then hangs is named."""
    enter(phase)
    roll.begin(phase)
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        raise roll.lost(phase, error) from error


class Trial:
    """The exchanges over all ranks, and their times.

    Args:
        mesh: over all ranks.
        roll: called before each phase.
        enter: told the name of each phase.
    """

    def __init__(self, mesh: Mesh, roll: RollCall, enter: Callable[[str], None]):
        self.mesh, self.axis, self.device = mesh, mesh.dp, mesh.device
        self.roll, self.enter = roll, enter

    def compute(self) -> tuple[float, ...]:
        """[W] seconds of the same matrix product on each rank, all at once: a run's ranks share the machine too."""
        with self._phase("compute"):
            width = WIDTH[self.device.type]
            matrix = torch.ones(width, width, device=self.device)
            seconds = statistics.median(self._times(lambda: matrix @ matrix, TRIES))
            return tuple(self._gather([seconds])[:, 0].tolist())

    def barrier(self) -> Collective:
        """How long it takes all ranks to hear of each other."""
        with self._phase("barrier"):
            times = self._times(lambda: barrier(self.axis, self.device), TRIES)
            return Collective(0, self._slowest(statistics.median(times)))

    def all_reduce(self) -> Collective:
        """A sum as of gradients."""
        world = self.axis.size

        def sum_of(num_bytes: int) -> Exchange:
            ranks = torch.full((num_bytes // 4,), float(self.axis.rank), device=self.device)
            wanted = torch.full_like(ranks, world * (world - 1) / 2)
            return Exchange(lambda: all_sum(ranks.clone(), self.axis), wanted)

        return self._measure("all-reduce", sum_of)

    def all_to_all(self, *, even: bool) -> Collective:
        """An exchange as of tokens: equal blocks, or one that sends the higher ranks more and rank 0 nothing."""

        def exchange(num_bytes: int) -> Exchange:
            sizes = block_sizes(num_bytes // 4, self.axis.size, even)
            receive = [sizes[self.axis.rank]] * self.axis.size
            send = torch.full((sum(sizes),), float(self.axis.rank), device=self.device)
            sources = torch.arange(self.axis.size, dtype=torch.float32, device=self.device)
            wanted = sources.repeat_interleave(torch.tensor(receive, device=self.device))
            return Exchange(lambda: all_to_all(send, self.axis, sizes, receive), wanted)

        return self._measure(f"all-to-all {'even' if even else 'uneven'}", exchange)

    def pairs(self) -> tuple[int, tuple[tuple[float | None, ...], ...]]:
        """Bytes that a pair exchanged, and [W, W] seconds; None for pairs that there was no time for.

        Every round pairs off all ranks, so a run of ``W`` ranks takes ``W - 1`` rounds.
        """
        world, rank = self.axis.size, self.axis.rank
        num_rounds = world + world % 2 - 1

        def once(num_bytes: int, turn: int) -> float:
            partner = partner_of(rank, turn, world)
            sizes = [num_bytes if other == partner else 0 for other in range(world)]
            send = torch.zeros(sum(sizes), dtype=torch.uint8, device=self.device)
            return min(self._times(lambda: all_to_all(send, self.axis, sizes, sizes), 2))

        with self._phase("pairs"):
            room = PAIRS_BUDGET_S / 3 / num_rounds / self._slowest(once(LEAST_BYTES, 0))
            num_bytes = min(BYTES[self.device.type], LEAST_BYTES * max(1, int(room)))
            row, begin = [math.nan] * world, time.monotonic()
            for turn in range(num_rounds):
                seconds, partner = once(num_bytes, turn), partner_of(rank, turn, world)
                if partner is not None:
                    row[partner] = seconds
                if self._slowest(time.monotonic() - begin) > PAIRS_BUDGET_S:
                    break
            lines = self._gather(row).tolist()
        return num_bytes, tuple(tuple(None if math.isnan(each) else each for each in line) for line in lines)

    def _measure(self, phase: str, make: Callable[[int], Exchange]) -> Collective:
        """Its seconds on the slowest rank, with fewer bytes where the network is slow; and who received it wrong."""
        with self._phase(phase):
            most, least = BYTES[self.device.type], 16 * LEAST_BYTES
            room = BUDGET_S / 2 / self._slowest(min(self._times(make(least).work, 2)))
            num_bytes = min(most, least * max(1, int(room)))
            tries = max(1, min(TRIES, int(room * least / num_bytes)))
            exchange = make(num_bytes)
            seconds = self._slowest(statistics.median(self._times(exchange.work, tries)))
            wrong = self._gather([float(not torch.equal(exchange.work(), exchange.wanted))])[:, 0]
            return Collective(num_bytes, seconds, tuple(wrong.nonzero()[:, 0].tolist()))

    def _phase(self, phase: str) -> contextlib.AbstractContextManager[None]:
        return together(self.roll, self.enter, phase)

    def _times(self, work: Callable[[], object], tries: int) -> list[float]:
        """Seconds of each try, all ranks beginning together; the first, which makes connections, is not counted."""
        times = []
        for _ in range(tries + 1):
            barrier(self.axis, self.device)
            begin = time.perf_counter()
            work()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            times.append(time.perf_counter() - begin)
        return times[1:]

    def _slowest(self, seconds: float) -> float:
        return float(all_max(torch.tensor([seconds], dtype=torch.float64, device=self.device), self.axis))

    def _gather(self, values: list[float]) -> Tensor:
        """[W, len(values)]: every rank's."""
        return all_gather(torch.tensor(values, dtype=torch.float64, device=self.device), self.axis).cpu()


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Something that ranks do together.

    Attributes:
        work: does it; returns what this rank received.
        wanted: what that must be.
    """

    work: Callable[[], Tensor]
    wanted: Tensor


def block_sizes(total: int, world_size: int, even: bool) -> list[int]:
    """Elements that go to each rank, of ``total`` or a few less.

    >>> block_sizes(12, 4, True), block_sizes(12, 4, False)
    ([3, 3, 3, 3], [0, 2, 4, 6])
    """
    if even or world_size == 1:
        return [total // world_size] * world_size
    share = world_size * (world_size - 1) // 2
    return [total * rank // share for rank in range(world_size)]


def partner_of(rank: int, turn: int, world_size: int) -> int | None:
    """With whom a rank exchanges in a round; None for nobody. In ``world_size - 1`` rounds (one more where it is odd)
    everybody meets everybody once.

    >>> [[partner_of(rank, turn, 4) for rank in range(4)] for turn in range(3)]
    [[3, 2, 1, 0], [1, 0, 3, 2], [2, 3, 0, 1]]
    """
    seats = world_size + world_size % 2
    last = seats - 1
    if rank == last:
        partner = turn * (seats // 2) % last
    else:
        partner = (turn - rank) % last
        partner = last if partner == rank else partner
    return partner if partner < world_size else None
