"""Who is there: ranks call each other's names over the store before each exchange, and after one that failed.

A collective that waits for a rank says after its time-out only that something is missing. The store knows who came, on
any backend and across nodes, as long as the rank that keeps it lives. Rank 0 calls the roll; all go by its word.
"""

from __future__ import annotations

import datetime
import json
import queue
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from moedist.doctor.links import some

Answer = TypeVar("Answer")
POLL_S = 0.02
GRACE_S = 10.0
"""Seconds beyond the limit that ranks wait for rank 0's word of who is missing."""
BEAT_S = 1.0
"""Seconds between two signs of life."""
SILENT_BEATS = 10
"""Signs of life that the one who asks gives while another gives none, before that one counts as hung."""


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


class AskedStore:
    """A store whose answers are waited for so long and no longer: torch's own waits for ever for a keeper that is
    stopped.

    Args:
        store: asked in threads of their own, which may stay behind.
        limit_s: for each answer, beyond what was asked for.
    """

    def __init__(self, store: Store, limit_s: float):
        self._store, self._limit_s = store, limit_s

    def set(self, key: str, value: str) -> None:
        self._ask(lambda: self._store.set(key, value))

    def get(self, key: str) -> str:
        return self._ask(lambda: self._store.get(key).decode())

    def has(self, key: str) -> bool:
        return self._ask(lambda: self._store.check([key]))

    def wait(self, key: str, limit_s: float) -> None:
        self._ask(lambda: self._store.wait([key], datetime.timedelta(seconds=limit_s)), limit_s)

    def _ask(self, ask: Callable[[], Answer], more_s: float = 0.0) -> Answer:
        """Raises RuntimeError where there is no answer, in time or at all."""
        answers: queue.SimpleQueue[tuple[Answer] | Exception] = queue.SimpleQueue()

        def listen() -> None:
            try:
                answers.put((ask(),))
            except Exception as error:
                answers.put(error)

        threading.Thread(target=listen, name="store", daemon=True).start()
        try:
            answer = answers.get(timeout=self._limit_s + more_s)
        except queue.Empty:
            raise RuntimeError(f"the store did not answer within {self._limit_s + more_s:.0f} s") from None
        if isinstance(answer, Exception):
            raise answer
        return answer[0]


class Pulse:
    """A rank's sign of life, given through the store by a thread of its own, and its view of the others'.

    Silence is measured in own beats, not in seconds: a busy machine slows all ranks, and one that is only slow is never
    taken for one that hangs.
    """

    def __init__(self, asked: AskedStore, rank: int):
        self._asked, self._rank = asked, rank
        self._beats = 0
        self._seen: dict[int, tuple[str, int]] = {}
        self._stop = threading.Event()

    def start(self, store: Store) -> None:
        """Beats from now on, over ``store``: a connection of its own, as one that waits for a key does nothing else."""
        threading.Thread(target=self._beat, args=(store,), name="pulse", daemon=True).start()

    def stop(self) -> None:
        """Beats no more."""
        self._stop.set()

    def hangs(self, rank: int) -> bool:
        """Whether a rank has given no sign for `SILENT_BEATS`; the first look at it begins the count."""
        key = f"beat/{rank}"
        beat = self._asked.get(key) if self._asked.has(key) else ""
        if rank not in self._seen or self._seen[rank][0] != beat:
            self._seen[rank] = beat, self._beats
        return self._beats - self._seen[rank][1] >= SILENT_BEATS

    def _beat(self, store: Store) -> None:
        while not self._stop.wait(BEAT_S):
            try:
                store.set(f"beat/{self._rank}", str(self._beats))
            except (RuntimeError, dist.DistError):  # the store has gone, and with it whoever would ask
                return
            self._beats += 1


class RollCall:
    """One rank's part. Entered, it also gives signs of life, by which the others tell slow from hung.

    Args:
        store: that all ranks share.
        rank, world_size: this rank among all.
        limit_s: seconds that a rank may take to come to a phase after the others.
    """

    def __init__(self, store: Store, rank: int, world_size: int, limit_s: float):
        self.store, self.rank, self.world_size, self.limit_s = store, rank, world_size, limit_s
        self._asked = AskedStore(store, limit_s)
        self._pulse = Pulse(self._asked, rank)

    def __enter__(self) -> RollCall:
        self._pulse.start(self.store.clone())  # type: ignore[attr-defined]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pulse.stop()

    def begin(self, phase: str, word: str = "here") -> list[tuple[str, float]]:
        """Returns when all have come to ``phase``: each one's word, and the seconds that it came after the first.

        Raises:
            MissingRanksError: some have not, within the limit; raised on all that have.
        """
        everyone = f"{phase}/everyone"
        try:
            self._asked.set(f"{phase}/{self.rank}", word)
            if self.rank == 0:
                self._asked.set(everyone, json.dumps(self._wait(phase)))
            else:
                self._asked.wait(f"{phase}/0", self.limit_s)
                self._asked.wait(everyone, self.limit_s + GRACE_S)
            came: dict[str, tuple[str, float]] = json.loads(self._asked.get(everyone))
            missing = [rank for rank in range(self.world_size) if str(rank) not in came]
            if missing:
                self._hear(phase, {int(rank) for rank in came})
        except (RuntimeError, dist.DistError) as error:  # the store is where rank 0 is
            raise MissingRanksError(phase, [0], self.limit_s) from error
        if missing:
            raise MissingRanksError(phase, missing, self.limit_s)
        return [came[str(rank)] for rank in range(self.world_size)]

    def lost(self, phase: str, error: Exception) -> Exception:
        """What to raise for a collective that failed: those are missing that neither failed nor went on.

        A rank has as long again as the collective had to fail too, while it gives signs of life.
        """
        end, failed, verdict = f"the end of {phase}", f"{phase}/failed", f"{phase}/missing"
        try:
            self._asked.set(f"{failed}/{self.rank}", "")
            if self.rank == 0:
                keys = {rank: f"{failed}/{rank}" for rank in range(self.world_size)}
                self._asked.set(verdict, json.dumps(sorted(self._silent(keys, self.limit_s + GRACE_S))))
            elif self._silent({0: verdict}, self.limit_s + 2 * GRACE_S):
                return MissingRanksError(end, [0], self.limit_s)
            missing: list[int] = json.loads(self._asked.get(verdict))
            self._hear(failed, set(range(self.world_size)) - set(missing))
        except (RuntimeError, dist.DistError):
            return error if self.rank == 0 else MissingRanksError(end, [0], self.limit_s)
        return MissingRanksError(end, missing, self.limit_s) if missing else error

    def _silent(self, keys: Mapping[int, str], limit_s: float) -> set[int]:
        """The ranks that have not set their key, once each of them hangs, or the limit is over."""
        deadline = time.monotonic() + limit_s
        silent = set(keys)
        while silent and time.monotonic() < deadline:
            silent = {rank for rank in silent if not self._asked.has(keys[rank])}
            if all([self._pulse.hangs(rank) for rank in silent]):  # a list: all are looked at, each time
                break
            time.sleep(POLL_S)
        return silent

    def _hear(self, word: str, ranks: set[int]) -> None:
        """This rank has heard; rank 0 goes when ``ranks`` have, because it may keep the store, which ends with it."""
        self._asked.set(f"{word}/heard/{self.rank}", "")
        if self.rank == 0:
            self._silent({rank: f"{word}/heard/{rank}" for rank in ranks}, self.limit_s)

    def _wait(self, phase: str) -> dict[int, tuple[str, float]]:
        """Each one's word and when it came; returns at the limit without those who have not."""
        begin = time.monotonic()
        came: dict[int, tuple[str, float]] = {}
        while len(came) < self.world_size and (now := time.monotonic() - begin) < self.limit_s:
            for rank in range(self.world_size):
                if rank not in came and self._asked.has(f"{phase}/{rank}"):
                    came[rank] = self._asked.get(f"{phase}/{rank}"), now
            time.sleep(POLL_S)
        return came
