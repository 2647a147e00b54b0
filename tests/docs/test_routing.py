"""docs/routing.md has a row for every router, balance method and preset, and the tables that the command makes."""

from __future__ import annotations

import subprocess
import sys
import typing

import pytest

from moedist.launch.choices import list_choices
from moedist.launch.compose import conf_folder
from moedist.moe.balance import switch
from moedist.moe.balance.contract import BalanceConfig
from moedist.moe.capacity import CapacityConfig
from moedist.moe.router.contract import RouterConfig
from tests.docs.capacity_table import BEGIN, END, PAGE, PRESETS, limits, stays, text
from tests.docs.pages import ROOT

TEXT = PAGE.read_text()
PLACES = {"moe/router": RouterConfig, "moe/balance": BalanceConfig}


def test_the_tables_are_those_of_the_command():
    inside = TEXT.partition(BEGIN)[2].partition(END)[0].strip()
    assert inside == text().strip(), "run: python -m tests.docs.capacity_table --write"
    assert all(f"`{name}`" in limits() for name in PRESETS) and stays().count("\n") == 12
    by_policy = [line.split("|")[3:6] for line in stays().splitlines()[2:7]]
    assert len({tuple(" ".join(sorted(cell.split())) for cell in cells) for cells in by_policy}) == 5


@pytest.mark.slow
def test_the_command_runs():
    command = [sys.executable, "-m", "tests.docs.capacity_table"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.strip() == text().strip()
    assert "python -m tests.docs.capacity_table" in TEXT


@pytest.mark.parametrize("place", PLACES)
def test_every_choice_has_a_row(place):
    for kind in list_choices(PLACES[place]):
        assert f"\n| `{kind}` |" in TEXT, f"docs/routing.md has no row for {place}={kind}"


def test_every_preset_has_a_row():
    for path in (conf_folder() / "moe").glob("*.yaml"):
        assert f"\n| `moe={path.stem}` |" in TEXT, f"docs/routing.md has no row for moe={path.stem}"


def test_every_policy_has_a_row():
    for policy in typing.get_args(typing.get_type_hints(CapacityConfig)["drop_policy"]):
        assert f"\n| `{policy}` |" in TEXT


def test_R0_45_sources_are_named():
    for source in ("Shazeer et al. 2017", "GShard, Lepikhin et al. 2021", "Switch, Fedus et al. 2022"):
        assert source in TEXT
    assert "Fedus et al. 2022" in (switch.__doc__ or "") and "Lepikhin\n" in (CapacityConfig.__doc__ or "")
