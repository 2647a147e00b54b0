"""Logical experts, slots and ranks."""

from __future__ import annotations

import pytest
import torch

from moedist.moe.placement import Placement


def test_in_order():
    placement = Placement.in_order(6, 3)
    assert placement.expert_ids == ((0, 1), (2, 3), (4, 5))
    assert placement.identity and placement.num_experts == 6 and placement.sizes == (2, 2, 2)
    value = torch.arange(6)
    assert placement.slots_first(value) is value and placement.slot_of(value) is value


def test_unlike_numbers_and_scattered_ids():
    placement = Placement(((4, 0), (), (3, 1, 2)))
    assert not placement.identity
    assert placement.sizes == (2, 0, 3) and placement.num_experts == 5
    assert placement.expert_of_slot == (4, 0, 3, 1, 2)
    assert placement.slots_first(torch.tensor([10, 11, 12, 13, 14])).tolist() == [14, 10, 13, 11, 12]
    assert placement.slot_of(torch.tensor([0, 4, 2, 2])).tolist() == [1, 0, 4, 4]
    assert placement == Placement(((4, 0), (), (3, 1, 2))) and hash(placement) == hash(
        Placement(((4, 0), (), (3, 1, 2)))
    )


@pytest.mark.parametrize("ids", [((0, 1), (1, 2)), ((0, 2),), ((0, 0),)])
def test_every_expert_lives_on_exactly_one_rank(ids):
    with pytest.raises(AssertionError, match="exactly one rank"):
        Placement(ids)
