from __future__ import annotations

import inspect
import sys
import types
from pathlib import Path

import pytest
from torch import nn

from moedist.config import ConfigError
from moedist.launch.choices import exported_choice, find_choice, is_contract, list_choices
from moedist.launch.compose import find_groups
from moedist.log.sink.contract import SinkConfig
from moedist.moe.router.contract import RouterConfig
from moedist.moe.router.topk import TopKConfig
from tests.launch.plugin import write_plugin


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    write_plugin(tmp_path, "outside_choices")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "outside_choices"


def test_contracts_are_known_from_choices():
    assert is_contract(RouterConfig)
    assert not is_contract(TopKConfig)
    assert not is_contract(int)


def test_listing_and_finding():
    assert list_choices(RouterConfig)["topk"] is TopKConfig
    assert {"console", "jsonl", "wandb"} <= set(list_choices(SinkConfig))
    assert find_choice(RouterConfig, "topk") is TopKConfig


def test_an_unknown_kind_names_the_known_ones():
    with pytest.raises(ConfigError, match="kind = 'tokp' is no choice of moe.router. Did you mean topk"):
        find_choice(RouterConfig, "tokp")


def test_a_plugin_adds_choices(plugin: str):
    found = find_choice(RouterConfig, "eager", [plugin])
    assert (found.kind, found.path, found.__module__) == ("eager", "moe.router", f"{plugin}.moe.router.eager")
    assert set(list_choices(RouterConfig, [plugin])) == {*list_choices(RouterConfig), "eager"}
    assert list_choices(SinkConfig, [plugin]) == list_choices(SinkConfig)


def test_a_kind_in_two_packages_is_refused(plugin: str):
    with pytest.raises(ConfigError, match="brings a second moe.router of the kind 'eager'"):
        list_choices(RouterConfig, [plugin, plugin])


def test_a_module_with_two_configs_is_its_authors_mistake():
    module = types.ModuleType("two")
    for name in ("AConfig", "BConfig"):
        vars(module)[name] = type(name, (RouterConfig,), {"__module__": "two"})
    with pytest.raises(TypeError, match="AConfig, BConfig"):
        exported_choice(module, RouterConfig)
    assert exported_choice(sys.modules["moedist.moe.router.contract"], RouterConfig) is None


def unfinished(of: type) -> list[str]:
    """Methods that a class has only as a promise of its contract."""
    functions = [(name, value) for name, value in inspect.getmembers(of, inspect.isfunction)]
    return [name for name, value in functions if value.__code__.co_names == ("NotImplementedError",)]


def test_R3_06_every_choice_is_finished():
    """Every choice's config, and every module class beside it that nothing else derives from."""
    assert unfinished(RouterConfig) == ["build_at", "experts_per_token"]
    for group in find_groups():
        for choice in list_choices(group.base).values():
            assert not unfinished(choice), choice
            module = sys.modules[choice.__module__]
            for value in vars(module).values():
                if inspect.isclass(value) and issubclass(value, nn.Module) and not value.__subclasses__():
                    # Only routers with a selection bias are asked for a shortfall.
                    assert unfinished(value) in ([], ["shortfall"]), value
