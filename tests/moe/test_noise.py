"""Draws by name: what they depend on, what they don't, and how they are spread."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moedist.moe.context import TokenContext
from moedist.moe.noise import RANDOM_DROP, ROUTER_NOISE, draw_normal, draw_uniform


def context(samples: list[int], length: int = 4, **kwargs: object) -> TokenContext:
    return TokenContext.of_rows(len(samples), length, sample_B=torch.tensor(samples), **kwargs)


def draw(ctx: TokenContext, columns: int = 3, layer: int = 0, stream: int = ROUTER_NOISE) -> torch.Tensor:
    return draw_uniform(ctx, columns, layer=layer, stream=stream)


@pytest.mark.requirement("C14")
def test_a_token_draws_the_same_in_any_row_micro_batch_and_rank():
    together = draw(context([5, 6, 7, 8])).view(4, 4, 3)
    for row, sample in enumerate([5, 6, 7, 8]):
        assert torch.equal(draw(context([sample])).view(4, 3), together[row])
    assert torch.equal(draw(context([8, 6])).view(2, 4, 3), together[[3, 1]])


def test_a_token_draws_the_same_whatever_the_width_of_the_batch():
    assert torch.equal(draw(context([5], length=9))[:4], draw(context([5], length=4)))
    assert torch.equal(draw(context([5]), columns=7)[:, :3], draw(context([5]), columns=3))


@pytest.mark.pitfall("17b")
def test_a_draw_is_repeatable_and_leaves_the_global_generator_alone():
    """Pitfall 17b: nothing that recomputation would have to restore."""
    state = torch.get_rng_state()
    first = draw(context([1, 2]))
    torch.rand(7)
    assert torch.equal(draw(context([1, 2])), first)
    torch.set_rng_state(state)
    draw_normal(context([1, 2]), 3, layer=0, stream=ROUTER_NOISE)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_part_of_the_name_counts():
    ctx = context([1, 2])
    draws = [
        draw(ctx),
        draw(dataclasses.replace(ctx, seed=1)),
        draw(dataclasses.replace(ctx, step=torch.tensor(1))),
        draw(ctx, layer=1),
        draw(ctx, stream=RANDOM_DROP),
        draw(context([3, 4])),
        draw(dataclasses.replace(ctx, position_T=ctx.position_T + 1)),
    ]
    values = torch.cat([one.flatten() for one in draws[:-1]])
    assert values.unique().numel() == values.numel()
    assert not torch.equal(draws[-1], draws[0])
    unread = dataclasses.replace(ctx, id_T=ctx.id_T + 5, training=False, num_tokens=torch.tensor(99))
    assert torch.equal(draw(unread), draws[0])


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1, 2**63 - 1])
def test_uniform_moments(seed):
    values = draw(context(list(range(64)), length=256, seed=seed, step=12_345), columns=8)
    assert values.dtype == torch.float64 and values.min() > 0 and values.max() < 1
    assert values.mean().item() == pytest.approx(0.5, abs=0.003)
    assert values.std().item() == pytest.approx(12**-0.5, abs=0.003)
    histogram = torch.histc(values, 16, 0, 1) / values.numel()
    assert (histogram - 1 / 16).abs().max() < 0.003
    columns = torch.corrcoef(values.t()) - torch.eye(8)
    assert columns.abs().max() < 0.04, "experts draw independently"


def test_normal_moments():
    values = draw_normal(context(list(range(64)), length=256), 8, layer=3, stream=ROUTER_NOISE)
    assert values.isfinite().all()
    assert values.mean().item() == pytest.approx(0, abs=0.01)
    assert values.std().item() == pytest.approx(1, abs=0.01)
    assert (values.abs() < 1).double().mean().item() == pytest.approx(0.6827, abs=0.005)


def test_the_ends_of_the_interval_are_never_reached(monkeypatch):
    for bits in (0, -1):
        monkeypatch.setattr("moedist.moe.noise._mix", lambda x, bits=bits: torch.full_like(x, bits))
        value = draw(context([1]), columns=1)
        assert (value > 0).all() and (value < 1).all()
        assert draw_normal(context([1]), 1, layer=0, stream=1).isfinite().all()
