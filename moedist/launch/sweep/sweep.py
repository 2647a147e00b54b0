"""``moedist train -m``: a sweeper of Hydra's asks for jobs, ours run them, one folder keeps all that came of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TypedDict

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moedist.config import ConfigError, ConfigErrors, require, to_mapping
from moedist.launch.compose import ROOT, hydra_error, open_conf, parse_overrides
from moedist.launch.decode import decode
from moedist.launch.folder import RunClaim, choose_folder, lock_folder, refused
from moedist.launch.start import StopSignals
from moedist.launch.sweep.batch import Batches, SweepStopped
from moedist.launch.sweep.job import Place
from moedist.launch.sweep.launchers import LAUNCHERS, register_launchers
from moedist.launch.sweep.record import SWEEP, SweepRecord
from moedist.launch.sweep.settings import SweepConfig
from moedist.train.config import RunFolder
from moedist.train.lock import LOCK

LAUNCHER = "hydra/launcher"
BEARS_FAILURES = "max_failure_rate"
"""The setting of sweepers that go on when a job raises."""


def run_sweep(overrides: Sequence[str], say: Callable[[str], None] = print) -> SweepRecord:
    """Runs a sweep, or goes on with one; returns what has become of its jobs.

    Args:
        overrides: as on the command line, several values for a key among them. ``run.dir`` is the sweep's folder.
        say: tells people of each job's start and end.

    Raises:
        ConfigErrors: all that is wrong with the sweep itself; what is wrong with a job ends that job alone.
        FolderError: the folder cannot be written.
    """
    parsed = parse_sweep(overrides)
    register_launchers()
    with open_conf(parsed) as arguments:
        composed, settings, folder = compose_sweep(arguments)
        place = settings.open()
        claim = claim_sweep(folder)
        try:
            record = read_record(claim, overrides, settings)
            with StopSignals() as signals:
                batches = Batches(
                    record=record,
                    settings=settings,
                    place=place,
                    **share_out(parsed, arguments, place),
                    signals=signals,
                    say=say,
                    judges=settings.prune_after_jobs is not None or not is_basic(composed),
                    bears_failures=BEARS_FAILURES in composed.hydra.sweeper,
                )
                ask_sweeper(batches, arguments)
            record.write()
            return record
        finally:
            claim.release()


def parse_sweep(overrides: Sequence[str]) -> list[Override]:
    """The overrides of a sweep, a launcher among them.

    Raises:
        ConfigError: one cannot be read, or gives several values to what a sweep has one of.
    """
    parsed = parse_overrides(overrides, several=True)
    for override in parsed:
        require(
            not (override.is_sweep_override() and override.key_or_group.startswith(("run.", "hydra"))),
            override.key_or_group,
            override.input_line,
            "names several values, and a sweep has one",
            "Give it one value: each job gets a folder below run.dir.",
        )
    if not any(override.key_or_group == LAUNCHER for override in parsed):
        parsed += parse_overrides([f"{LAUNCHER}=torchrun"])
    return parsed


def compose_sweep(arguments: Sequence[str]) -> tuple[DictConfig, SweepConfig, RunFolder]:
    """What Hydra makes of the command without what is swept, the launcher's settings and where the sweep is to be.

    Raises:
        ConfigErrors: it makes nothing of it, or the settings or the place don't hold.
    """
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None, "outside open_conf"
    try:
        composed = hydra.compose_config(ROOT, list(arguments), RunMode.MULTIRUN, from_shell=False)
        return composed, read_settings(composed), read_folder(composed)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise error if isinstance(error, ConfigError) else ConfigErrors([hydra_error(error)]) from error


class Given(TypedDict):
    """What of the command every job has, as of `Batches`."""

    fixed: list[str]
    known: set[str]


def share_out(parsed: Sequence[Override], arguments: Sequence[str], place: Place) -> Given:
    """Tells what every job has from what differs, and from what the sweep itself or the place decides.

    Args:
        parsed: the overrides as the user wrote them.
        arguments: the same as Hydra has them.
        place: where jobs run.
    """
    given = parse_overrides(arguments, several=True)
    swept = {override.key_or_group for override in given if override.is_sweep_override()}
    taken = {"run.dir", "run.resume", *swept, *(text.partition("=")[0] for text in place.overrides)}
    return Given(
        fixed=[str(override.input_line) for override in parsed if is_fixed(override, taken)],
        known={rendered(o) for o in given if not o.is_sweep_override() and o.key_or_group not in swept},
    )


def ask_sweeper(batches: Batches, arguments: Sequence[str]) -> None:
    """Lets the sweeper choose jobs, batch by batch, until it is content or told to stop.

    Raises:
        ConfigErrors: it failed before it had asked for a job.
        FolderError: the record cannot be written.
    """
    # Sweepers cannot pass on what is taken away (~key, experiment=null): jobs hear of that from us alone.
    passed = [text for text in arguments if not text.startswith("~")]
    passed.append(f"hydra.sweep.dir='{batches.record.folder}'")
    if batches.bears_failures and not any(BEARS_FAILURES in text for text in arguments):
        passed.append(f"hydra.sweeper.{BEARS_FAILURES}=1.0")
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None, "outside open_conf"
    try:
        hydra.multirun(ROOT, batches.run, passed, with_log_configuration=False)
    except SweepStopped:
        batches.say("The sweep was told to stop, and its jobs have been. Go on with run.resume=auto.")
    except ConfigError:
        raise
    except Exception as error:  # a sweeper's: whatever it is, jobs may have run for hours
        if not batches.record.asked:
            raise ConfigErrors([hydra_error(error)]) from error
        batches.record.cut_short = True
        batches.say(f"The sweeper ended with {type(error).__name__}: {error}")


def read_settings(composed: DictConfig) -> SweepConfig:
    """The settings of the launcher that was chosen.

    Raises:
        ConfigErrors: it is not one of ours, or they don't hold.
    """
    name = composed.hydra.runtime.choices[LAUNCHER]
    require(
        name in LAUNCHERS,
        LAUNCHER,
        name,
        "starts no ranks",
        f"Choose one of {', '.join(LAUNCHERS)}, or leave it out for torchrun.",
    )
    mapping = OmegaConf.to_container(composed.hydra.launcher, resolve=True)
    assert isinstance(mapping, dict)
    try:
        return decode(LAUNCHERS[name], {str(key): mapping[key] for key in mapping if key != "_target_"})
    except ConfigErrors as errors:
        raise ConfigErrors(error.under("hydra.launcher") for error in errors.errors) from None


def read_folder(composed: DictConfig) -> RunFolder:
    """Where the sweep is to be.

    Raises:
        ConfigErrors: the values don't hold.
    """
    mapping = OmegaConf.to_container(composed.run, resolve=True)
    assert isinstance(mapping, dict)
    try:
        folder = decode(RunFolder, {str(key): value for key, value in mapping.items()})
    except ConfigErrors as errors:
        raise ConfigErrors(error.under("run") for error in errors.errors) from None
    require(
        folder.resume in ("never", "auto"),
        "run.resume",
        folder.resume,
        "names one run, and a sweep makes many",
        "Leave it out, or set it to auto to go on with the sweep in run.dir.",
    )
    require(
        folder.resume == "never" or folder.dir is not None,
        "run.resume",
        folder.resume,
        "needs a folder to come back to",
        "Set run.dir to the folder of the sweep.",
    )
    return decode(RunFolder, {**to_mapping(folder), "name": f"{folder.name}_sweep"})


def claim_sweep(config: RunFolder) -> RunClaim:
    """Makes the sweep's folder, or takes it over where ``run.resume=auto``.

    Raises:
        ConfigError: it holds something else, or a sweep that is not to be resumed, or is in use.
        FolderError: it cannot be made or written.
    """
    path = choose_folder(config)
    try:
        names = {entry.name for entry in path.iterdir()} - {LOCK} if path.is_dir() else set()
        require(
            not names or SWEEP in names,
            "run.dir",
            str(path),
            "is not empty and holds no sweep",
            "Name an empty folder, or one that does not exist.",
        )
        require(
            not names or config.resume == "auto",
            "run.dir",
            str(path),
            "holds a sweep already",
            "Name another run.dir, or continue that sweep with run.resume=auto.",
        )
        return lock_folder(path, fresh=config.dir is None)
    except OSError as error:
        raise refused(path, error) from error


def read_record(claim: RunClaim, overrides: Sequence[str], settings: SweepConfig) -> SweepRecord:
    """The record of the sweep in a folder, or a new one.

    Raises:
        ConfigError: it was after something else.
    """
    objectives = [dict(term) for term in settings.terms]
    record = SweepRecord.read(claim.path)
    if record is None:
        return SweepRecord(claim.path, list(overrides), objectives)
    require(
        record.objectives == objectives,
        "hydra.launcher.objective",
        to_mapping(settings.objective),
        f"differs from that of the sweep in {claim.path}",
        "Set it back, or start a new sweep in another run.dir.",
    )
    record.overrides = list(overrides)
    for job in record.jobs:
        if job.state in ("WAITING", "RUNNING"):
            job.state = "STOPPED"  # its sweep was killed before it could say so
    return record


def is_fixed(override: Override, taken: Collection[str]) -> bool:
    """Whether an override is every job's; ``taken`` are keys that are not its to set."""
    key = override.key_or_group
    return not override.is_sweep_override() and not key.startswith("hydra") and key not in taken


def rendered(override: Override) -> str:
    """An override as sweepers give it to a job."""
    return f"{override.get_key_element()}={override.get_value_element_as_str()}"


def is_basic(composed: DictConfig) -> bool:
    """Whether the sweeper only makes a grid, and does nothing with what comes of it."""
    return composed.hydra.runtime.choices["hydra/sweeper"] == "basic"
