"""Choices of a package outside moedist: one module and one YAML each; moedist does not change by a line for them."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

import moedist
from moedist.config import to_mapping
from moedist.launch.compose import compose
from moedist.launch.decode import decode
from moedist.moe.balance.switch import SwitchConfig
from moedist.moe.balance.z_loss import ZLossConfig
from moedist.moe.capacity import CapacityConfig
from moedist.moe.dispatch.padded import PaddedConfig
from moedist.moe.experts.loop import LoopConfig
from moedist.moe.layer import MoEConfig
from moedist.train.config import RunConfig
from tests.parity import HIDDEN, NUM_EXPERTS, SCENES, compare, many_ranks, one_device
from tests.ranks import Here

SOURCE = Path(__file__).parent / "src"
CHOICES = (
    "moe/router=hashed",
    "moe/dispatch=counted",
    "moe/bank=halved",
    "model/attention=mean",
    "model=scaled",
    "log/sink=[jsonl,gate]",
)
FILES = ("moe/router/hashed", "moe/dispatch/counted", "moe/bank/halved", "model/attention/mean", "model/scaled",
         "log/sink/gate")  # fmt: skip


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SOURCE))


def test_it_is_one_module_and_one_yaml_for_each_choice():
    root = SOURCE / "outside"
    found = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.suffix in (".py", ".yaml"))
    assert found == sorted(["__init__.py", *(f"{f}.py" for f in FILES), *(f"conf/{f}.yaml" for f in FILES)])


def test_moedist_knows_nothing_of_it():
    """Zero lines of moedist change to add a router, dispatcher, bank, attention, model family or sink."""
    package = Path(moedist.__file__).parent
    assert not any((package / f"{file}.py").exists() for file in FILES)
    names = re.compile(
        r"^(import|from) outside\b|Hashed(Router|Config)|Halved|CountedDispatcher|ScaledConfig", re.MULTILINE
    )
    for source in [*package.rglob("*.py"), *(package.parent / "conf").rglob("*.yaml")]:
        assert not names.search(source.read_text()), source


@pytest.mark.parametrize("choice", CHOICES)
def test_each_choice_is_picked_like_one_of_moedists_own(choice: str):
    composed = compose(["experiment=null", "plugins=[outside]", choice])
    kind = choice.rpartition("=")[2].strip("[]").split(",")[-1]
    assert f"'kind': '{kind}'" in str(composed.mapping)
    assert decode(RunConfig, to_mapping(composed.config), ("outside",)) == composed.config


def test_without_the_plugin_it_is_no_choice():
    code = "from moedist.cli.main import main; import sys; sys.exit(main(['train', '--dry-run', 'moe/router=hashed']))"
    ended = subprocess.run([sys.executable, "-c", code], cwd=Path(moedist.__file__).parents[1], capture_output=True)
    assert ended.returncode == 2
    assert b"hashed" in ended.stderr and b"topk" in ended.stderr


def layers_hold(here: Here, ep: int) -> tuple[float, int]:
    """The project's oracle over the plug-in's router, dispatcher and bank: worst difference, dispatches made."""
    if str(SOURCE) not in sys.path:
        sys.path.insert(0, str(SOURCE))
    from outside.moe.bank.halved import HalvedConfig
    from outside.moe.dispatch import counted
    from outside.moe.router.hashed import HashedConfig

    counted.ARRIVED.clear()
    own = MoEConfig(
        num_experts=NUM_EXPERTS,
        router=HashedConfig(),
        experts=LoopConfig(hidden_dim=HIDDEN),
        balance={"switch": SwitchConfig(0.3), "z_loss": ZLossConfig(0.2)},
    )
    worst = 0.0
    for scene in SCENES:
        for capacity in (CapacityConfig(factor=1.0), CapacityConfig(factor=None)):
            expected = one_device(dataclasses.replace(own, capacity=capacity), scene, here.world)
            for parts in (
                {"dispatch": PaddedConfig()},
                {"dispatch": counted.CountedConfig()},
                {"dispatch": counted.CountedConfig(), "bank": HalvedConfig()},
            ):
                config = dataclasses.replace(own, capacity=capacity, **parts)
                worst = max(worst, compare(many_ranks(config, scene, here.mesh_of(ep)), expected))
    return worst, len(counted.ARRIVED)


@pytest.mark.parametrize("ep", [1, 2, 4])
def test_its_layers_on_ranks_equal_one_device(ranks, ep: int):
    for worst, dispatches in ranks(4).run(layers_hold, ep):
        assert worst <= 1e-12
        assert dispatches == 2 * 2 * (1 + 2), "the plug-in's dispatcher must have moved the rows"
