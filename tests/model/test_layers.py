"""Which blocks a model has."""

from __future__ import annotations

import pytest

from moedist.config import ConfigError
from moedist.model.attention.gqa import GQAConfig
from moedist.model.decoder import DecoderConfig
from moedist.model.ffn.dense import DenseConfig
from moedist.model.ffn.moe import MoEFFNConfig
from moedist.model.layers.contract import LayerSpec
from moedist.model.layers.interleaved import InterleavedConfig
from moedist.model.layers.listed import ListedConfig
from moedist.model.norm.rmsnorm import RMSNormConfig
from moedist.moe.layer import MoEConfig


@pytest.mark.requirement("R3-17")
@pytest.mark.parametrize(
    ("config", "pattern"),
    [
        (InterleavedConfig(4), "MMMM"),
        (InterleavedConfig(4, first_dense=1), "DMMM"),
        (InterleavedConfig(6, moe_every=2), "DMDMDM"),
        (InterleavedConfig(8, first_dense=1, moe_every=3), "DDDMDDMD"),
        (InterleavedConfig(3, first_dense=2), "DDM"),
    ],
)
def test_interleaved_pattern(config, pattern):
    assert "".join("M" if spec.ffn else "D" for spec in config.specs()) == pattern
    model = DecoderConfig(dim=16, layers=config).build(5, MoEConfig(), device="meta")
    assert model.moe_blocks == tuple(index for index, kind in enumerate(pattern) if kind == "M")
    assert [block.ffn.moe.layer for block in model.blocks if block.ffn.has_report] == list(model.moe_blocks)


def test_listed_blocks_repeat_and_bring_their_own_parts():
    own = LayerSpec(1, GQAConfig(2, 1), DenseConfig(24), RMSNormConfig(eps=0.5))
    layers = ListedConfig((LayerSpec(repeat=2), own, LayerSpec(ffn=MoEFFNConfig())))
    config = DecoderConfig(dim=16, ffn=DenseConfig(40), layers=layers)
    model = config.build(5, MoEConfig(), device="meta")
    assert model.moe_blocks == (3,)
    assert [block.ffn.up.weight.shape[0] for block in model.blocks[:3]] == [40, 40, 24]
    assert [block.attention.num_heads for block in model.blocks] == [4, 4, 2, 4]
    assert [block.ffn_norm.eps for block in model.blocks] == [1e-6, 1e-6, 0.5, 1e-6]
    assert model.norm.eps == 1e-6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InterleavedConfig(0), "num_layers = 0 is too small. Set"),
        (lambda: InterleavedConfig(first_dense=-1), "first_dense = -1 is negative. Set"),
        (lambda: InterleavedConfig(moe_every=0), "moe_every = 0 is too small. Set"),
        (lambda: InterleavedConfig(2, first_dense=2), "num_layers = 2 leaves no block .* Set it to 3 or more"),
        (lambda: InterleavedConfig(3, 1, 3), "num_layers = 3 leaves no block .* moe_every = 3. Set it to 4 or more"),
        (lambda: ListedConfig(()), r"blocks = \(\) lists no block. List at least one"),
        (lambda: LayerSpec(repeat=0), "repeat = 0 is too small. Set"),
    ],
)
def test_errors_say_key_value_and_remedy(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
