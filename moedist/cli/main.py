"""The command ``moedist``: finds its subcommands in this folder, a file each, and runs one.

A command's file has ``add_parser(subparsers)`` and ``main(args) -> int``. At module level it imports the standard
library and `moedist.config` only, so that help comes at once.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import re
import sys
import time
import warnings
from collections.abc import Sequence

import moedist
import moedist.cli
from moedist.config import ConfigError, ConfigErrors
from moedist.config.exit_codes import describe_codes

EPILOG = f"""\
examples:
  moedist train                                   # the recipe tiny_cpu: a few minutes on four cores
  moedist train experiment=tiny_cpu mesh.ep=4 moe.capacity.factor=1.0 run.dir=runs/first
  moedist train --cfg job                         # every key of the configuration, with its value
  moedist train --dry-run                         # what would run, without running it
  moedist eval runs/first                         # held-out loss of its newest checkpoint
  moedist runs                                    # how the runs below runs/ stand
  moedist report runs/first                       # one of them as an HTML page
  moedist analyze runs/first                      # which tokens each of its experts takes
  moedist checkpoint inspect runs/first           # what its newest checkpoint holds
  moedist doctor                                  # is this machine fit, which rank or link is slow?
  moedist doctor parity                           # do ranks compute what one device computes?
  moedist estimate experiment=mixtral_8x7b        # memory, traffic, time and cost, without starting it
  source <(moedist completion bash)               # completes commands, flags, parts and keys

exit codes:
{describe_codes()}
"""

STARTED_AT = "MOEDIST_STARTED_AT"
"""Tells the ranks when the user's command began, seconds since the epoch."""
NOT_COMMANDS = {"__main__", "main"}


def build_parser() -> argparse.ArgumentParser:
    """The parser with every command of this folder."""
    parser = argparse.ArgumentParser(
        prog="moedist",
        description="Trains mixture-of-experts models with their experts sharded over ranks.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"moedist {moedist.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in pkgutil.iter_modules(moedist.cli.__path__):
        if module.name not in NOT_COMMANDS:
            command = importlib.import_module(f"moedist.cli.{module.name}")
            command.add_parser(subparsers)
            subparsers.choices[module.name].set_defaults(main=command.main)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments of one command. ``key=value`` may stand anywhere between the flags, as ``--key=value`` too: so sweep
    agents write it.
    """
    parser = build_parser()
    args, rest = parser.parse_known_args(list(argv))
    if hasattr(args, "overrides"):
        rest = [re.sub(r"^--(?=[\w./]+=)", "", text) for text in rest]
    stray = [text for text in rest if text.startswith("-") or not hasattr(args, "overrides")]
    if stray:
        parser.error(f"unknown arguments for {args.command}: {' '.join(stray)} (see moedist {args.command} --help)")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    os.environ.setdefault(STARTED_AT, str(time.time()))
    args = parse(sys.argv[1:] if argv is None else argv)
    warnings.showwarning = _show_warning
    try:
        return int(args.main(args))
    except ConfigError as error:
        return refuse(args.command, error, as_json=getattr(args, "json", False))
    except KeyboardInterrupt:
        print("moedist: interrupted before a rank was started.", file=sys.stderr)
        return 130


def refuse(command: str, error: ConfigError, *, as_json: bool = False) -> int:
    """Says what is wrong with a configuration, each error on a line; returns the exit code."""
    errors = error.errors if isinstance(error, ConfigErrors) else (error,)
    exit_code = int(max(single.exit_code for single in errors))
    for single in errors:
        print(f"moedist {command}: {single}", file=sys.stderr)
    if as_json:
        fields = ("key", "value", "problem", "remedy")
        listed = [{name: getattr(single, name) for name in fields} for single in errors]
        print(json.dumps({"exit_code": exit_code, "errors": listed}, default=str))
    return exit_code


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: str | None = None,
) -> None:
    """A warning as users need it: the sentence, not the source line."""
    print(f"moedist: warning: {message}", file=sys.stderr)
