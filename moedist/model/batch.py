"""What a model reads in one micro-batch, and when it reads it."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

IGNORE = -100
"""The target of a position that has none: padding, or the last position of a text."""


@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """One micro-batch of packed rows on one rank: B rows of S positions.

    Attributes:
        token_BS: int64 vocabulary ids; any id at padding.
        target_BS: int64 next ids; `IGNORE` where there is none.
        position_BS: int64 position within the document (starts again at 0 with every document), for the attention.
        document_BS: int64 place of the document within the row; attention stays within a document. None where no
            row has more than one and padding only follows the text.
        valid_BS: bool; false at padding. Padding takes no part in routing, capacity, counts or losses.
        sample_B: int64 global index of each row's sample in the order of the run, the same at every world size.
    """

    token_BS: Tensor
    target_BS: Tensor
    position_BS: Tensor
    document_BS: Tensor | None
    valid_BS: Tensor
    sample_B: Tensor

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch on another device; copies run beside the host where its memory is pinned."""
        tensors = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        moved = {k: v.to(device, non_blocking=True) for k, v in tensors.items() if v is not None}
        return dataclasses.replace(self, **moved)

    def num_targets(self) -> Tensor:
        """0-dim int64: positions that enter the task loss."""
        return (self.target_BS != IGNORE).sum()

    def num_tokens(self) -> Tensor:
        """0-dim int64: positions that enter routing and the balance losses."""
        return self.valid_BS.sum()
