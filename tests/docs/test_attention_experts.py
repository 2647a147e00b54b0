"""The page on attention experts says what they do."""

from __future__ import annotations

import contextlib
import re

import torch

from moedist.config import ConfigError
from moedist.model.attention.experts.contract import ExpertSite, Sight
from moedist.model.attention.experts.edge_featured import EdgeFeaturedConfig
from moedist.model.attention.experts.hyperbolic import HyperbolicConfig
from moedist.model.attention.experts.linear import LinearConfig
from moedist.model.attention.experts.standard import StandardConfig
from moedist.moe.init import named_draw
from tests.docs.pages import ROOT, blocks

PAGE = ROOT / "docs" / "attention_experts.md"
KINDS = {"standard": [{}], "hyperbolic": [{}], "linear": [{"features": "elu"}, {"features": "favor"}]}
KINDS["edge_featured"] = [{"mode": mode} for mode in ("key_value", "bias", "gated", "gatv2")]
CONFIGS = {c.kind: c for c in (StandardConfig, HyperbolicConfig, LinearConfig, EdgeFeaturedConfig)}


def test_the_code_of_the_page_runs():
    for code in blocks(PAGE, "python"):
        exec(compile(code, str(PAGE), "exec"), {})


def test_the_table_says_what_is_refused():
    refused = set()
    for kind, choices in KINDS.items():
        for choice in choices:
            for key, value in {"rope_theta": 1e4, "num_kv_heads": 2, "qk_norm": True}.items():
                with contextlib.suppress(ConfigError):
                    CONFIGS[kind](**choice, **{key: value})
                    continue
                refused.add((key, *choice.values(), kind)[:2])
    assert refused == {
        ("rope_theta", "elu"),
        ("rope_theta", "key_value"),
        ("rope_theta", "gatv2"),
        ("num_kv_heads", "gatv2"),
        ("qk_norm", "hyperbolic"),
        ("qk_norm", "gatv2"),
    }
    for key, name in refused:
        (row,) = re.findall(rf"^\| [^|]*`{key}`[^|]*\|(.*)\|$", PAGE.read_text(), re.MULTILINE)
        assert f"`{name}`" in row or "refused: all points" in row


def test_a_new_token_is_one_row_at_its_place():
    expert = StandardConfig(rope_theta=100.0).build(ExpertSite(16, 2))
    expert.init_weights(named_draw(0))
    x = torch.randn(3, 6, 16)
    last = torch.full((3, 1), 5)
    alone = expert(x[:, -1:], x, x, Sight(causal=True, place_BQ=last)).out_BQD
    torch.testing.assert_close(alone, expert(x, x, x, Sight(causal=True)).out_BQD[:, -1:])
