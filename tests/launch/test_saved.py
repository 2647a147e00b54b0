from __future__ import annotations

from pathlib import Path

import pytest

from moedist.config import ConfigError, ConfigErrors
from moedist.launch.saved import decode_saved, read_mapping, write_config


def test_what_is_written_is_read(tmp_path: Path):
    mapping = {"tiny": 1e-20, "word": "null", "time": "12:30", "date": "2026-01-01", "list": [1, 2.5], "ü": None}
    write_config(tmp_path / "config.yaml", mapping)
    assert read_mapping(tmp_path / "config.yaml") == mapping
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_files_that_are_no_configuration(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot be read .No such file"):
        read_mapping(tmp_path / "gone.yaml")
    no_yaml = ("[1", "!!python/object:os.system {}")
    for text, problem in (*((text, "is not YAML") for text in no_yaml), ("- 1", "holds no mapping")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError, match=problem):
            read_mapping(tmp_path / "bad.yaml")


def test_a_variable_that_is_missing_is_named():
    with pytest.raises(ConfigErrors, match="run.name.*NOT_SET_ANYWHERE"):
        decode_saved({"run": {"name": "${oc.env:NOT_SET_ANYWHERE}"}})
