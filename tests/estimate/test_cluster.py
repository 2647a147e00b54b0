"""The table of devices, and tables of users on top of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from moedist.config import ConfigError, ConfigErrors
from moedist.estimate.cluster import choose_cluster, read_clusters

OURS = """
ours: {device: cuda, memory_gib: 100, bf16_tflops: 500, fp32_tflops: 30, fp64_tflops: 1, memory_gb_per_s: 2000,
       ranks_per_node: 4, node_gb_per_s: 200, network_gb_per_s: 25, price_per_hour: 1.5}
h100: {network_gb_per_s: 12.5}
"""


def table(folder: Path, text: str) -> Path:
    path = folder / "clusters.yaml"
    path.write_text(text)
    return path


def test_a_users_table_adds_and_changes_entries(tmp_path: Path):
    plain, clusters = read_clusters(), read_clusters(table(tmp_path, OURS))
    assert clusters.keys() == {*plain, "ours"}
    assert clusters["ours"].price_per_hour == 1.5 and clusters["ours"].reserved_gib == 4.0
    assert clusters["h100"].network_gb_per_s == 12.5
    assert clusters["h100"].bf16_tflops == plain["h100"].bf16_tflops


@pytest.mark.parametrize(
    ("text", "key", "problem"),
    [
        ("h100: {memory: 3}", "h100.memory", "Unexpected"),
        ("h100: {memory_gib: much}", "h100.memory_gib", "number"),
        ("h100: {memory_gib: 2}", "h100.reserved_gib", "leaves nothing"),
        ("h100: {node_gb_per_s: 0}", "h100.node_gb_per_s", "too small"),
        ("mine: {device: cuda}", "mine.memory_gib", "equired"),
        ("- 1", "--clusters", "maps no names"),
        ("a: [", "--clusters", "no YAML"),
    ],
)
def test_a_wrong_entry_is_named(text: str, key: str, problem: str, tmp_path: Path):
    with pytest.raises(ConfigError) as caught:
        read_clusters(table(tmp_path, text))
    errors = caught.value.errors if isinstance(caught.value, ConfigErrors) else (caught.value,)
    assert any(error.key == key and problem in error.problem for error in errors), errors


def test_an_unknown_name_gets_the_known_ones():
    with pytest.raises(ConfigError, match="Choose one of: a100"):
        choose_cluster(read_clusters(), "h300")
