from __future__ import annotations

import datetime
import json
import os
import signal
from pathlib import Path

import pytest
import yaml

from moedist.config import ConfigError, ConfigErrors
from moedist.launch.folder import FolderError, check_folder, choose_folder, claim_folder, compare_configs
from moedist.launch.saved import read_mapping
from moedist.train.config import RunFolder
from moedist.train.status import read_status, write_status

MAPPING = {
    "seed": 1,
    "run": {"dir": None},
    "mesh": {"ep": 2},
    "train": {"steps": 5, "log_every": 1},
    "moe": {"top_k": 2},
}


def changed(**values: object) -> dict:
    return {**MAPPING, **values}


def test_a_new_folder_is_made_whole(tmp_path: Path):
    claim = claim_folder(RunFolder(dir=str(tmp_path / "a" / "run")), MAPPING)
    assert claim.path == tmp_path / "a" / "run" and not claim.resumed
    assert read_mapping(claim.path / "config.yaml") == MAPPING
    assert {entry.name for entry in claim.path.iterdir()} == {"config.yaml", "logs", "checkpoints", "run.lock"}
    holder = json.loads((claim.path / "run.lock").read_text())
    assert holder["pid"] == os.getpid() and {"host", "since"} <= set(holder)
    claim.release()
    claim.release()


def test_an_empty_folder_may_be_named(tmp_path: Path):
    claim_folder(RunFolder(dir=str(tmp_path)), MAPPING).release()
    assert (tmp_path / "config.yaml").exists()


def test_names_below_runs_carry_date_time_and_name_and_never_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    now = datetime.datetime(2026, 3, 4, 5, 6, 7)
    assert choose_folder(RunFolder(name="my run/1"), now) == tmp_path / "runs" / "2026-03-04_05-06-07_my-run-1"
    claims = [claim_folder(RunFolder(name="x"), MAPPING) for _ in range(3)]
    assert len({claim.path for claim in claims}) == 3
    for claim in claims:
        claim.release()


def test_an_existing_run_is_never_reused_silently(tmp_path: Path):
    claim_folder(RunFolder(dir=str(tmp_path)), MAPPING).release()
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file() and path.name != "run.lock"}
    with pytest.raises(ConfigError, match="holds a run already. Name another run.dir, or .* run.resume=auto") as caught:
        claim_folder(RunFolder(dir=str(tmp_path)), changed(seed=2))
    assert (caught.value.key, caught.value.value) == ("run.dir", str(tmp_path))
    assert {path: path.read_bytes() for path in before} == before


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for resume in ("never", "auto"):
        with pytest.raises(ConfigError, match="is not empty and holds no run"):
            claim_folder(RunFolder(dir=str(tmp_path), resume=resume), MAPPING)
    (tmp_path / "nodes" / "logs").mkdir(parents=True)
    (tmp_path / "nodes" / "logs" / "launcher_a.log").touch()
    claim_folder(RunFolder(dir=str(tmp_path / "nodes")), MAPPING).release()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        claim_folder(RunFolder(dir=str(tmp_path / "file")), MAPPING)


def test_a_folder_in_use_names_its_holder(tmp_path: Path):
    claim = claim_folder(RunFolder(dir=str(tmp_path)), MAPPING)
    for resume in ("never", "auto"):
        with pytest.raises(ConfigError, match=f"is in use by process {os.getpid()} on "):
            claim_folder(RunFolder(dir=str(tmp_path), resume=resume), MAPPING)
    claim.release()


def test_the_lock_of_a_killed_process_is_gone(tmp_path: Path):
    child = os.fork()
    if child == 0:
        claim_folder(RunFolder(dir=str(tmp_path)), MAPPING)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert json.loads((tmp_path / "run.lock").read_text())["pid"] == child
    claim = claim_folder(RunFolder(dir=str(tmp_path), resume="auto"), MAPPING)
    assert claim.resumed
    claim.release()


def test_resume_keeps_the_earlier_configuration(tmp_path: Path):
    folder = RunFolder(dir=str(tmp_path), resume="auto")
    claim_folder(folder, MAPPING).release()
    write_status(tmp_path, "preempted", "Saved.")
    claim = claim_folder(folder, changed(mesh={"ep": 4}, train={"steps": 9, "log_every": 1}))
    assert claim.resumed and claim.changes == ("mesh.ep: 2 -> 4", "train.steps: 5 -> 9")
    assert read_status(tmp_path) is None, "the earlier end must not be taken for this one's"
    claim.release()
    assert read_mapping(tmp_path / "config_1.yaml") == MAPPING
    assert read_mapping(tmp_path / "config.yaml")["mesh"] == {"ep": 4}
    claim_folder(folder, MAPPING).release()
    claim_folder(folder, MAPPING).release()
    assert read_mapping(tmp_path / "config_2.yaml")["mesh"] == {"ep": 4}
    assert not (tmp_path / "config_3.yaml").exists(), "nothing had changed"


def test_resume_refuses_what_changes_the_run(tmp_path: Path):
    folder = RunFolder(dir=str(tmp_path), resume="auto")
    claim_folder(folder, MAPPING).release()
    other = changed(seed=2, moe={"top_k": 1, "new": True})
    with pytest.raises(ConfigErrors) as caught:
        claim_folder(folder, other)
    errors = {error.key: str(error) for error in caught.value.errors}
    assert set(errors) == {"seed", "moe.top_k", "moe.new"}
    assert "seed = 2 differs from the run in" in errors["seed"] and "has 1" in errors["seed"]
    assert "run.allow_changes=[seed]" in errors["seed"] and "has no such key" in errors["moe.new"]
    assert read_mapping(tmp_path / "config.yaml") == MAPPING
    assert [error.key for error in check_folder(folder, other)] == ["seed", "moe.top_k", "moe.new"]
    allowed = RunFolder(dir=str(tmp_path), resume="auto", allow_changes=("seed", "moe"))
    claim = claim_folder(allowed, other)
    assert claim.changes == ("seed: 1 -> 2", "moe.top_k: 2 -> 1", "moe.new: None -> True")
    claim.release()


def test_allowed_branches_end_at_a_dot():
    with pytest.raises(ConfigErrors):
        compare_configs({"moe_x": 1}, {"moe_x": 2}, ["moe"], Path("run"))


def test_checks_before_anything_is_made(tmp_path: Path):
    assert check_folder(RunFolder(), MAPPING) == []
    assert check_folder(RunFolder(dir=str(tmp_path / "new"), resume="auto"), MAPPING) == []
    assert not (tmp_path / "new").exists()
    (error,) = check_folder(RunFolder(resume="auto"), MAPPING)
    assert error.key == "run.resume" and "Set run.dir" in error.remedy
    (error,) = check_folder(RunFolder(resume=str(tmp_path / "gone")), MAPPING)
    assert (error.key, error.value) == ("run.resume", str(tmp_path / "gone"))


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/step_00000003"])
def test_going_on_from_another_run_compares_with_it(tmp_path: Path, place: str):
    (tmp_path / "checkpoints" / "step_00000003").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(MAPPING))
    folder = RunFolder(resume=str(tmp_path / place))
    (error,) = check_folder(folder, MAPPING)
    assert error.key == "run.resume" and "holds no checkpoint" in str(error), "never a fresh start in silence"
    (tmp_path / "checkpoints" / "step_00000003" / "manifest.json").touch()
    assert check_folder(folder, MAPPING) == []
    (error,) = check_folder(folder, changed(seed=3))
    assert error.key == "seed"


def test_a_folder_without_permission_is_an_environments_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def denied(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)  # the user who runs tests may be root
    with pytest.raises(FolderError, match="cannot be written .Permission denied.. Name a folder") as caught:
        claim_folder(RunFolder(dir=str(tmp_path / "run")), MAPPING)
    assert (caught.value.key, caught.value.exit_code) == ("run.dir", 4)


def test_a_disk_without_room_is_an_environments_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_room(path: Path, mapping: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moedist.launch.folder.write_config", no_room)
    with pytest.raises(FolderError, match="No space left on device"):
        claim_folder(RunFolder(dir=str(tmp_path / "run")), MAPPING)
