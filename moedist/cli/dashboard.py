"""``moedist dashboard``: panels of a run's metrics on W&B, made from code."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from moedist.config import ConfigError
from moedist.config.exit_codes import ExitCode

EXAMPLES = """\
examples:
  # what the dashboard of a run would show; asks no network
  moedist dashboard runs/first --json

  # make it in the run's project, under the key's own entity or another
  moedist dashboard runs/first
  moedist dashboard runs/first --entity my-team --name "Mixture of experts"

exit codes: 0 made, 2 no run with metrics there, 4 no package, key or server
"""


DESCRIPTION = """\
Makes a W&B workspace with panels for balance, load, drops, router, throughput and sweeps, of the keys that a run has.
Other runs of the project show in it too.
"""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> argparse.ArgumentParser:
    """Adds the command to ``moedist``'s parser."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "dashboard",
        help="make a W&B dashboard from code",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="a run's folder")
    parser.add_argument("--entity", help="whose project (default: the run's, else the key's own)")
    parser.add_argument("--project", help="the project (default: the run's)")
    parser.add_argument("--name", default="moedist", help="of the workspace (default: moedist)")
    parser.add_argument("--json", action="store_true", help="print sections, panels and keys; make nothing")
    return parser


def main(args: argparse.Namespace) -> int:
    """Makes the dashboard, or says what it would be; returns the exit code."""
    import dataclasses

    from moedist.launch.saved import CONFIG, read_mapping
    from moedist.log.config import LogConfig
    from moedist.log.dashboard import build_workspace, plan_dashboard, row_of_run
    from moedist.log.run_files import METRICS
    from moedist.log.sink.wandb import default_entity
    from moedist.train.identity import flatten

    run = Path(args.run).expanduser()
    if not ((run / CONFIG).is_file() and (run / METRICS).is_file()):
        raise ConfigError("RUN", args.run, "is no run folder with metrics", f"Name one that holds a {METRICS}.")
    config = read_mapping(run / CONFIG)
    row = row_of_run(run, config["log"].get("max_scalar_keys", LogConfig().max_scalar_keys))
    sections = plan_dashboard(row, list(flatten(config)))
    if args.json:
        print(json.dumps([dataclasses.asdict(section) for section in sections]))
        return 0
    settings: dict[str, Any] = next((sink for sink in config["log"]["sinks"].values() if sink["kind"] == "wandb"), {})
    entity, project = args.entity or settings.get("entity"), args.project or settings.get("project", "moedist")
    check_online()
    workspace = build_workspace(sections, entity or default_entity(), project, args.name)
    workspace.save()
    print(workspace.url)
    return 0


class DashboardError(ConfigError):
    """What the dashboard needs of the environment is not there."""

    exit_code = ExitCode.ENVIRONMENT


def check_online() -> None:
    """Raises `DashboardError` where there is no package, no key or no server, within seconds."""
    import importlib.util

    from moedist.log.sink.wandb import decide_mode

    if importlib.util.find_spec("wandb_workspaces") is None:
        raise DashboardError(
            "dashboard", "wandb-workspaces", "is not installed", "Run: pip install 'moedist[dashboard]'"
        )
    mode, trouble = decide_mode("online")
    if mode != "online":
        raise DashboardError("dashboard", "W&B", f"cannot be asked ({trouble})", "--json shows the panels without it.")
