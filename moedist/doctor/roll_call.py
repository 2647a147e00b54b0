"""Who is there: ranks call each other's names over the store before each exchange.

A collective that waits for a rank says after its time-out only that something is missing. The store knows who came, on
any backend and across nodes, as long as the rank that keeps it lives.
"""

from __future__ import annotations

import datetime
import json
import time

import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from moedist.doctor.links import some

POLL_S = 0.02
GRACE_S = 10.0
"""Seconds beyond the limit that ranks wait for rank 0's word of who is missing."""
LATE_S = 15.0
"""Seconds that the others get to say that they too have failed, or have heard who is missing."""


class MissingRanksError(RuntimeError):
    """Ranks that did not come, or did not come back.

    Args:
        phase: what the others wanted to begin or to end.
        ranks: global.
        waited_s: how long they were waited for.
    """

    def __init__(self, phase: str, ranks: list[int], waited_s: float):
        self.phase, self.ranks = phase, ranks
        who = f"rank{'s' * (len(ranks) > 1)} {some([str(rank) for rank in ranks])}"
        super().__init__(f"{who} did not come to {phase} within {waited_s:.0f} s")


class RollCall:
    """One rank's part.

    Args:
        store: that all ranks share.
        rank, world_size: this rank among all.
        limit_s: seconds that a rank may take to come to a phase after the others.
    """

    def __init__(self, store: Store, rank: int, world_size: int, limit_s: float):
        self.store, self.rank, self.world_size, self.limit_s = store, rank, world_size, limit_s

    def begin(self, phase: str, word: str = "here") -> list[tuple[str, float]]:
        """Returns when all have come to ``phase``: each one's word, and the seconds that it came after the first.

        Raises:
            MissingRanksError: some have not, within the limit; raised on all that have.
        """
        self.store.set(f"{phase}/{self.rank}", word)
        everyone = f"{phase}/everyone"
        if self.rank == 0:
            self.store.set(everyone, json.dumps(self._wait(phase)))
        else:
            try:
                self.store.wait([everyone], datetime.timedelta(seconds=self.limit_s + GRACE_S))
            except (RuntimeError, dist.DistError) as error:
                raise MissingRanksError(phase, [0], self.limit_s + GRACE_S) from error
        came: dict[str, tuple[str, float]] = json.loads(self.store.get(everyone))
        if missing := [rank for rank in range(self.world_size) if str(rank) not in came]:
            self.store.set(f"{phase}/heard/{self.rank}", "")
            if self.rank == 0:  # it may keep the store, which ends with it
                self._mark_out(f"{phase}/heard", {int(rank) for rank in came})
            raise MissingRanksError(phase, missing, self.limit_s)
        return [came[str(rank)] for rank in range(self.world_size)]

    def lost(self, phase: str, error: Exception) -> Exception:
        """What to raise for a collective that failed: those are missing that neither failed nor went on."""
        try:
            self.store.set(f"{phase}/failed/{self.rank}", "")
            waiting = self._mark_out(f"{phase}/failed", set(range(self.world_size)))
        except (RuntimeError, dist.DistError):
            return error
        return MissingRanksError(f"the end of {phase}", sorted(waiting), self.limit_s) if waiting else error

    def _mark_out(self, key: str, ranks: set[int]) -> set[int]:
        """Those of ``ranks`` that have not set their ``key`` within `LATE_S`."""
        deadline = time.monotonic() + LATE_S
        while ranks and time.monotonic() < deadline:
            ranks = {rank for rank in ranks if not self.store.check([f"{key}/{rank}"])}
            time.sleep(POLL_S)
        return ranks

    def _wait(self, phase: str) -> dict[int, tuple[str, float]]:
        """Each one's word and when it came; returns at the limit without those who have not."""
        begin = time.monotonic()
        came: dict[int, tuple[str, float]] = {}
        while len(came) < self.world_size and (now := time.monotonic() - begin) < self.limit_s:
            for rank in range(self.world_size):
                if rank not in came and self.store.check([f"{phase}/{rank}"]):
                    came[rank] = self.store.get(f"{phase}/{rank}").decode(), now
            time.sleep(POLL_S)
        return came
