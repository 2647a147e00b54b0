"""What the documentation points at is there."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moedist.cli.doctor import CHECKS
from moedist.cli.main import parse
from moedist.launch.choices import list_choices
from moedist.launch.compose import compose, compose_yaml, default_mapping, find_groups, parse_overrides
from moedist.launch.sweep.launchers import LAUNCHERS
from moedist.log.metrics import MoEStep, moe_metrics, time_metrics, train_metrics
from moedist.log.series import Series
from moedist.moe.plan import DROP_REASONS
from moedist.moe.report import ROUTER_MEANS
from moedist.train.clock import PARTS
from moedist.train.config import RunConfig
from tests.docs.pages import PAGES, ROOT, blocks, name_of, prose, quoted

GROUPS = {group.name: group for group in find_groups()}
each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


def keys_of(mapping: dict[str, Any], prefix: str) -> Iterator[str]:
    for name, value in mapping.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from keys_of(value, f"{prefix}{name}.")


def known_keys() -> set[str]:
    """Every key of the configuration, whatever is chosen."""
    keys = set(keys_of(default_mapping(RunConfig, ""), ""))
    for group in GROUPS.values():
        for kind, choice in list_choices(group.base).items():
            place = f"{group.key}.{kind}" if group.many else group.key
            keys |= {group.key, place, f"{place}.kind", *keys_of(default_mapping(choice, group.base.path), f"{place}.")}
    return keys


def known_metrics() -> set[str]:
    zeros_LE = torch.zeros(1, 2, dtype=torch.int64)
    zeros_L = torch.zeros(1)
    moe = MoEStep(
        blocks=[0],
        loss_names=["switch", "z_loss"],
        loss_LJ=torch.zeros(1, 2),
        scaled_LJ=torch.zeros(1, 2),
        router_L=dict.fromkeys(ROUTER_MEANS, zeros_L),
        micro_vio_L=zeros_L,
        room_L=torch.ones(1),
        count_LME=torch.ones(1, 2 + len(DROP_REASONS), 2),
        last_seen_LE=zeros_LE,
        bias_LE=zeros_LE,
        norm_LE={"weight_norm": zeros_LE, "grad_norm": zeros_LE},
    )
    train = train_metrics(
        step=1,
        loss=0.0,
        tokens=1,
        tokens_per_s=1.0,
        learning_rates={"router": 0.0, "experts": 0.0, "other": 0.0},
        grad_norm=0.0,
        memory_gib=0.0,
        flops_per_token=1.0,
        peak_flops=1.0,
        spilled_steps=0,
    )
    parts = dict.fromkeys((*PARTS, "exchange"), 1.0)
    timed = time_metrics(
        seconds=parts, most_compute_s=1.0, bytes_sent=1, bytes_arrived=1, most_bytes_arrived=1, num_ranks=1
    )
    record = {**train, **timed, **moe_metrics(moe, 1, 100)}
    row = Series(200).row(record)
    return {"eval/loss", *record, *row.scalars, *row.histograms}


KEYS, METRICS = known_keys(), known_metrics()
SETTINGS = {f"hydra.launcher.{field.name}" for launcher in LAUNCHERS.values() for field in dataclasses.fields(launcher)}
FIELDS = {key for key in KEYS if "." not in key}


@each_page
def test_links_lead_to_files(page: Path):
    links = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    for link in links:
        path = page.parent / link.partition("#")[0]
        assert path.exists(), f"{name_of(page)} links to {link}"
        assert path.resolve().is_relative_to(ROOT), f"{name_of(page)} links out of the repository: {link}"


@each_page
def test_quoted_keys_exist(page: Path):
    for text in quoted(page):
        key = text.partition("=")[0]
        assert not key.startswith("hydra.launcher.") or key in SETTINGS, f"{name_of(page)} speaks of {key}"
        if re.fullmatch(r"[a-z_]+(\.[a-z_0-9]+)+", key) and key.partition(".")[0] in FIELDS:
            assert key in KEYS, f"{name_of(page)} speaks of {key}"


@each_page
def test_quoted_choices_and_metrics_exist(page: Path):
    for text in quoted(page):
        name, _, kind = text.partition("=")
        if re.fullmatch(r"(moe|model|train|log|eval)(/\w+)+", name) and not (ROOT / name).exists():
            if kind:
                assert name in GROUPS, f"{name_of(page)} speaks of {text}"
                if kind != "modulo":  # the example of docs/adding.md
                    assert kind in list_choices(GROUPS[name].base), f"{name_of(page)} speaks of {text}"
            else:
                metric = re.sub(r"layer_NN", "layer_00", name)
                found = metric in METRICS or name in GROUPS or metric in ("moe/layer_00", "moe/layers", "moe/experts")
                found = found or re.sub(r"expert_\d+", "expert_000", metric) in METRICS
                assert found, f"{name_of(page)} speaks of {name}"


def commands(page: Path) -> list[list[str]]:
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def check_sweep(overrides: list[str], page: str) -> list[str]:
    """The overrides of a sweep's jobs; those of the sweep itself, and the fixed ones, are right."""
    parsed = parse_overrides(overrides, several=True)
    of_hydra = [override for override in parsed if override.key_or_group.startswith("hydra")]
    for override in of_hydra:
        key = override.key_or_group
        assert key.startswith(("hydra/", "hydra.sweeper.")) or key in SETTINGS, f"{page}: {key}"
    of_jobs = [override for override in parsed if override not in of_hydra]
    compose([str(override.input_line) for override in of_jobs if not override.is_sweep_override()])
    return [str(override.input_line) for override in of_jobs]


@each_page
def test_commands_are_understood(page: Path):
    for command in commands(page):
        if command[0] != "moedist":
            assert os.access(ROOT / command[0], os.X_OK), f"{name_of(page)} runs {command[0]}"
            continue
        args = parse(command[1:])
        overrides = getattr(args, "overrides", [])
        if any(text.startswith("plugins=") for text in overrides):
            continue  # tests/docs/test_adding.py runs it
        if args.command == "train" and args.multirun:
            overrides = check_sweep(overrides, name_of(page))
        elif args.command == "train":
            compose_yaml(overrides) if args.cfg else compose(overrides)
        for text in overrides:
            if args.command == "doctor" and (text in CHECKS or text.startswith("runs/")):
                continue
            key = text.lstrip("~+").partition("=")[0]
            assert key in KEYS or key in GROUPS or key == "experiment", f"{name_of(page)}: {shlex.join(command)}"


def test_every_part_has_its_line_in_adding():
    text = (ROOT / "docs" / "adding.md").read_text()
    for group in GROUPS.values():
        assert f"`{group.base.__name__}`" in text, f"docs/adding.md does not say how to add a {group.name}"
