from __future__ import annotations

import io
import json
import math

import pytest

from moedist.log.sink.jsonl import JsonlConfig, JsonlSink


def rows(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def write_steps(path, *steps):
    said = []
    sink = JsonlSink(path.parent, said.append)
    for step in steps:
        sink.write({"train/step": step, "train/loss": 1.0 / step})
    sink.close("done")
    return said


def test_a_row_is_in_the_file_as_soon_as_it_is_written(run_info):
    sink = JsonlConfig().open(run_info, print)
    sink.write({"train/step": 1, "moe/layer_00/load": [1, 2, 3]})
    assert rows(run_info.directory / "metrics.jsonl") == [{"train/step": 1, "moe/layer_00/load": [1, 2, 3]}]


def test_numbers_that_json_has_not_are_strings_that_float_reads(tmp_path):
    sink = JsonlSink(tmp_path, print)
    sink.write({"train/step": 1, "a": math.nan, "b": [math.inf, {"c": -math.inf}]})
    (row,) = rows(tmp_path / "metrics.jsonl")
    assert row == {"train/step": 1, "a": "NaN", "b": ["Infinity", {"c": "-Infinity"}]}
    assert math.isnan(float(row["a"])) and float(row["b"][0]) == math.inf


@pytest.mark.pitfall("34")
def test_steps_that_the_file_holds_are_marked_as_replayed_and_nothing_is_lost(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 10, 20, 30)
    write_steps(path, 20, 30, 40)
    assert [(row["train/step"], row.get("replayed", False)) for row in rows(path)] == [
        (10, False),
        (20, False),
        (30, False),
        (20, True),
        (30, True),
        (40, False),
    ]


def test_half_a_last_row_is_moved_aside(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 2)
    whole = path.read_text()
    path.write_text(whole + '{"train/step": 3, "train/lo')
    (line,) = write_steps(path, 3)
    assert "metrics.jsonl.partial" in line
    assert path.read_text().startswith(whole)
    assert [(row["train/step"], "replayed" in row) for row in rows(path)] == [(1, False), (2, False), (3, False)]
    assert (tmp_path / "metrics.jsonl.partial").read_text() == '{"train/step": 3, "train/lo\n'


def test_a_last_row_that_lacks_only_its_newline_stays(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"train/step": 1}')
    assert write_steps(path, 2) == []
    assert [row["train/step"] for row in rows(path)] == [1, 2]


def test_an_empty_file_and_a_lone_fragment_are_mended(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for content in (b"", b'{"tr', b"\x00\xff\xfe"):
        path.write_bytes(content)
        write_steps(path, 1)
        assert [row["train/step"] for row in rows(path)] == [1]


class FullDisk:
    """A file on a disk with room for some bytes: a write takes what fits, and raises when nothing does."""

    def __init__(self, file: io.FileIO, room: int):
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        if self.room == 0:
            raise OSError(28, "No space left on device")
        taken = self.file.write(data[: self.room])
        self.room -= taken
        return taken

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_full_disk_costs_rows_and_one_warning_and_leaves_whole_lines(tmp_path):
    said = []
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path.parent, said.append)
    disk = sink._file = FullDisk(sink._file, room=50)
    for step in (1, 2, 3):
        sink.write({"train/step": step, "train/loss": 0.123456})
    disk.room = 1000
    sink.write({"train/step": 4})
    assert [row["train/step"] for row in rows(path)] == [1, 4]
    assert len(said) == 1 and "step 2" in said[0] and str(path) in said[0] and "Free some space" in said[0]
