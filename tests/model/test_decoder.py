"""The whole model on one device."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moedist.config import ConfigError
from moedist.model.attention.contract import AttentionContext
from moedist.model.attention.gqa import GQAConfig
from moedist.model.batch import TokenBatch
from moedist.model.contract import ModelOutput
from moedist.model.decoder import Decoder, DecoderConfig
from moedist.model.ffn.contract import FFN, FFNOutput
from moedist.model.layers.contract import LayerSpec
from moedist.model.layers.interleaved import InterleavedConfig
from moedist.model.layers.listed import ListedConfig
from moedist.model.loss import token_loss
from moedist.moe.capacity import CapacityConfig
from moedist.moe.context import TokenContext
from moedist.moe.layer import MoEConfig
from moedist.moe.report import pack_reports
from tests.model.rows import VOCAB_SIZE, batch_of, step_of

CONFIG = DecoderConfig(dim=16, attention=GQAConfig(4, 2), layers=InterleavedConfig(4, first_dense=1, moe_every=2))
DROPLESS = MoEConfig(num_experts=4, capacity=CapacityConfig(factor=None))


def build(config: DecoderConfig = CONFIG, moe: MoEConfig = DROPLESS) -> Decoder:
    return config.build(VOCAB_SIZE, moe, dtype=torch.float64)


def run(model: Decoder, batch: TokenBatch) -> ModelOutput:
    return model(batch, step_of(batch))


def part(batch: TokenBatch, row: int, start: int, size: int) -> TokenBatch:
    """One document as a batch of its own."""
    fields = {
        field.name: getattr(batch, field.name)[row : row + 1, start : start + size]
        for field in dataclasses.fields(batch)
        if field.name not in ("sample_B", "document_BS")
    }
    return TokenBatch(**fields, document_BS=None, sample_B=batch.sample_B[row : row + 1])


def test_names_of_parameters():
    names = [name for name, _ in build().named_parameters()]
    for name in (
        "embedding.weight",
        "blocks.0.attention_norm.weight",
        "blocks.0.attention.query.weight",
        "blocks.0.attention.key_norm.weight",
        "blocks.0.ffn_norm.weight",
        "blocks.0.ffn.gate.weight",
        "blocks.2.ffn.moe.router.weight",
        "norm.weight",
        "head.weight",
    ):
        assert name in names
    assert not list(build().buffers())


def test_output_has_logits_and_a_report_per_moe_block():
    model, batch = build(), batch_of([8], [5, 2], length=8)
    output = run(model, batch)
    assert output.logits_BSV.shape == (2, 8, VOCAB_SIZE)
    assert model.moe_blocks == (2,) and len(output.reports) == 1
    assert output.reports[0].asked_E.sum() == batch.num_tokens() * DROPLESS.router.top_k


def test_equals_the_pre_norm_formula():
    model, batch = build(), batch_of([5], length=5)
    tokens = TokenContext.of_rows(1, 5, num_tokens=batch.num_tokens())
    x_BSD = model.embedding.weight[batch.token_BS]
    for block in model.blocks:
        x_BSD = x_BSD + block.attention(block.attention_norm(x_BSD), AttentionContext.of_batch(batch))
        x_BSD = x_BSD + block.ffn(block.ffn_norm(x_BSD), tokens).out_BSD
    want = model.norm(x_BSD) @ model.head.weight.T
    torch.testing.assert_close(run(model, batch).logits_BSV, want, rtol=1e-12, atol=1e-12)


def test_packed_documents_equal_the_documents_alone():
    model, batch = build(), batch_of([3, 4], [6], length=8)
    output = run(model, batch)
    token_loss(output, batch.target_BS).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for row, start, size in [(0, 0, 3), (0, 3, 4), (1, 0, 6)]:
        document = part(batch, row, start, size)
        alone = run(model, document)
        torch.testing.assert_close(
            alone.logits_BSV, output.logits_BSV[row : row + 1, start : start + size], rtol=1e-12, atol=1e-12
        )
        token_loss(alone, document.target_BS).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-10, atol=1e-12)


def test_the_future_changes_nothing():
    model, batch = build(), batch_of([8], length=8)
    changed = batch.token_BS.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % VOCAB_SIZE
    before = run(model, batch).logits_BSV
    after = run(model, dataclasses.replace(batch, token_BS=changed)).logits_BSV
    torch.testing.assert_close(before[:, :5], after[:, :5], rtol=1e-13, atol=1e-13)
    assert not torch.allclose(before[:, 5], after[:, 5])


@pytest.mark.parametrize("with_documents", [True, False])
def test_padding_changes_nothing(with_documents):
    model = build(moe=dataclasses.replace(DROPLESS, capacity=CapacityConfig(factor=1.0)))
    batch = batch_of([5], [3, 2] if with_documents else [4], length=8)
    if not with_documents:
        batch = dataclasses.replace(batch, document_BS=None)
    other = dataclasses.replace(
        batch, token_BS=torch.where(batch.valid_BS, batch.token_BS, (batch.token_BS + 3) % VOCAB_SIZE)
    )
    assert not torch.equal(batch.token_BS, other.token_BS)
    one, two = run(model, batch), run(model, other)
    assert torch.equal(one.logits_BSV[batch.valid_BS], two.logits_BSV[batch.valid_BS])
    assert torch.equal(one.reports[0].kept_E, two.reports[0].kept_E)
    losses = []
    for output in (one, two):
        model.zero_grad()
        loss = token_loss(output, batch.target_BS) + pack_reports(output.reports).objective()
        loss.backward()
        losses.append((loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=1e-14)


def test_a_tied_head_is_the_embedding():
    tied, untied = build(dataclasses.replace(CONFIG, tie_embeddings=True)), build()
    assert "head.weight" not in tied.state_dict() and tied.head is None
    with torch.no_grad():
        untied.head.weight.copy_(untied.embedding.weight)
    batch = batch_of([6], length=6)
    torch.testing.assert_close(run(tied, batch).logits_BSV, run(untied, batch).logits_BSV)
    for model in (tied, untied):
        token_loss(run(model, batch), batch.target_BS).backward()
    torch.testing.assert_close(
        tied.embedding.weight.grad, untied.embedding.weight.grad + untied.head.weight.grad, rtol=1e-12, atol=1e-12
    )


def test_moe_layers_learn_who_and_when(monkeypatch):
    seen: list[TokenContext] = []

    def record(self: FFN, x_BSD: torch.Tensor, context: TokenContext) -> FFNOutput:
        seen.append(context)
        return FFNOutput(x_BSD, None)

    monkeypatch.setattr("moedist.model.ffn.moe.MoEFFN.forward", record)
    batch = dataclasses.replace(batch_of([2, 1], [4], length=4), sample_B=torch.tensor([40, 17]))
    step = dataclasses.replace(step_of(batch, training=False), seed=9, step=torch.tensor(5))
    build()(batch, step)
    (context,) = seen
    assert context.id_T.tolist() == batch.token_BS.flatten().tolist()
    assert context.valid_T.tolist() == [True, True, True, False, True, True, True, True]
    assert context.sequence_T.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert context.sample_T.tolist() == [40] * 4 + [17] * 4
    assert context.position_T.tolist() == [0, 1, 2, 3] * 2  # place in the row, not in the document
    assert (context.num_sequences, context.seed, context.training) == (2, 9, False)
    assert (context.step.item(), context.num_tokens.item()) == (5, 7)


def test_first_loss_is_that_of_a_guess():
    model, batch = DecoderConfig().build(256, MoEConfig()), batch_of([64], length=64)
    loss = token_loss(run(model, batch), batch.target_BS) / batch.num_targets()
    assert 0 < loss.item() - math.log(256) < 1  # logits start with variance 1, which costs about half a nat


def test_learns_a_sequence_by_heart():
    torch.manual_seed(0)
    model = CONFIG.build(VOCAB_SIZE, MoEConfig(num_experts=4))
    batch = batch_of([16], [9, 7], length=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        output = run(model, batch)
        loss = token_loss(output, batch.target_BS) / batch.num_targets()
        (loss + pack_reports(output.reports).objective()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.3


def test_autocast_keeps_the_loss_wide():
    model, batch = CONFIG.build(VOCAB_SIZE, DROPLESS), batch_of([8], length=8)
    with torch.autocast("cpu", torch.bfloat16):
        output = run(model, batch)
        loss = token_loss(output, batch.target_BS)
    assert output.logits_BSV.dtype == torch.bfloat16 and loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DecoderConfig(dim=0), "^dim = 0 is too small. Set it to 1 or more"),
        (lambda: DecoderConfig(dim=20), "^attention.num_heads = 4 does not split dim = 20 .*Set it to 1, 2, 5 or 10"),
        (
            lambda: DecoderConfig(dim=16, layers=ListedConfig((LayerSpec(), LayerSpec(attention=GQAConfig(3))))),
            "^layers.blocks.1.attention.num_heads = 3 does not split dim = 16",
        ),
    ],
)
def test_errors_say_key_value_and_remedy(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_recomputed_attention_gives_the_same_gradients():
    batch, gradients = batch_of([3, 4], [6], length=8), []
    for recompute in (False, True):
        model = build()
        if recompute:
            for block in model.blocks:
                attention = block.attention
                block.attention.forward = partial(checkpoint, attention.forward, use_reentrant=False)
        token_loss(run(model, batch), batch.target_BS).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))
