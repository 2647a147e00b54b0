"""Configs as plain mappings, choices by their modules' names, and errors that say what to do."""

from __future__ import annotations

import dataclasses

import pytest

from moedist.config import Choice, Config, ConfigError, ConfigErrors, require, to_mapping
from moedist.moe.layer import MoEConfig
from moedist.moe.router.contract import RouterConfig
from moedist.moe.router.topk import TopKConfig


def test_require():
    require(True, "a", 1, "is bad", "Do b.")
    with pytest.raises(ConfigError, match=r"^a = 'x' is bad\. Do b\.$") as caught:
        require(False, "a", "x", "is bad", "Do b.")
    error = caught.value
    assert (error.key, error.value, error.problem, error.remedy) == ("a", "x", "is bad", "Do b.")
    assert isinstance(error, ValueError)


def test_an_error_below_a_prefix():
    error = ConfigError("ep", 3, "is odd", "Set it to 2.")
    assert str(error.under("mesh").under("run")) == "run.mesh.ep = 3 is odd. Set it to 2."
    assert str(error.under("")) == str(error)


def test_errors_together():
    first, second = ConfigError("a", 1, "is bad", "Do b."), ConfigError("c.d", None, "is worse", "Do e.")
    both = ConfigErrors([first, second])
    assert str(both) == "a = 1 is bad. Do b.\nc.d = None is worse. Do e."
    assert both.errors == (first, second) and both.key == "a" and isinstance(both, ConfigError)
    with pytest.raises(AssertionError, match="no errors"):
        ConfigErrors([])


def test_a_choice_is_named_by_its_module():
    assert RouterConfig.path == TopKConfig.path == "moe.router"
    assert TopKConfig.kind == "topk" and TopKConfig().kind == "topk"
    assert TopKConfig.__module__ == f"moedist.{TopKConfig.path}.{TopKConfig.kind}"
    other = type("OtherConfig", (RouterConfig,), {"__module__": "plugin.moe.router.other"})
    assert other.kind == "other" and other.path == "moe.router" and TopKConfig.kind == "topk"


@dataclasses.dataclass(frozen=True)
class Inner(Config):
    """A part."""

    sizes: tuple[int, ...] = (1, 2)


@dataclasses.dataclass(frozen=True)
class Outer(Config):
    """A whole."""

    inner: Inner = dataclasses.field(default_factory=Inner)
    router: RouterConfig = dataclasses.field(default_factory=TopKConfig)
    by_name: dict[str, Inner] = dataclasses.field(default_factory=lambda: {"a": Inner((3,))})
    nothing: None = None


def test_to_mapping():
    assert to_mapping(Outer()) == {
        "inner": {"sizes": [1, 2]},
        "router": {
            "kind": "topk",
            "mode": "top_k",
            "top_k": 2,
            "score": "softmax",
            "renormalize": None,
            "scale": 1.0,
            "groups": None,
            "noise_std": 0.0,
            "input_jitter": 0.0,
            "selection_bias": "allowed",
            "bias": False,
            "init": "xavier_normal",
        },
        "by_name": {"a": {"sizes": [3]}},
        "nothing": None,
    }
    assert list(to_mapping(Outer())["router"])[0] == "kind"
    mapping = to_mapping(MoEConfig())
    assert mapping["dispatch"] == {"kind": "all_to_all", "exchange_dtype": None}
    assert {key: mapping["balance"]["switch"][key] for key in ("kind", "coefficient", "scope")} == {
        "kind": "switch",
        "coefficient": 0.01,
        "scope": "global",
    }
    assert "kind" not in mapping and "kind" not in mapping["capacity"]


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TopKConfig().top_k = 3  # type: ignore[misc]
    assert issubclass(TopKConfig, Choice) and hash(TopKConfig()) == hash(TopKConfig())
