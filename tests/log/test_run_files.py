from __future__ import annotations

import numpy as np
import pytest

from moedist.log.run_files import EXPERTS, METRICS, ExpertsFile, append_frame, read_metrics

LOAD = np.array([[5, 2, 1, 0], [2, 2, 2, 2]])


def write(folder, *steps: int, factor: int = 1) -> None:
    for step in steps:
        arrays = {"load": step * factor * LOAD, "weight_norm": np.full((2, 4), 0.5, np.float32)}
        append_frame(folder / EXPERTS, step, [1, 3], arrays)


def test_arrays_come_back_by_step_and_name(tmp_path):
    write(tmp_path, 10, 20)
    experts = ExpertsFile(tmp_path)
    assert (experts.steps, experts.blocks, experts.names) == ((10, 20), (1, 3), ("load", "weight_norm"))
    assert (experts.at(20)["load"] == 20 * LOAD).all() and experts.at(20)["weight_norm"].dtype == np.float32
    assert experts.stack("load").shape == (2, 2, 4) and (experts.stack("load", [20])[0] == 20 * LOAD).all()


@pytest.mark.parametrize("largest", [255, 256, 2**31, 2**40])
def test_counts_of_any_size_come_back(tmp_path, largest: int):
    append_frame(tmp_path / EXPERTS, 1, [0], {"load": np.array([[largest, 0]])})
    assert ExpertsFile(tmp_path).at(1)["load"].tolist() == [[largest, 0]]


def test_of_a_step_that_was_done_again_the_last_counts(tmp_path):
    write(tmp_path, 10, 20, 30)
    write(tmp_path, 20, factor=7)
    experts = ExpertsFile(tmp_path)
    assert experts.steps == (10, 20, 30) and (experts.at(20)["load"] == 140 * LOAD).all()


def test_a_cut_or_damaged_frame_costs_itself_only(tmp_path):
    path = tmp_path / EXPERTS
    write(tmp_path, 10)
    first = path.stat().st_size
    for cut in range(first + 1, first + 60, 7):  # a kill anywhere in the second frame; the run then goes on
        write(tmp_path, 20)
        path.write_bytes(path.read_bytes()[:cut])
        write(tmp_path, 30)
        assert ExpertsFile(tmp_path).steps == (10, 30)
        path.write_bytes(path.read_bytes()[:first])
    write(tmp_path, 20, 30)
    content = bytearray(path.read_bytes())
    content[first + 40] ^= 1
    path.write_bytes(content)
    assert ExpertsFile(tmp_path).steps == (10, 30)


def test_a_folder_without_files_has_no_numbers(tmp_path):
    experts = ExpertsFile(tmp_path)
    assert (experts.steps, experts.blocks, experts.names, read_metrics(tmp_path)) == ((), (), (), [])


def test_half_a_row_is_left_out(tmp_path):
    (tmp_path / METRICS).write_text('{"train/step": 1}\n{"train/step": 2, "tr')
    assert read_metrics(tmp_path) == [{"train/step": 1}]
