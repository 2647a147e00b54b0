"""The mixture of attention experts for library users."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from moedist.mesh import Mesh
from moedist.moe.capacity import CapacityConfig
from moedist.moe.context import TokenContext
from moedist.nn import AuxLossModule, ExpertType, MoEAttention, MoEAttentionConfig, usage_loss
from moedist.parallel import spread
from tests.ranks import Here

B, S, D, E, K = 2, 6, 16, 4, 2


def make(**changes: Any) -> MoEAttention:
    torch.manual_seed(1)
    values = {"dim": D, "num_heads": 2, "router_hidden_dim": 8, "dropout": 0.0, "edge_dim": 3, **changes}
    return MoEAttention(MoEAttentionConfig(**values), dtype=torch.float64)


def inputs(*shape: int) -> Tensor:
    return torch.randn(*(shape or (B, S, D)), dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.mark.requirement("R2-01", "R2-02", "R2-03")
def test_R2_01_kinds_have_names_and_compare():
    assert [kind.value for kind in ExpertType] == ["standard", "hyperbolic", "linear", "edge_featured"]
    assert ExpertType("linear") is copy.copy(ExpertType.LINEAR) and ExpertType.LINEAR == "linear"


@pytest.mark.requirement(
    "R2-18", "R2-19", "R2-20", "R2-21", "R2-22", "R2-23", "R2-24", "R2-25", "R2-26", "R2-27", "C16"
)
def test_R2_22_defaults_and_every_field_alone():
    config = MoEAttentionConfig()
    assert (config.dim, config.num_heads, config.num_experts, config.top_k) == (512, 8, 4, 2)
    assert config.expert_types == tuple(ExpertType)
    assert (config.router_hidden_dim, config.router_temperature) == (256, 1.0)
    assert (config.load_balance_coef, config.dropout) == (0.01, 0.1)
    assert MoEAttentionConfig(top_k=1).mixture().router.top_k == 1
    same = MoEAttentionConfig(expert_types=["linear"] * 4)
    assert [expert.kind for expert in same.mixture().experts] == ["linear"] * 4


@pytest.mark.requirement("R2-28", "R2-29", "R2-19", "R2-33")
def test_R2_28_refusals():
    with pytest.raises(ValueError, match="Number of expert types must match num_experts"):
        MoEAttentionConfig(num_experts=3)
    with pytest.raises(ValueError, match="top_k must be <= num_experts"):
        MoEAttentionConfig(top_k=5)
    with pytest.raises(ValueError, match="'curved' is not a valid ExpertType"):
        MoEAttentionConfig(expert_types=["standard", "linear", "linear", "curved"])
    with pytest.raises(ValueError, match="num_heads = 7 does not divide dim = 512"):
        MoEAttentionConfig(num_heads=7)
    with pytest.raises(ValueError, match=r"query must be \[batch, length, dim = 16\], got \[2, 6, 15\]"):
        make()(torch.zeros(B, S, 15))
    with pytest.raises(ValueError, match=r"key must be .* got \[6, 16\]"):
        make()(inputs(), inputs()[0])


@pytest.mark.requirement("R2-33", "R2-39", "C17", "C18")
def test_R2_39_the_output_record():
    attention = make()
    edges = inputs(B, S, S, 3)
    output = attention(inputs(), edge_features=edges, need_weights=True)
    assert output.output.shape == (B, S, D) and output.gates.shape == (B, S, E) and output.indices.shape == (B, S, K)
    torch.testing.assert_close(output.gates.sum(-1), torch.ones(B, S).double())
    assert torch.equal(output.gates.topk(K).indices.sort().values, output.indices.sort().values)
    chosen = set(output.indices.flatten().tolist())
    assert set(output.attention_weights) == chosen
    assert all(weights.shape == (B, 2, S, S) for weights in output.attention_weights.values())
    assert attention(inputs()).attention_weights is None
    cross = attention(inputs(B, 3, D), inputs(), inputs())
    assert cross.output.shape == (B, 3, D)


@pytest.mark.requirement("R2-32", "R2-35", "R2-40", "R2-41", "D12", "D10")
def test_R2_35_the_loss_is_this_passes_and_of_training_alone():
    attention = make(load_balance_coef=0.1)
    assert attention.training and attention.get_aux_loss() == 0
    assert isinstance(attention, AuxLossModule)
    output = attention(inputs())
    assert output.aux_loss > 0
    assert output.aux_loss.item() == attention.get_aux_loss().item() == 0.1 * attention.aux_loss.item()
    attention.get_aux_loss().backward()
    assert attention.mixture.router.weight.grad.abs().max() > 0
    attention.eval()
    assert attention.get_aux_loss() == 0 and attention(inputs()).aux_loss == 0 and attention.z_loss == 0
    attention.train()
    assert attention.get_aux_loss() == 0
    attention.use_aux_loss = False
    assert attention(inputs()).aux_loss == 0
    attention.use_aux_loss, attention.aux_loss_weight = True, 0.5
    assert attention(inputs()).aux_loss.item() == 0.5 * attention.aux_loss.item() > 0


def test_a_context_of_evaluation_in_training_has_no_losses():
    attention = make()
    assert attention(inputs(), ctx=TokenContext.of_rows(B, S, training=False)).aux_loss == 0 == attention.z_loss


@pytest.mark.parametrize("shape", [(0, S, D), (B, 0, D), (0, 0, D)])
def test_empty_batches(shape: tuple[int, ...]):
    attention = make()
    output = attention(inputs(*shape), need_weights=True)
    assert output.output.shape == shape and output.indices.shape == (*shape[:2], K) and output.gates.shape[2] == E
    (output.output.sum() + output.aux_loss).backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in attention.parameters())


def test_the_output_may_be_changed_in_place():
    attention = make()
    output = attention(inputs())
    output.output.add_(inputs())
    (output.output.square().sum() + output.aux_loss).backward()
    assert attention.mixture.router.weight.grad.abs().max() > 0


def test_nothing_keeps_the_graph_alive():
    attention = make()
    output = attention(inputs().requires_grad_())
    graph = weakref.ref(output.output.grad_fn)
    assert attention.aux_loss.grad_fn is not None
    del output
    gc.collect()
    assert graph() is None and attention.aux_loss.grad_fn is None and attention.aux_loss > 0


def test_R2_42_parameters():
    standard = MoEAttentionConfig(expert_types=["standard"] * 4)
    assert MoEAttention(standard, device="meta").num_parameters() == 3_540_740
    assert make().num_parameters() == sum(parameter.numel() for parameter in make().parameters())


def test_R2_04_layers_travel():
    attention = make()
    expected = attention(inputs()).output
    for twin in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        assert torch.equal(twin(inputs()).output, expected)
        assert twin.config == attention.config


@pytest.mark.requirement("R2-26")
def test_R2_26_dropout_acts_in_training_only_and_by_name_where_there_is_one():
    attention = make(dropout=0.5)
    assert not torch.equal(attention(inputs()).output, attention(inputs()).output)
    named = [attention(inputs(), ctx=TokenContext.of_rows(B, S, step=step)).output for step in (1, 1, 2)]
    assert torch.equal(named[0], named[1]) and not torch.equal(named[0], named[2])
    attention.eval()
    assert torch.equal(attention(inputs()).output, attention(inputs()).output)


def test_padding_changes_nothing_and_takes_no_expert():
    attention = make(expert_types=["standard", "hyperbolic", "linear", "standard"])
    padded = torch.cat([inputs(), 9 * torch.ones(B, 2, D).double()], 1)
    valid = torch.arange(S + 2).expand(B, -1) < S
    got = attention(padded, key_valid=valid)
    torch.testing.assert_close(got.output[:, :S], attention(inputs()).output, rtol=0, atol=1e-12)
    assert not got.gates[:, S:].any()


@pytest.mark.requirement("R2-16", "D11", "G12")
def test_R2_16_the_square_of_the_use():
    assert usage_loss(torch.full((3, 5, 4), 0.25)) == 1
    assert usage_loss(torch.eye(4)[:1].expand(7, 4)) == 4
    gates = torch.rand(50, 4, dtype=torch.float64).softmax(1)
    importance = gates.sum(0)
    torch.testing.assert_close(usage_loss(gates), 1 + importance.var(correction=0) / importance.mean() ** 2)
    tokens = torch.arange(100)
    golden = torch.zeros(100, 4).index_put((tokens, tokens % 4), torch.tensor(0.6))
    golden = golden.index_put((tokens, (tokens + 1) % 4), torch.tensor(0.4))
    assert usage_loss(golden).item() == pytest.approx(1.0)


def over_ranks(here: Here, config: MoEAttentionConfig, ep: int) -> dict[str, Tensor]:
    torch.manual_seed(1)
    attention = MoEAttention(config, dtype=torch.float64)
    table = spread(attention, here.mesh_of(ep))
    assert attention.num_parameters() == MoEAttention(config, device="meta").num_parameters()
    x = inputs(here.world * B, S, D).chunk(here.world)[here.rank]
    attention(x, causal=True).output.square().sum().backward()
    table.sum_copies(attention)
    return {name: parameter.grad for name, parameter in attention.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("bank", ["replicated", "gathered"])
def test_ranks_equal_one_process(ranks: Any, bank: Any):
    config = MoEAttentionConfig(
        dim=D, num_heads=2, router_hidden_dim=8, dropout=0.0, bank=bank, capacity=CapacityConfig(factor=None)
    )
    attention = make(edge_dim=16, dropout=0.0)
    attention(inputs(2 * B, S, D), causal=True).output.square().sum().backward()
    for grads in ranks(2).run(over_ranks, config, 2):
        for name, grad in grads.items():
            torch.testing.assert_close(grad, dict(attention.named_parameters())[name].grad, rtol=0, atol=1e-11)
    assert Mesh.alone().ep.size == 1
