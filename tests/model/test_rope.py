"""Rotary positions against their definition."""

from __future__ import annotations

import math

import torch

from moedist.model.rope import rope_table, rotate


def test_equals_the_rotation_written_out():
    x_BSHh = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    position_BS = torch.tensor([[0, 1, 2, 0, 1], [7, 8, 9, 10, 11]])
    got = rotate(x_BSHh, rope_table(position_BS, 8, 100.0))
    for b, s, h, i in [(b, s, h, i) for b in range(2) for s in range(5) for h in range(3) for i in range(4)]:
        angle = position_BS[b, s].item() * 100.0 ** (-2 * i / 8)
        first, second = x_BSHh[b, s, h, i].item(), x_BSHh[b, s, h, i + 4].item()
        want = (first * math.cos(angle) - second * math.sin(angle), second * math.cos(angle) + first * math.sin(angle))
        assert abs(got[b, s, h, i].item() - want[0]) < 1e-6
        assert abs(got[b, s, h, i + 4].item() - want[1]) < 1e-6


def test_scores_depend_on_the_distance_alone():
    query, key = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def score(query_position: int, key_position: int) -> float:
        tables = [rope_table(torch.tensor([[p]]), 16, 10_000.0) for p in (query_position, key_position)]
        return (rotate(query, tables[0]) * rotate(key, tables[1])).sum().item()

    assert abs(score(5, 2) - score(105, 102)) < 1e-4
    assert abs(score(5, 2) - score(2, 5)) > 1e-2


def test_table_is_fp32_and_the_input_keeps_its_dtype():
    table = rope_table(torch.arange(4).unsqueeze(0), 8, 10_000.0)
    assert table.cos_BSh.dtype == table.sin_BSh.dtype == torch.float32
    x = torch.randn(1, 4, 2, 8, dtype=torch.bfloat16)
    assert rotate(x, table).dtype == torch.bfloat16
    # Position 0 is not turned; the rotation is made in fp32 and rounded once.
    assert torch.equal(rotate(x, table)[:, 0], x[:, 0])
    assert torch.equal(rotate(x, table), rotate(x.float(), table).bfloat16())
