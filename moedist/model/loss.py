"""The task loss."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from moedist.model.batch import IGNORE
from moedist.model.contract import ModelOutput

CHUNK_SIZE = 2**25
"""Logits whose log-probabilities are held at once (128 MiB in fp32)."""


def token_loss(output: ModelOutput, target_BS: Tensor) -> Tensor:
    """Sum of the next-token cross-entropy in nats over all positions that have a target: 0-dim, fp32 or wider.

    A sum, not a mean: divided by the number of targets of the whole global batch it is this rank's share of the loss.
    The log-probabilities are made in fp32 or wider, a chunk of positions at a time, and again in backward, so that
    besides the logits themselves at most `CHUNK_SIZE` of them are kept.

    Args:
        output: of the model.
        target_BS: int64 next ids; `IGNORE` where there is none.
    """
    logits_TV = output.logits_BSV.flatten(0, 1)
    target_T = target_BS.flatten()
    chunk_size = max(1, CHUNK_SIZE // logits_TV.shape[1])
    if target_T.numel() <= chunk_size:
        return _summed_cross_entropy(logits_TV, target_T)
    sums = [
        checkpoint(_summed_cross_entropy, logits_RV, target_R, use_reentrant=False, preserve_rng_state=False)
        for logits_RV, target_R in zip(logits_TV.split(chunk_size), target_T.split(chunk_size), strict=True)
    ]
    return torch.stack(sums).sum()


def _summed_cross_entropy(logits_RV: Tensor, target_R: Tensor) -> Tensor:
    wide = torch.promote_types(logits_RV.dtype, torch.float32)
    return cross_entropy(logits_RV.to(wide), target_R, ignore_index=IGNORE, reduction="sum")
