"""The configuration as a run folder holds it: `<run>/config.yaml`, written by the parent, read by every rank."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moedist.config import ConfigError, ConfigErrors
from moedist.launch.choices import check_plugins
from moedist.launch.decode import decode
from moedist.train.config import RunConfig

CONFIG = "config.yaml"


def write_config(path: Path, mapping: Mapping[str, Any]) -> None:
    """Writes plain mappings as YAML, whole or not at all; floats keep every digit."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(yaml.safe_dump(dict(mapping), sort_keys=False, allow_unicode=True), encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def read_mapping(path: Path) -> dict[str, Any]:
    """The plain mappings of a config file, values from the environment unresolved.

    Raises:
        ConfigError: it is missing, unreadable or no YAML mapping.
    """
    remedy = "Name the config.yaml of a run folder."
    try:
        mapping = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError("config", str(path), f"cannot be read ({error.strerror})", remedy) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError("config", str(path), "is not YAML", remedy) from error
    if not isinstance(mapping, dict):
        raise ConfigError("config", str(path), "holds no mapping of keys to values", remedy)
    return mapping


def decode_saved(mapping: Mapping[str, Any]) -> RunConfig:
    """The run's configuration from saved mappings; ``${oc.env:...}`` is resolved here, in the process that needs it.

    Raises:
        ConfigErrors: the values don't hold, or a variable is missing from this process's environment.
        ConfigError: a plug-in cannot be imported here.
    """
    try:
        resolved: Any = OmegaConf.to_container(OmegaConf.create(dict(mapping)), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigErrors([interpolation_error(error)]) from error
    plugins = resolved.get("plugins") or ()
    check_plugins(plugins)
    return decode(RunConfig, resolved, plugins)


def interpolation_error(error: OmegaConfBaseException) -> ConfigError:
    """What a user sees of a ``${...}`` that leads nowhere."""
    key = str(getattr(error, "full_key", None) or "configuration")
    problem = str(error).splitlines()[0].rstrip(".")
    return ConfigError(
        key, "${...}", f"cannot be resolved: {problem}", "Name a key that exists, or set the environment variable."
    )
