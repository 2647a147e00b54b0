from __future__ import annotations

import subprocess
import sys

import pytest

from moedist.config import ConfigError, to_mapping
from moedist.log.config import LogConfig


@pytest.mark.parametrize(("key", "value"), [("dead_window", 0), ("max_scalar_keys", -1)])
def test_values_that_cannot_work_are_refused_with_key_value_and_remedy(key, value):
    with pytest.raises(ConfigError, match=rf"^{key} = {value} .+\. Set .+"):
        LogConfig(**{key: value})


def test_the_default_sinks_are_choices_by_kind():
    sinks = to_mapping(LogConfig())["sinks"]
    assert {name: sink["kind"] for name, sink in sinks.items()} == {
        name: name for name in ("console", "jsonl", "wandb")
    }


def test_configs_load_neither_wandb_nor_rich():
    code = "import sys, moedist.log.run_log; sys.exit(' '.join({'wandb', 'rich'} & sys.modules.keys()) or None)"
    subprocess.run([sys.executable, "-c", code], check=True)
