"""The result of an analysis: quantities by corpus and layer, as plain data for ``analysis.json`` and the page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from moedist.analyze.counts import CorpusCounts, Excerpt, LayerCounts, position_bins
from moedist.analyze.quantities import (
    chosen_by,
    coactivation,
    entropy,
    information_bias,
    mutual_information,
    relative_load,
    router_saturation,
    shares,
)
from moedist.analyze.vocabulary import CLASSES, Vocabulary

FORMAT = 1
MIN_SEEN = 10
"""How often a token must have come to be named among those of an expert."""
MOST_TOKENS = 12
"""Tokens that are named for each expert."""


def corpus_result(counts: CorpusCounts, vocabulary: Vocabulary) -> dict[str, Any]:
    """What there is to say of one corpus."""
    return {
        "tokens": counts.num_tokens,
        "classes": list(CLASSES),
        "positions": _position_ranges(counts.sequence_length),
        "layers": {str(block): layer_result(layer, vocabulary) for block, layer in counts.layers.items()},
        "excerpt": _excerpt(counts.excerpt, vocabulary),
    }


def layer_result(counts: LayerCounts, vocabulary: Vocabulary) -> dict[str, Any]:
    """What there is to say of one MoE layer on one corpus.

    Informations are in nats, with what chance would give (``*_bias``) and H(expert), their largest possible value.
    """
    pair_VE, K = counts.pair_VE.numpy(), counts.top_k
    pair_CE = vocabulary.by_class(pair_VE)
    load_E = pair_VE.sum(0)
    return {
        "load": load_E.tolist(),
        "first": counts.first_E.tolist(),
        "share_of_tokens": _rounded(chosen_by(load_E[None], K)[0]),
        "class_pairs": pair_CE.tolist(),
        "class_shares": _rounded(shares(pair_CE)),
        "expert_entropy": round(entropy(load_E), 6),
        "token_information": round(mutual_information(pair_VE), 6),
        "token_information_bias": round(information_bias(pair_VE), 6),
        "class_information": round(mutual_information(pair_CE), 6),
        "class_information_bias": round(information_bias(pair_CE), 6),
        "coactivation": _rounded(coactivation(counts.together_EE.numpy())),
        "position_load": _rounded(relative_load(counts.position_PE.numpy())),
        "tokens": favourite_tokens(pair_VE, K, vocabulary),
    }


def favourite_tokens(pair_VE: np.ndarray, top_k: int, vocabulary: Vocabulary) -> list[list[dict[str, Any]]]:
    """For each expert the tokens that choose it most (`chosen_by`), of those that came `MIN_SEEN` times or more."""
    share_VE = chosen_by(pair_VE, top_k)
    seen_V = pair_VE.sum(1) // top_k
    share_VE[seen_V < MIN_SEEN] = 0
    found = []
    for expert in range(pair_VE.shape[1]):
        best = np.argsort(-share_VE[:, expert], kind="stable")[:MOST_TOKENS]
        found.append(
            [
                {"id": v, "text": vocabulary.texts[v], "share": round(float(share_VE[v, expert]), 4), "seen": seen}
                for v, seen in zip(best.tolist(), seen_V[best].tolist(), strict=True)
                if share_VE[v, expert] > 0
            ]
        )
    return found


def domains(counts: Mapping[str, CorpusCounts]) -> dict[str, Any]:
    """Domain specialization by layer, [corpus][expert]: of all K choices and of the first one alone (k = 1)."""
    blocks = next(iter(counts.values())).layers
    found = {}
    for block, layer in blocks.items():
        all_DE = np.stack([corpus.layers[block].pair_VE.sum(0).numpy() for corpus in counts.values()])
        first_DE = np.stack([corpus.layers[block].first_E.numpy() for corpus in counts.values()])
        found[str(block)] = {
            "all": _rounded(chosen_by(all_DE, layer.top_k)),
            "first": _rounded(chosen_by(first_DE, 1)),
            "information": round(mutual_information(all_DE), 6),
            "information_bias": round(information_bias(all_DE), 6),
        }
    return {"corpora": list(counts), "layers": found}


def saturation(
    shared: Mapping[int, Mapping[int, int]], num_tokens: int, top_k: Mapping[int, int]
) -> dict[str, dict[str, float]]:
    """Router saturation by the other checkpoint's step and by layer.

    Args:
        shared: by step and block: experts in both sets of choices, summed over tokens.
        num_tokens: of all corpora.
        top_k: K by block.
    """
    return {
        str(step): {
            str(block): round(router_saturation(number, num_tokens, top_k[block]), 6) for block, number in found.items()
        }
        for step, found in sorted(shared.items())
    }


def _position_ranges(length: int) -> list[int]:
    """The first position of each range: position p lies in range p * bins // length."""
    bins = position_bins(length)
    return [math.ceil(place * length / bins) for place in range(bins)]


def _excerpt(excerpt: Excerpt, vocabulary: Vocabulary) -> dict[str, Any]:
    """Rows of texts, and the choices of each of their tokens by layer."""
    rows = [[token for token in row if token >= 0] for row in excerpt.id_BS.tolist()]
    layers = {
        str(block): [row[: len(ids)] for row, ids in zip(expert_BSK.tolist(), rows, strict=True) if ids]
        for block, expert_BSK in excerpt.expert_BSK.items()
    }
    return {"rows": [[vocabulary.texts[token] for token in row] for row in rows if row], "experts": layers}


def _rounded(array: np.ndarray) -> Any:
    return np.round(array, 5).tolist()
