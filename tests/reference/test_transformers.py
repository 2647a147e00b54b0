"""The presets of published models against the routers of the installed transformers library, on fresh random inputs."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moedist.moe.context import TokenContext
from moedist.moe.report import pack_reports
from tests.moe.by_hand import preset_config

pytestmark = pytest.mark.slow
NUM_TOKENS, DIM = 300, 24


def library_router(name: str):
    """The library's router with random weights, and its sizes as the preset says them."""
    if name == "mixtral":
        from transformers.models.mixtral.configuration_mixtral import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

        return MixtralTopKRouter(MixtralConfig(hidden_size=DIM))
    if name == "olmoe":
        from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
        from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter

        return OlmoeTopKRouter(OlmoeConfig(hidden_size=DIM))
    if name == "qwen3_moe":
        from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

        # The class's default leaves the gates as they are; every published checkpoint sets norm_topk_prob.
        return Qwen3MoeTopKRouter(Qwen3MoeConfig(hidden_size=DIM, norm_topk_prob=True))
    from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    return DeepseekV3TopkRouter(DeepseekV3Config(hidden_size=DIM))


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen3_moe", "deepseek_v3"])
def test_indices_and_weights(name):
    seed = torch.seed() % 2**31
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    theirs = library_router(name)
    layer = preset_config(name).build(DIM, device="meta")
    ours = layer.router.to_empty(device="cpu")
    weight_ED = torch.randn(theirs.weight.shape, generator=generator) * DIM**-0.5
    with torch.no_grad():
        theirs.weight.copy_(weight_ED)
        ours.weight.copy_(weight_ED)
        if name == "deepseek_v3":
            bias_E = 0.1 * torch.randn(theirs.num_experts, generator=generator)
            theirs.e_score_correction_bias.copy_(bias_E)
            ours.selection_bias.copy_(bias_E)
    x_TD = torch.randn(NUM_TOKENS, DIM, generator=generator)
    with torch.no_grad():
        logits_TE, weight_TK, index_TK = theirs(x_TD)
        routing = ours(x_TD, TokenContext.of_rows(1, NUM_TOKENS))
    assert index_TK.shape == (NUM_TOKENS, preset_config(name).router.top_k)
    torch.testing.assert_close(routing.logits_TE, logits_TE, atol=1e-6, rtol=1e-6)

    def dense(index_TK: torch.Tensor, gate_TK: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(logits_TE).scatter(1, index_TK, gate_TK)

    got_TE = dense(routing.expert_N.view_as(index_TK), routing.gate_N.view_as(weight_TK))
    expected_TE = dense(index_TK, weight_TK)
    assert torch.equal(got_TE > 0, expected_TE > 0), "other experts were chosen"
    torch.testing.assert_close(got_TE, expected_TE, atol=1e-6, rtol=1e-5)
    if name != "deepseek_v3":  # theirs asks for no order there
        assert torch.equal(routing.expert_N.view_as(index_TK), index_TK)


@pytest.mark.parametrize("padded", [False, True])
def test_pooled_switch_loss(padded):
    """`load_balancing_loss_func` doesn't divide its shares of pairs by K: with the coefficient times K ours is it."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    num_layers, rows, length, num_experts, top_k = 3, 4, 25, 8, 2
    logits_LTE = torch.randn(num_layers, rows * length, num_experts, dtype=torch.float64, requires_grad=True)
    lengths_B = torch.tensor([25, 9, 1, 17]) if padded else torch.full((rows,), length)
    mask_BS = (torch.arange(length) < lengths_B[:, None]).long()
    theirs = load_balancing_loss_func(tuple(logits_LTE), num_experts, top_k, mask_BS if padded else None)
    moe = preset_config("mixtral")
    config = dataclasses.replace(moe.balance["switch"], coefficient=top_k * 0.02, layers="pooled")
    ctx = TokenContext.of_rows(rows, length, valid_T=mask_BS.flatten().bool())
    reports = []
    for logits_TE in logits_LTE:
        layer = dataclasses.replace(moe, balance={"switch": config}).build(num_experts, dtype=torch.float64)
        with torch.no_grad():
            layer.router.weight.copy_(torch.eye(num_experts))
        reports.append(layer(logits_TE, ctx).report)
    packed = pack_reports(reports)
    assert top_k * packed.loss_LJ.mean().item() == pytest.approx(theirs.item(), abs=1e-6)
    assert packed.objective().item() == pytest.approx(0.02 * theirs.item(), abs=1e-8)
    ours, expected = (torch.autograd.grad(value, logits_LTE)[0] for value in (packed.objective(), 0.02 * theirs))
    torch.testing.assert_close(ours, expected, atol=1e-8, rtol=1e-4)
