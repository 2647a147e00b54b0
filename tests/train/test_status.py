from __future__ import annotations

import json
from pathlib import Path

import pytest

from moedist.train.status import EXIT_CODES, clear_status, read_status, write_status


def test_what_is_written_is_read(tmp_path: Path):
    status = write_status(
        tmp_path, "nonfinite", "A NaN.", rank=3, step=7, last_good_checkpoint=tmp_path, what_to_do="Lower the rate."
    )
    assert read_status(tmp_path) == status
    fields = json.loads((tmp_path / "status.json").read_text())
    assert set(fields) == {
        "reason", "exit_code", "message", "rank", "step", "last_good_checkpoint", "what_to_do", "time",
    }  # fmt: skip
    assert (fields["exit_code"], fields["last_good_checkpoint"]) == (5, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]
    clear_status(tmp_path)
    clear_status(tmp_path)
    assert read_status(tmp_path) is None


def test_exit_codes():
    assert (EXIT_CODES["done"], EXIT_CODES["config"], EXIT_CODES["io"], EXIT_CODES["preempted"]) == (0, 2, 4, 75)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"reason": "odd", "exit_code": 1, "message": ""}'])
def test_what_is_no_status_is_none(tmp_path: Path, text: str):
    (tmp_path / "status.json").write_text(text)
    assert read_status(tmp_path) is None


def test_a_failed_write_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    old = write_status(tmp_path, "done", "Done.")

    def no_room(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", no_room)
    with pytest.raises(OSError, match="No space"):
        write_status(tmp_path, "bug", "Later.")
    assert read_status(tmp_path) == old
