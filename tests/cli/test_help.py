"""Every command helps, with examples that would be understood."""

from __future__ import annotations

import argparse
import shlex

import pytest

from moedist.cli.completion import takes_overrides, walk
from moedist.cli.main import build_parser, parse
from moedist.launch.keys import list_groups, list_keys

COMMANDS = dict(walk(build_parser()))
KEYS, GROUPS = list_keys(), list_groups()
each_command = pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path or "moedist")


def examples(path: str) -> list[list[str]]:
    """The commands below ``examples:`` in a command's help, without what stands behind a pipe or comes from the
    shell."""
    text = COMMANDS[path].epilog or ""
    lines = [line.strip() for line in text.partition("examples:\n")[2].splitlines() if line.startswith("  moedist ")]
    words = [shlex.split(line.partition(" | ")[0].partition(" > ")[0], comments=True) for line in lines]
    return [line[1:] for line in words]


@each_command
def test_help_says_what_for_and_how(path: str):
    command = COMMANDS[path]
    assert command.prog == f"moedist {path}".strip()
    assert command.description and command.description[0].isupper() and "." in command.description
    own = [words for words in examples(path) if " ".join(words).startswith(path)]
    assert own, f"moedist {path} --help has no example of its own"
    assert max(map(len, command.format_help().splitlines())) <= 120
    for action in command._actions:
        assert action.help or isinstance(action, argparse._SubParsersAction), (
            f"moedist {path}: {action.dest} has no help"
        )


@each_command
def test_examples_are_understood(path: str):
    for words in examples(path):
        args = parse(words)
        command = COMMANDS[args.command]
        if not takes_overrides(command) or any(word.startswith("plugins=") for word in words):
            continue
        for override in args.overrides:
            key, _, value = override.lstrip("~+").partition("=")
            if override in (command.get_default("words") or ()) or "/" in key and key not in GROUPS:
                continue  # a word of the command, or a run's folder
            assert key in KEYS or key in GROUPS or any(known.startswith(f"{key}.") for known in KEYS), override
            if key in GROUPS:
                for choice in value.strip("[]").split(","):
                    assert choice in (*GROUPS[key], "null", "*"), override
            elif KEYS.get(key):
                assert value.split(",")[0] in (*KEYS[key], "null"), override


def test_a_key_has_the_values_it_may_take():
    assert KEYS["train.precision"] == ("fp32", "bf16", "fp64") and KEYS["train.steps"] == ()
    assert KEYS["checkpoint.background"] == ("true", "false")
    assert "moe.balance.switch.coefficient" in KEYS and "log.sinks.wandb.mode" in KEYS
    assert "topk" in GROUPS["moe/router"] and "tiny_cpu" in GROUPS["experiment"] and "mixtral" in GROUPS["moe"]
