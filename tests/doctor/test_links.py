from __future__ import annotations

import dataclasses

from moedist.doctor.links import Collective, Links, judge_links, shared_by


def links_of(pair_s: dict[tuple[int, int], float] | None = None, world_size: int = 4, hosts: int = 2) -> Links:
    """All alike, 1 GB/s, but the pairs given."""

    def seconds(first: int, second: int) -> float | None:
        if first == second:
            return None
        return (pair_s or {}).get((min(first, second), max(first, second)), 1e-3)

    return Links(
        device="cpu",
        backend="gloo",
        hosts=tuple(f"n{rank * hosts // world_size}" for rank in range(world_size)),
        came_s=(0.0,) * (world_size - 1) + (2.5,),
        compute_s=(0.01,) * world_size,
        collectives={"barrier": Collective(0, 1e-4), "all-reduce": Collective(10**6, 1e-3)},
        pair_bytes=10**6,
        pair_s=tuple(tuple(seconds(first, second) for second in range(world_size)) for first in range(world_size)),
    )


def test_all_alike():
    found = judge_links(links_of())
    assert [finding.check for finding in found] == [
        "ranks", "compute", "barrier", "all-reduce", "pairs on a host", "pairs between hosts",
    ]  # fmt: skip
    assert {finding.level for finding in found} == {"ok"}
    assert found[0].text == "4 x cpu over gloo on n0, n1; rank 3 (n1) came last, 2.5 s after the first"
    assert found[3].text == "1.0 MB a rank in 1.00 ms, 1.00 GB/s"
    assert found[5].text.startswith("1.00 GB/s each way (upper quartile of 4, 1.0 MB at once)")


def test_the_slowest_rank_is_named():
    found = judge_links(dataclasses.replace(links_of(), compute_s=(0.01, 0.01, 0.03, 0.01)))[1]
    assert found.level == "warning" and "slowest: rank 2 (n1), 3.0 x that" in found.text


def test_wrong_values_are_a_problem():
    links = dataclasses.replace(links_of(), collectives={"all-reduce": Collective(10**6, 1e-3, wrong=(3,))})
    found = judge_links(links)[2]
    assert found.level == "problem" and found.text == "wrong values arrived at rank 3 (n1)"


def test_a_slow_pair_among_its_like():
    (found,) = [each for each in judge_links(links_of({(1, 2): 5e-3})) if each.level != "ok"]
    assert found.check == "pairs between hosts"
    assert "slowest: rank 1 (n0) with rank 2 (n1), 0.20 GB/s; 1 below half of that: 1-2 (0.20 GB/s)" in found.text
    assert "these links" in found.remedy


def test_links_between_hosts_are_not_measured_by_those_on_one():
    across = {(0, 2): 0.1, (0, 3): 0.1, (1, 2): 0.1, (1, 3): 0.1}
    assert {finding.level for finding in judge_links(links_of(across))} == {"ok"}


def test_what_slow_pairs_share_is_named():
    at_rank = {(rank, 5): 8e-3 for rank in range(5)} | {(5, rank): 8e-3 for rank in range(6, 8)}
    (found,) = [each for each in judge_links(links_of(at_rank, 8, hosts=1)) if each.level != "ok"]
    assert "7 below half of that: 0-5 (0.12 GB/s)" in found.text and "and 3 more" in found.text
    assert "all of them at rank 5 (n0)" in found.text and "Look at rank 5 (n0)" in found.remedy
    hosts = ["n0", "n0", "n1", "n1", "n2", "n2"]
    assert shared_by([(0, 4), (1, 5), (2, 4), (3, 5)], hosts) == "host n2"
    assert shared_by([(0, 1)], hosts) is shared_by([(0, 2), (4, 5)], hosts) is None


def test_one_slow_host_among_three_is_named():
    slow = {(0, 2): 9e-3, (1, 2): 9e-3}
    (found,) = [each for each in judge_links(links_of(slow, 3, hosts=3)) if each.level != "ok"]
    assert "2 below half of that: 0-2 (0.11 GB/s), 1-2 (0.11 GB/s); all of them at rank 2 (n2)" in found.text
    two = dataclasses.replace(links_of(world_size=2), compute_s=(0.01, 0.03))
    assert "slowest: rank 1 (n1), 3.0 x" in judge_links(two)[1].text and judge_links(two)[1].level == "warning"


def test_pairs_that_there_was_no_time_for_are_left_out():
    links = links_of()
    lines = [list(line) for line in links.pair_s]
    lines[0][3] = lines[3][0] = None
    links = dataclasses.replace(links, pair_s=tuple(map(tuple, lines)))
    assert list(links.pairs()) == [(0, 1), (0, 2), (1, 2), (1, 3), (2, 3)]
    assert "upper quartile of 3," in judge_links(links)[-1].text


def test_one_rank_has_no_pairs():
    assert [finding.check for finding in judge_links(links_of(world_size=1, hosts=1))][-1] == "all-reduce"
