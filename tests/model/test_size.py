"""Counts against published ones and against hand sums."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moedist.model.attention.gqa import GQAConfig
from moedist.model.decoder import DecoderConfig
from moedist.model.ffn.dense import DenseConfig
from moedist.model.layers.contract import LayerSpec
from moedist.model.layers.interleaved import InterleavedConfig
from moedist.model.layers.listed import ListedConfig
from moedist.model.loss import token_loss
from moedist.model.size import ModelSize, model_size, train_flops_per_token
from moedist.moe.experts.grouped import GroupedConfig
from moedist.moe.layer import MoEConfig
from moedist.moe.router.topk import TopKConfig
from tests.model.rows import VOCAB_SIZE, batch_of, step_of


def moe_of(num_experts: int, top_k: int, hidden_dim: int) -> MoEConfig:
    return MoEConfig(num_experts, router=TopKConfig(top_k=top_k), experts=GroupedConfig(hidden_dim=hidden_dim))


PUBLISHED = {
    # name: model, vocabulary, moe, total (of the published weights), active in billions as published
    "mixtral_8x7b": (
        DecoderConfig(4096, GQAConfig(32, 8, qk_norm=None), layers=InterleavedConfig(32)),
        32_000,
        moe_of(8, 2, 14_336),
        46_702_792_704,
        12.9,
    ),
    "qwen3_30b_a3b": (
        DecoderConfig(2048, GQAConfig(32, 4, 128, qk_norm="head"), layers=InterleavedConfig(48)),
        151_936,
        moe_of(128, 8, 768),
        30_532_122_624,
        3.35,
    ),
    "olmoe_1b_7b": (
        DecoderConfig(2048, GQAConfig(16, qk_norm="projection"), layers=InterleavedConfig(16)),
        50_304,
        moe_of(64, 8, 1024),
        6_919_161_856,
        1.28,
    ),
}


@pytest.mark.pitfall("36")
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name):
    config, vocab_size, moe, total, active = PUBLISHED[name]
    size = model_size(config.build(vocab_size, moe, device="meta"))
    assert size.total == total
    assert round(size.active / 1e9, 2 if active < 10 else 1) == active


SMALL = DecoderConfig(16, GQAConfig(2, 1, qk_norm=None), DenseConfig(24), layers=InterleavedConfig(2, moe_every=2))
SMALL_MOE = dataclasses.replace(moe_of(8, 2, 12), shared_hidden_dim=10)


def test_small_model_by_hand():
    attention = 16 * 16 + 2 * 8 * 16 + 16 * 16
    dense, expert, shared, router = 3 * 16 * 24, 3 * 16 * 12, 3 * 16 * 10, 16 * 8
    embedding, norms = 11 * 16, 5 * 16
    matmul = 2 * attention + dense + 2 * expert + shared + router + embedding
    model = SMALL.build(11, SMALL_MOE, device="meta")
    assert model_size(model) == ModelSize(
        total=matmul + 6 * expert + embedding + norms, active=matmul + embedding + norms, active_matmul=matmul
    )
    score_flops = 2 * (2 * 2 * 16 * 32 / 2)  # 2 layers; 2 matmuls of 2 FLOPs; 2 heads of 8; half of 32 positions seen
    assert train_flops_per_token(model, 32) == 6 * matmul + 3 * score_flops


def test_a_tied_head_is_counted_once_and_multiplied_with():
    untied = model_size(SMALL.build(11, SMALL_MOE, device="meta"))
    tied = model_size(dataclasses.replace(SMALL, tie_embeddings=True).build(11, SMALL_MOE, device="meta"))
    assert tied == ModelSize(untied.total - 11 * 16, untied.active - 11 * 16, untied.active_matmul)


def test_biases_and_norms_enter_no_matmul():
    biased = dataclasses.replace(SMALL, attention=GQAConfig(2, 1, qk_norm="head", bias=True))
    moe = dataclasses.replace(SMALL_MOE, experts=GroupedConfig(hidden_dim=12, bias=True))
    plain = model_size(SMALL.build(11, SMALL_MOE, device="meta"))
    assert model_size(biased.build(11, moe, device="meta")).active_matmul == plain.active_matmul


def test_formula_equals_the_flops_that_torch_counts():
    config = dataclasses.replace(SMALL, layers=ListedConfig((LayerSpec(repeat=2),)))
    model = config.build(VOCAB_SIZE, SMALL_MOE)
    batch = dataclasses.replace(batch_of([32], [32], length=32), document_BS=None)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        token_loss(model(batch, step_of(batch)), batch.target_BS).backward()
    matmul = 6 * model_size(model).active_matmul
    # torch computes the whole square of scores; causality leaves half.
    whole_square = matmul + 2 * (train_flops_per_token(model, 32) - matmul)
    assert counter.get_total_flops() == 2 * 32 * whole_square
