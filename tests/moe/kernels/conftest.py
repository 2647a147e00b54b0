"""Ranks on which kernels run in Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from unittest import mock

import pytest

from tests.ranks import Here, RankPool


def interpreted(here: Here) -> bool:
    from moedist.moe.kernels.products import INTERPRETED

    return INTERPRETED


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Callable[[int], RankPool]]:
    """``interpreter(world)``: as `ranks`, kernels computed on the host line by line. A process of its own, because a
    kernel stays what it was when its module was imported."""
    pytest.importorskip("triton")
    pools: dict[int, RankPool] = {}

    def pool(world: int) -> RankPool:
        if world not in pools:
            pools[world] = RankPool(world)
            with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
                assert all(pools[world].run(interpreted))
        return pools[world]

    yield pool
    for each in pools.values():
        each.close()
