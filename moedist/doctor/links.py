"""What the ranks measured of each other, and what it says: who is slow, which link is, who sent something wrong."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterator, Sequence

from moedist.doctor.finding import Finding, ok, problem, warning

SLOW = 2.0
"""How many times longer than usual something takes that is called slow."""
NUM_NAMED = 4


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of exchange between all ranks.

    Attributes:
        bytes: that each rank puts in.
        seconds: of the slowest rank, median of its tries.
        wrong: ranks that got something else than was sent.
    """

    bytes: int
    seconds: float
    wrong: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Links:
    """What was measured, by global rank.

    Attributes:
        device: ``cpu`` or ``cuda``.
        backend: of the process group.
        hosts: where each rank runs.
        came_s: seconds that each came after the first.
        compute_s: of one piece of work that every rank does alone.
        collectives: by name, in the order of their measurement.
        pair_bytes: that the two of a pair send each other at once.
        pair_s: [rank, partner] seconds of such an exchange; None where it was not measured.
    """

    device: str
    backend: str
    hosts: tuple[str, ...]
    came_s: tuple[float, ...]
    compute_s: tuple[float, ...]
    collectives: dict[str, Collective]
    pair_bytes: int
    pair_s: tuple[tuple[float | None, ...], ...]

    @property
    def world_size(self) -> int:
        """All ranks."""
        return len(self.hosts)

    def pairs(self) -> Iterator[tuple[int, int]]:
        """Every measured pair once, the lower rank first."""
        for first in range(self.world_size):
            for second in range(first + 1, self.world_size):
                if self.pair_s[first][second] is not None:
                    yield first, second

    def gigabytes_per_s(self, pair: tuple[int, int]) -> float:
        """Each way at once, at the pace of the slower end."""
        first, second = pair
        times = (self.pair_s[first][second], self.pair_s[second][first])
        return self.pair_bytes / max(seconds for seconds in times if seconds is not None) / 1e9

    def name(self, rank: int) -> str:
        """A rank and where it is."""
        return f"rank {rank} ({self.hosts[rank]})"


def judge_links(links: Links) -> list[Finding]:
    """The findings, in the order they are shown."""
    findings = [judge_arrival(links), judge_compute(links)]
    findings += [judge_collective(name, each, links) for name, each in links.collectives.items()]
    between = {pair: links.hosts[pair[0]] == links.hosts[pair[1]] for pair in links.pairs()}
    for same_host, check in ((True, "pairs on a host"), (False, "pairs between hosts")):
        if pairs := [pair for pair, same in between.items() if same == same_host]:
            findings.append(judge_pairs(check, pairs, links))
    return findings


def judge_arrival(links: Links) -> Finding:
    """Who came last; a late rank is no fault, but every start waits for it."""
    hosts = list(dict.fromkeys(links.hosts))
    last = max(range(links.world_size), key=lambda rank: links.came_s[rank])
    text = f"{links.world_size} x {links.device} over {links.backend} on {some(hosts)}"
    return ok("ranks", f"{text}; {links.name(last)} came last, {links.came_s[last]:.1f} s after the first")


def judge_compute(links: Links) -> Finding:
    """The slowest rank at work that needs no other: all wait for it, every step."""
    median = statistics.median_low(links.compute_s)
    slowest = max(range(links.world_size), key=lambda rank: links.compute_s[rank])
    factor = links.compute_s[slowest] / median
    text = f"{1e3 * median:.1f} ms (median); slowest: {links.name(slowest)}, {factor:.1f} x that"
    if factor < SLOW:
        return ok("compute", text)
    remedy = "See whether its cores or GPU are shared, hot or throttled; a run goes at its pace."
    return warning("compute", text, remedy)


def judge_collective(name: str, measured: Collective, links: Links) -> Finding:
    """Its pace, and whether what came was what was sent."""
    text = f"{1e3 * measured.seconds:.2f} ms"
    if measured.bytes:
        text = f"{measured.bytes / 1e6:.1f} MB a rank in {text}, {measured.bytes / measured.seconds / 1e9:.2f} GB/s"
    if measured.wrong:
        ranks = ", ".join(links.name(rank) for rank in measured.wrong[:NUM_NAMED])
        remedy = "Take them out: memory, network or driver changes data there."
        return problem(name, f"wrong values arrived at {ranks}", remedy)
    return ok(name, text)


def judge_pairs(check: str, pairs: Sequence[tuple[int, int]], links: Links) -> Finding:
    """Bandwidth of pairs that should be alike; a rank or host that all slow ones share is named.

    Usual is what a quarter of them reach: one slow host among three is in most pairs.
    """
    rates = {pair: links.gigabytes_per_s(pair) for pair in pairs}
    usual = sorted(rates.values())[math.ceil(0.75 * len(pairs)) - 1]
    first, second = slowest = min(rates, key=lambda pair: rates[pair])
    text = f"{usual:.2f} GB/s each way (upper quartile of {len(pairs)}, {links.pair_bytes / 1e6:.1f} MB at once); "
    text += f"slowest: {links.name(first)} with {links.name(second)}, {rates[slowest]:.2f} GB/s"
    slow = sorted((pair for pair in pairs if rates[pair] * SLOW < usual), key=lambda pair: rates[pair])
    if not slow:
        return ok(check, text)
    named = some([f"{a}-{b} ({rates[a, b]:.2f} GB/s)" for a, b in slow])
    blamed = shared_by(slow, links.hosts)
    text += f"; {len(slow)} below half of that: {named}{f'; all of them at {blamed}' if blamed else ''}"
    remedy = f"Look at {blamed or 'these links'}: cable, link speed, PCIe lanes, or other traffic."
    return warning(check, text, remedy)


def shared_by(pairs: Sequence[tuple[int, int]], hosts: Sequence[str]) -> str | None:
    """The one rank, or else the one host, that takes part in all of several pairs; None where there is none."""
    if len(pairs) < 2:
        return None
    ranks = set.intersection(*({first, second} for first, second in pairs))
    if len(ranks) == 1:
        (rank,) = ranks
        return f"rank {rank} ({hosts[rank]})"
    shared = set.intersection(*({hosts[first], hosts[second]} for first, second in pairs))
    return f"host {shared.pop()}" if len(shared) == 1 and len(set(hosts)) > 1 else None


def some(names: Sequence[str]) -> str:
    """The first few, and how many more."""
    more = len(names) - NUM_NAMED
    return ", ".join(names[:NUM_NAMED]) + (f" and {more} more" if more > 0 else "")
