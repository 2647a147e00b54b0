"""From counts to quantities: pure functions of numpy arrays.

C stands for any class of tokens (a vocabulary id, a class of bytes, a corpus), E for experts. "OLMoE" is Muennighoff et
al. 2024, arXiv:2409.02060, section 5.
"""

from __future__ import annotations

import numpy as np


def shares(count_CE: np.ndarray) -> np.ndarray:
    """[C, E]: P(expert | class) = n(c, e) / sum over e of n(c, e); 0 for a class that never came.

    1 / E for every expert says that the class means nothing to the router.

    >>> shares(np.array([[3, 1], [0, 0]])).tolist()
    [[0.75, 0.25], [0.0, 0.0]]
    """
    return count_CE / np.maximum(count_CE.sum(1, keepdims=True), 1)


def chosen_by(pair_CE: np.ndarray, top_k: int) -> np.ndarray:
    """[C, E]: the share of a class's tokens that have the expert among their K choices.

    OLMoE's vocabulary specialization, N(x, E_i) / N_x, where a class is a token, and its domain specialization,
    N(E_i, D) / N_D, where it is a corpus. A row sums to K; K / E is chance.

    Args:
        pair_CE: pairs; every token has K of them.
        top_k: K.

    >>> chosen_by(np.array([[4, 3, 1]]), top_k=2).tolist()
    [[1.0, 0.75, 0.25]]
    """
    return shares(pair_CE) * top_k


def mutual_information(pair_CE: np.ndarray) -> float:
    """I(class; expert) in nats: sum of p(c, e) ln(p(c, e) / (p(c) p(e))) over pairs, by their frequencies.

    0 where the class says nothing about the expert, H(expert) where it decides it (Shannon 1948; Cover and Thomas,
    equation 2.28). Few pairs make it look larger than it is: `information_bias`.

    >>> mutual_information(np.array([[2, 2], [3, 3]]))
    0.0
    >>> round(mutual_information(np.array([[5, 0], [0, 5]])), 6)  # ln 2
    0.693147
    """
    total = pair_CE.sum()
    if total == 0:
        return 0.0
    joint_CE = pair_CE / total
    apart_CE = joint_CE.sum(1, keepdims=True) * joint_CE.sum(0, keepdims=True)
    seen_CE = joint_CE > 0
    return float(np.sum(joint_CE[seen_CE] * np.log(joint_CE[seen_CE] / apart_CE[seen_CE])))


def information_bias(pair_CE: np.ndarray) -> float:
    """What `mutual_information` would be about, in nats, if class and expert were independent: (C - 1)(E - 1) / 2N.

    C and E count those that came, N is the number of pairs (Miller 1955). A value not well above it shows nothing.

    >>> information_bias(np.array([[5, 0], [0, 5], [0, 0]]))
    0.05
    """
    classes, experts = int((pair_CE.sum(1) > 0).sum()), int((pair_CE.sum(0) > 0).sum())
    return max(classes - 1, 0) * max(experts - 1, 0) / max(2 * int(pair_CE.sum()), 1)


def entropy(count_E: np.ndarray) -> float:
    """H(expert) in nats of the frequencies; ln E where all are equal.

    >>> round(entropy(np.array([1, 1, 2])), 6)  # 1.5 ln 2
    1.039721
    """
    share_E = count_E[count_E > 0] / max(count_E.sum(), 1)
    return float(-np.sum(share_E * np.log(share_E)))


def coactivation(together_EE: np.ndarray) -> np.ndarray:
    """[E, E]: row i, column j is the share of the tokens with expert i that also have expert j; 0 on the diagonal.

    OLMoE's expert co-activation, N(E_i, E_j) / N(E_i). A row sums to K - 1; (K - 1) / (E - 1) is chance where loads
    are equal.

    >>> coactivation(np.array([[4, 1], [1, 2]])).tolist()
    [[0.0, 0.25], [0.5, 0.0]]
    """
    share_EE = together_EE / np.maximum(np.diag(together_EE)[:, None], 1)
    np.fill_diagonal(share_EE, 0.0)
    return share_EE


def router_saturation(num_shared: int, num_tokens: int, top_k: int) -> float:
    """Mean over tokens of the share of their K experts that two checkpoints have in common.

    OLMoE's router saturation, 1/N sum over tokens of |E(t) and E(T)| / k. 1: the routing has not changed; K / E is
    what two random routers share.

    Args:
        num_shared: sum over tokens of the number of experts in both sets.
        num_tokens: N.
        top_k: K.

    >>> router_saturation(3, num_tokens=2, top_k=2)
    0.75
    """
    return num_shared / max(num_tokens * top_k, 1)


def relative_load(count_PE: np.ndarray) -> np.ndarray:
    """[P, E]: load over the mean load of its row; 1 is balanced, E is one expert that has everything.

    >>> relative_load(np.array([[3, 1]])).tolist()
    [[1.5, 0.5]]
    """
    return shares(count_PE) * count_PE.shape[1]
