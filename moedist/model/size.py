"""How large a model is and what a token costs, counted on the model itself; the meta device is enough.

Count before a model is spread over ranks: afterwards a rank holds its own experts only.
"""

from __future__ import annotations

import dataclasses
from fractions import Fraction

from moedist.model.attention.contract import Attention
from moedist.model.contract import LanguageModel
from moedist.model.ffn.contract import FFN


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """Exact numbers of parameters.

    Attributes:
        total: all, a shared one once.
        active: those that one token meets: of the experts the chosen ones; with both embeddings, as active counts are
            published.
        active_matmul: of the active ones those that a token is multiplied with: no input embedding unless it is the
            head as well, no norms, no biases.
    """

    total: int
    active: int
    active_matmul: int


def model_size(model: LanguageModel) -> ModelSize:
    """Counts the parameters of a whole, unspread model.

    >>> from moedist.model.decoder import DecoderConfig
    >>> from moedist.moe.layer import MoEConfig
    >>> size = model_size(DecoderConfig().build(256, MoEConfig(), device="meta"))
    """
    share_of = _active_shares(model)
    total, active, active_matmul = 0, Fraction(), Fraction()
    for name, parameter in model.named_parameters():
        share = next((share for prefix, share in share_of.items() if name.startswith(prefix)), Fraction(1))
        total += parameter.numel()
        active += share * parameter.numel()
        if parameter.ndim >= 2 and not name.endswith("bias") and name not in model.looked_up:
            active_matmul += share * parameter.numel()
    return ModelSize(total, int(active), int(active_matmul))


def train_flops_per_token(model: LanguageModel, length: int) -> float:
    """FLOPs of one token's forward and backward pass, the numerator of MFU.

    ``6 * active_matmul + 3 * sum over attentions of score_flops(length)``: a matmul costs two FLOPs per parameter
    forward and four backward; attention's scores and weighted sums cost ``2 * heads * head_dim * length`` forward (two
    matmuls, of which causality leaves half) and twice that backward (PaLM, Chowdhery et al. 2022, appendix B, which
    counts without causality). Recomputation is not counted.

    Args:
        model: whole, unspread.
        length: positions per document (S where a row is one document).
    """
    score_flops = sum(module.score_flops(length) for module in model.modules() if isinstance(module, Attention))
    return 6 * model_size(model).active_matmul + 3 * score_flops


def _active_shares(model: LanguageModel) -> dict[str, Fraction]:
    """Share of the parameters below a name prefix that one token meets."""
    return {
        f"{name}.{child}.": share
        for name, module in model.named_modules()
        if isinstance(module, (Attention, FFN))
        for child, share in module.active_shares().items()
    }
