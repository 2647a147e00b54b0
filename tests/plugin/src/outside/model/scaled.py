"""A model family of its own: the decoder with its logits capped (Gemma 2, section 2: ``cap * tanh(logits / cap)``)."""

from __future__ import annotations

import dataclasses
from typing import Any

from moedist.model.batch import TokenBatch
from moedist.model.contract import ModelOutput, StepContext
from moedist.model.decoder import Decoder, DecoderConfig
from moedist.model.init import init_weights
from moedist.moe.layer import MoEConfig


@dataclasses.dataclass(frozen=True)
class ScaledConfig(DecoderConfig):
    cap: float = 30.0

    def build(self, vocab_size: int, moe: MoEConfig, *, device: Any = None, dtype: Any = None) -> Scaled:
        model = Scaled(self, vocab_size, moe, device, dtype)
        model.cap = self.cap
        if not model.embedding.weight.is_meta:
            init_weights(model, seed=0)
        return model


class Scaled(Decoder):
    cap: float

    def forward(self, batch: TokenBatch, context: StepContext) -> ModelOutput:
        output = super().forward(batch, context)
        return output._replace(logits_BSV=self.cap * (output.logits_BSV / self.cap).tanh())
