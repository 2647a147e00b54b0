"""What a mixture of attention experts is made of: its defaults, its parts, their sizes, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moedist.config import ConfigError
from moedist.launch.choices import list_choices
from moedist.model.attention.experts.contract import AttentionExpertConfig, ExpertSite, Sight
from moedist.model.attention.experts.edge_featured import EdgeFeaturedConfig
from moedist.model.attention.experts.hyperbolic import HyperbolicConfig
from moedist.model.attention.experts.linear import LinearConfig
from moedist.model.attention.experts.standard import StandardConfig
from moedist.model.attention.mixture import AttentionMixture, MixtureConfig
from moedist.moe.balance.switch import SwitchConfig
from moedist.moe.capacity import CapacityConfig
from moedist.moe.context import TokenContext
from moedist.moe.init import named_draw
from moedist.moe.report import pack_reports
from moedist.moe.router.mlp import MLPConfig

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "routing.json").read_text())
KINDS = (StandardConfig(), HyperbolicConfig(), LinearConfig(), EdgeFeaturedConfig(edge_dim=5))
STANDARD = MixtureConfig(num_heads=8, experts=(StandardConfig(),) * 4)
SMALL = MixtureConfig(num_heads=2, experts=KINDS, router=MLPConfig(hidden_dim=6))


def build(config: MixtureConfig = SMALL, dim: int = 8) -> AttentionMixture:
    mixture = config.build_mixture(dim, dtype=torch.float64)
    mixture.init_weights(named_draw(0))
    return mixture


def run(mixture: AttentionMixture, sequences: int = 2, length: int = 6, training: bool = True, **kwargs: bool):
    draw = torch.Generator().manual_seed(0)
    x_BSD = torch.randn(sequences, length, mixture.site.dim, dtype=torch.float64, generator=draw)
    sight = Sight(edges=torch.randn(sequences, length, length, 5, dtype=torch.float64, generator=draw))
    ctx = TokenContext.of_rows(sequences, length, training=training)
    return mixture(x_BSD, x_BSD, x_BSD, sight, ctx, **kwargs)


def test_R2_01_four_kinds():
    assert {"standard", "hyperbolic", "linear", "edge_featured"} <= set(list_choices(AttentionExpertConfig))


def test_R2_03_a_kind_can_be_compared_and_copied():
    for kind in KINDS:
        assert copy.copy(kind) == copy.deepcopy(kind) == dataclasses.replace(kind) == kind
        assert all((kind == other) == (kind.kind == other.kind) for other in KINDS)


def test_R2_07_an_expert_tells_its_kind_width_and_size():
    for config in KINDS:
        expert = config.build(ExpertSite(8, 2))
        assert config.kind in ("standard", "hyperbolic", "linear", "edge_featured") and expert.output_dim == 8
        assert expert.num_parameters == sum(parameter.numel() for parameter in expert.parameters()) >= 3 * 64
    assert StandardConfig().build(ExpertSite(8, 2)).num_parameters == 3 * 64


@pytest.mark.requirement("R2-19", "R2-20", "R2-21", "R2-22", "R2-23", "R2-24", "R2-25", "C16")
def test_R2_18_defaults():
    config = MixtureConfig()
    assert (config.num_experts, config.router.top_k) == (4, 2)
    assert (config.router.kind, config.router.hidden_dim, config.router.temperature) == ("mlp", 256, 1.0)
    assert config.balance["switch"].coefficient == 0.01
    repeated = MixtureConfig(experts=(LinearConfig(), LinearConfig(), StandardConfig()))
    assert repeated.num_experts == 3
    with pytest.raises(ValueError, match="num_heads"):
        MixtureConfig(num_heads=7).build_mixture(512, device="meta")


def test_R2_27_every_field_alone():
    changes = {
        "num_heads": 2,
        "experts": KINDS,
        "router": MLPConfig(hidden_dim=3, temperature=2.0),
        "capacity": CapacityConfig(factor=2.0),
        "balance": {"switch": SwitchConfig(0.1)},
        "bank": "replicated",
    }
    for name, value in changes.items():
        changed = MixtureConfig(**{name: value})
        for field in dataclasses.fields(MixtureConfig):
            expected = value if field.name == name else getattr(MixtureConfig(), field.name)
            assert getattr(changed, field.name) == expected


@pytest.mark.requirement("R2-28")
def test_R2_29_more_choices_than_experts():
    """Their number is the length of their list, so the two cannot differ; an empty list is refused."""
    with pytest.raises(ConfigError, match="top_k = 5 is more than the 4 experts"):
        MixtureConfig(router=MLPConfig(top_k=5))
    with pytest.raises(ConfigError, match="lists no expert"):
        MixtureConfig(experts=())


@pytest.mark.requirement("R2-47")
def test_R2_30_a_router_and_one_expert_of_each_kind_listed():
    mixture = build(dataclasses.replace(SMALL, experts=(*KINDS, StandardConfig())))
    assert [type(expert) for expert in mixture.bank.experts.values()] == [
        type(config.build(ExpertSite(8, 2))) for config in (*KINDS, StandardConfig())
    ]
    assert mixture.router.num_experts == 5
    output = run(mixture)
    assert (output.report.kept_E > 0).all(), "all of them in one output"
    assert output.out_BQD.isfinite().all()


def test_R2_31_one_output_projection():
    mixture = STANDARD.build_mixture(512)
    mixture.init_weights(named_draw(0))
    assert mixture.output_weight.numel() + mixture.output_bias.numel() == GOLDEN["G8"]["attention_default"]["output"]
    assert 0.98 * 0.076547 < mixture.output_weight.abs().max().item() <= 0.076547 * (1 + 1e-5)
    assert not mixture.output_bias.any()


@pytest.mark.requirement("G8")
def test_R2_42_parameters_of_router_experts_and_projection():
    mixture, case = STANDARD.build_mixture(512, device="meta"), GOLDEN["G8"]["attention_default"]
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in mixture.named_children()}
    assert count["router"] == case["router"] and count["bank"] == 4 * case["standard_expert"]
    total = sum(parameter.numel() for parameter in mixture.parameters())
    assert total == count["router"] + count["bank"] + case["output"] == case["total_if_all_four_3D2"]


@pytest.mark.requirement("R2-35", "R2-40", "R2-41", "D12")
def test_R2_32_the_loss_is_of_this_pass_and_of_training_alone():
    """Nothing is kept: evaluation after training has no loss, and training's carries gradient to the router."""
    mixture = build()
    assert mixture.training
    trained = run(mixture)
    loss = pack_reports([trained.report]).objective()
    assert loss > 0
    loss.backward()
    assert mixture.router.weight.grad.abs().max() > 0
    assert run(mixture, training=False).report.losses == {}
    assert run(mixture).report.losses["switch"].item() == trained.report.losses["switch"].item()


@pytest.mark.requirement("R2-05", "C18")
def test_R2_33_queries_keys_values_and_edges():
    """Cross attention has other numbers of queries and keys; wrong widths are refused."""
    mixture = build()
    query, key = torch.randn(2, 3, 8).double(), torch.randn(2, 7, 8).double()
    for edges in (None, torch.randn(2, 3, 7, 5).double()):
        output = mixture(query, key, key, Sight(edges=edges), TokenContext.of_rows(2, 3), need_weights=True)
        assert output.out_BQD.shape == (2, 3, 8)
        assert all(weights.shape == (2, 2, 3, 7) for weights in output.weights.values())
    ctx = TokenContext.of_rows(2, 3)
    with pytest.raises(ValueError, match="the query is 5 wide, and the mixture was built for 8"):
        mixture(query[..., :5], key, key, Sight(), ctx)
    with pytest.raises(ValueError, match="the value is 6 wide"):
        mixture(query, key, key[..., :6], Sight(), ctx)
    with pytest.raises(ValueError, match=r"keys \(2, 7, 8\) and values \(2, 6, 8\) do not go together"):
        mixture(query, key, key[:, :6], Sight(), ctx)
    with pytest.raises(ValueError, match="edge"):
        mixture(query, key, key, Sight(edges=torch.randn(2, 3, 7, 4).double()), ctx)


def test_G15_what_attention_weights_take():
    """B H Q S numbers per expert, so they come on request alone."""
    weights = run(build(), need_weights=True).weights
    assert all(value.numel() == 2 * 2 * 6 * 6 for value in weights.values())
    case, of_all = GOLDEN["G15"], 32 * 4 * 8 * 128 * 128
    assert of_all == case["attn_weights_elems"] and of_all * 4 / 2**20 == case["attn_weights_MiB_f32"]
    assert of_all * (4096 / 128) ** 2 * 4 / 2**30 == case["attn_weights_GiB_f32_S4096"]


def test_R2_56_cost_of_routing():
    """D H + H E products per query, H being the router's hidden width; a product is two FLOPs."""
    mixture = build()
    with FlopCounterMode(display=False) as counter:
        mixture.router(torch.randn(12, 8, dtype=torch.float64), TokenContext.of_rows(2, 6))
    assert counter.get_total_flops() == 2 * 12 * (8 * 6 + 6 * 4)


def computed_rows(num_experts: int, top_k: int) -> tuple[int, int]:
    """Query rows that went through experts of one sequence of 32, and pairs that were kept."""
    router, seen = MLPConfig(hidden_dim=6, top_k=top_k), []
    mixture = build(MixtureConfig(num_heads=2, experts=(StandardConfig(),) * num_experts, router=router), 16)
    for expert in mixture.bank.experts.values():
        expert.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[:2].numel()))
    kept = run(mixture, 1, 32).plan.kept_E
    return sum(seen), int(kept.sum())


def test_R2_58_memory():
    """Parameters of router, experts and projection; what is computed, and kept for backward, grows with K, not E."""
    config = MixtureConfig(num_heads=2, experts=(StandardConfig(),) * 4, router=MLPConfig(hidden_dim=6))
    parts = dict(config.build_mixture(16, device="meta").named_children())
    count = {name: sum(parameter.numel() for parameter in parts[name].parameters()) for name in ("router", "bank")}
    assert count == {"router": 16 * 6 + 6 + 6 * 4 + 4, "bank": 4 * 3 * 16**2}
    assert computed_rows(4, 1) == (32, 32)
    assert computed_rows(4, 2) == computed_rows(8, 2) == (64, 64)
