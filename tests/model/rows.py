"""Batches written as the lengths of their documents."""

from __future__ import annotations

import torch

from moedist.model.batch import IGNORE, TokenBatch
from moedist.model.contract import StepContext

VOCAB_SIZE = 11


def batch_of(*rows: list[int], length: int, seed: int = 0) -> TokenBatch:
    """One row per list of document lengths, padded at the end to ``length``; targets stay inside documents."""
    token_BS = torch.randint(VOCAB_SIZE, (len(rows), length), generator=torch.Generator().manual_seed(seed))
    target_BS = torch.full_like(token_BS, IGNORE)
    position_BS, document_BS = torch.zeros_like(token_BS), torch.full_like(token_BS, -1)
    for row, lengths in enumerate(rows):
        start = 0
        for document, size in enumerate(lengths):
            end = start + size
            target_BS[row, start : end - 1] = token_BS[row, start + 1 : end]
            position_BS[row, start:end] = torch.arange(size)
            document_BS[row, start:end] = document
            start = end
    return TokenBatch(
        token_BS=token_BS,
        target_BS=target_BS,
        position_BS=position_BS,
        document_BS=document_BS,
        valid_BS=document_BS >= 0,
        sample_B=torch.arange(len(rows)),
    )


def step_of(batch: TokenBatch, training: bool = True) -> StepContext:
    """The first step of a run whose global batch is ``batch``."""
    return StepContext(seed=0, step=torch.tensor(0), num_tokens=batch.num_tokens(), training=training)
