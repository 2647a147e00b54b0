from __future__ import annotations

import dataclasses
from typing import Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from moedist.config import Config, ConfigErrors, require, to_mapping
from moedist.launch.decode import decode
from moedist.log.config import LogConfig
from moedist.log.sink.jsonl import JsonlConfig
from moedist.moe.layer import MoEConfig
from moedist.moe.router.topk import TopKConfig
from moedist.train.config import RunConfig


@dataclasses.dataclass(frozen=True)
class Leaf(Config):
    rate: float = 1e-20
    pair: tuple[float, float] = (0.9, 0.95)
    names: tuple[str, ...] = ()
    word: Literal["a", "b"] | None = None
    count: int | None = None
    weights: dict[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self.rate < 5, "rate", self.rate, "is large", "Set it below 5.")


@dataclasses.dataclass(frozen=True)
class Tree(Config):
    needed: int
    leaf: Leaf = dataclasses.field(default_factory=Leaf)
    leaves: tuple[Leaf, ...] = (Leaf(),)
    maybe: Leaf | None = None
    router: TopKConfig = dataclasses.field(default_factory=TopKConfig)


def errors_of(config_class: type[Config], mapping: object) -> dict[str, str]:
    with pytest.raises(ConfigErrors) as caught:
        decode(config_class, mapping)  # type: ignore[arg-type]
    return {error.key: str(error) for error in caught.value.errors}


@pytest.mark.requirement("R0-03")
@settings(deadline=None)
@given(
    st.builds(
        Leaf,
        rate=st.floats(max_value=4.9, allow_nan=False),
        pair=st.tuples(st.floats(allow_nan=False), st.floats(allow_nan=False)),
        names=st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]))).map(tuple),
        word=st.sampled_from(["a", "b", None]),
        count=st.none() | st.integers(),
        weights=st.dictionaries(st.sampled_from(["x", "y"]), st.floats(allow_nan=False)),
    )
)
def test_config_to_yaml_to_config_is_lossless(leaf: Leaf):
    tree = Tree(needed=1, leaf=leaf, leaves=(leaf, Leaf()), maybe=leaf, router=TopKConfig(top_k=1))
    assert decode(Tree, yaml.safe_load(yaml.safe_dump(to_mapping(tree), allow_unicode=True))) == tree


@pytest.mark.requirement("R0-03")
def test_the_whole_default_run_is_lossless():
    assert decode(RunConfig, yaml.safe_load(yaml.safe_dump(to_mapping(RunConfig())))) == RunConfig()


def test_whole_numbers_are_floats_where_floats_are_asked():
    assert decode(Leaf, {"rate": 3}).rate == 3.0
    assert isinstance(decode(Leaf, {"rate": 3}).rate, float)


def test_every_error_comes_at_once_with_key_value_and_remedy():
    errors = errors_of(
        Tree,
        {
            "leaf": {"rate": 8},
            "leaves": [{}, {"raet": 1}],
            "maybe": {"count": "4", "pair": [1], "word": "c", "names": "x", "weights": {"w": "much"}},
            "router": {"kind": "topk", "top_k": True},
        },
    )
    assert errors == {
        "needed": "needed = None is not set and has no default. Write needed=<value>.",
        "leaf.rate": "leaf.rate = 8.0 is large. Set it below 5.",
        "leaves.1.raet": "leaves.1.raet = 1 is not a known key. Did you mean leaves.1.rate?",
        "maybe.count": "maybe.count = '4' has the wrong type. Set it to a whole number or null.",
        "maybe.pair": "maybe.pair = [1] has the wrong type (at place 1). Set it to a list of 2 (a number).",
        "maybe.word": "maybe.word = 'c' is not one of its choices. Set it to a or b or null.",
        "maybe.names": "maybe.names = 'x' has the wrong type. Set it to a list (text).",
        "maybe.weights": "maybe.weights = {'w': 'much'} has the wrong type. "
        "Set it to a mapping of names to values (a number).",
        "router.top_k": "router.top_k = True has the wrong type. Set it to a whole number.",
    }


def test_omegaconfs_mark_of_a_missing_value_is_an_error():
    assert "needed = None is not set" in errors_of(Tree, {"needed": "???"})["needed"]


def test_choices_by_kind_in_dicts_and_lists():
    assert decode(LogConfig, {"sinks": {"mine": {"kind": "jsonl"}}}).sinks == {"mine": JsonlConfig()}
    listed = {"kind": "listed", "blocks": [{"repeat": 2, "ffn": {"kind": "moe"}}, {}]}
    blocks = decode(RunConfig, {"model": {"kind": "decoder", "layers": listed}}).model.layers.blocks
    assert [block.repeat for block in blocks] == [2, 1]
    assert blocks[0].ffn.kind == "moe"
    assert isinstance(blocks, tuple)


@pytest.mark.parametrize(
    ("mapping", "key", "words"),
    [
        ({"router": {"kind": "topkk"}}, "router.kind", "Did you mean topk? Choose one of: "),
        ({"router": {"top_k": 2}}, "router", "Write router.kind=<kind>, or choose with moe/router=<kind>."),
        ({"router": "noisy"}, "router", "Choose with a slash: moe/router=noisy."),
        ({"router": {"kind": "../topk"}}, "router.kind", "is no choice of moe.router"),
        ({"router": {"kind": "contract"}}, "router.kind", "is no choice of moe.router"),
        ({"balance": ["switch"]}, "balance", "is not a mapping of names"),
        ({"balance": {"switch": None}}, "balance.switch", "says no kind"),
        ({"capacity": 1.25}, "capacity", "is not a mapping of keys to values"),
        ({"router": {"kind": "topk", "top_k": 9}}, "router.top_k", "is more than the 8 experts"),
    ],
)
def test_choices_that_cannot_be(mapping: dict, key: str, words: str):
    assert words in errors_of(MoEConfig, mapping)[key]
