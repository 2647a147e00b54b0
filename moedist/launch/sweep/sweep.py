"""``moedist train -m``: a sweeper of Hydra's asks for jobs, ours run them, one folder keeps all that came of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
from moedist.launch.sweep.launchers import LAUNCHERS, register_launchers
from moedist.launch.sweep.record import SWEEP, SweepRecord
from moedist.launch.sweep.settings import SweepConfig
from moedist.train.config import RunFolder
from moedist.train.lock import LOCK

LAUNCHER = "hydra/launcher"


def run_sweep(overrides: Sequence[str], say: Callable[[str], None] = print) -> SweepRecord:
    """Runs a sweep, or goes on with one; returns what has become of its jobs.

    Args:
        overrides: as on the command line, several values for a key among them. ``run.dir`` is the sweep's folder.
        say: tells people of each job's start and end.

    Raises:
        ConfigErrors: all that is wrong with the sweep itself; what is wrong with a job ends that job alone.
        FolderError: the folder cannot be written.
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
    register_launchers()
    with open_conf(parsed) as arguments:
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        try:
            composed = hydra.compose_config(ROOT, arguments, RunMode.MULTIRUN, from_shell=False)
            settings, folder = read_settings(composed), read_folder(composed)
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise error if isinstance(error, ConfigError) else ConfigErrors([hydra_error(error)]) from error
        place = settings.open()
        given = parse_overrides(arguments, several=True)
        swept = {o.key_or_group for o in given if o.is_sweep_override()}
        taken = {"run.dir", "run.resume", *swept, *(text.partition("=")[0] for text in place.overrides)}
        claim = claim_sweep(folder)
        try:
            record = read_record(claim, overrides, settings)
            with StopSignals() as signals:
                batches = Batches(
                    record=record,
                    settings=settings,
                    place=place,
                    fixed=[str(o.input_line) for o in parsed if is_fixed(o) and o.key_or_group not in taken],
                    known={rendered(o) for o in given if not o.is_sweep_override() and o.key_or_group not in swept},
                    signals=signals,
                    say=say,
                    judges=settings.prune_after_jobs is not None or not is_basic(composed),
                    bears_failures="max_failure_rate" in composed.hydra.sweeper,
                )
                # Sweepers cannot pass on what is taken away (~key, experiment=null): jobs hear of that from us alone.
                passed = [text for text in arguments if not text.startswith("~")]
                passed.append(f"hydra.sweep.dir='{claim.path}'")
                if batches.bears_failures and not any("max_failure_rate" in text for text in arguments):
                    passed.append("hydra.sweeper.max_failure_rate=1.0")
                try:
                    hydra.multirun(ROOT, batches.run, passed, with_log_configuration=False)
                except SweepStopped:
                    say("The sweep was told to stop, and its jobs have been. Go on with run.resume=auto.")
                except Exception as error:  # a sweeper's: whatever it is, jobs may have run for hours
                    if not record.asked:
                        raise ConfigErrors([hydra_error(error)]) from error
                    say(f"The sweeper ended with {type(error).__name__}: {error}")
            record.write()
            return record
        finally:
            claim.release()


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


def is_fixed(override: Override) -> bool:
    """Whether an override is every job's."""
    return not override.is_sweep_override() and not override.key_or_group.startswith("hydra")


def rendered(override: Override) -> str:
    """An override as sweepers give it to a job."""
    return f"{override.get_key_element()}={override.get_value_element_as_str()}"


def is_basic(composed: DictConfig) -> bool:
    """Whether the sweeper only makes a grid, and does nothing with what comes of it."""
    return composed.hydra.runtime.choices["hydra/sweeper"] == "basic"
