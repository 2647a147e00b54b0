"""What a model without context would reach: the line that a trained one must get below."""

from __future__ import annotations

import numpy as np

from moedist.data.contract import Documents, Source

CHUNK = 1 << 22


def bigram_cross_entropy(source: Source, alpha: float = 1.0) -> float | None:
    """Held-out cross-entropy of an add-``alpha`` smoothed bigram model fitted on the training part.

    p(next | previous) = (count(previous, next) + alpha) / (count(previous) + alpha x vocabulary). Pairs that span two
    documents enter neither the fit nor the measure, as in the loader.

    Returns:
        Nats per token, which at byte level is nats per byte; None where the source is not byte-level or holds
        nothing out.
    """
    if not source.byte_level:
        return None
    train_VV = _pair_counts(source.documents("train"), source.vocab_size)
    valid_VV = _pair_counts(source.documents("valid"), source.vocab_size)
    if valid_VV.sum() == 0:
        return None
    smoothed_VV = train_VV + alpha
    log_p_VV = np.log(smoothed_VV) - np.log(smoothed_VV.sum(axis=1, keepdims=True))
    return float(-(valid_VV * log_p_VV).sum() / valid_VV.sum())


def _pair_counts(documents: Documents, vocab_size: int) -> np.ndarray:
    """int64 ``[V, V]``: how often each id (row) is followed by each (column) within a document."""
    assert documents.start_G is not None, "byte-level sources know where their documents begin"
    token_N = np.concatenate(documents.parts)
    count_P = np.zeros(vocab_size * vocab_size, np.int64)
    for start in range(0, len(token_N) - 1, CHUNK):
        pair_N = token_N[start : start + CHUNK + 1].astype(np.int64)
        count_P += np.bincount(pair_N[:-1] * vocab_size + pair_N[1:], minlength=len(count_P))
    begin_G = documents.start_G[1:]
    spanning_G = token_N[begin_G - 1].astype(np.int64) * vocab_size + token_N[begin_G]
    count_P -= np.bincount(spanning_G, minlength=len(count_P))
    return count_P.reshape(vocab_size, vocab_size)
