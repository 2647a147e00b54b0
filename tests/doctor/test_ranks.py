from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from moedist.doctor import ranks as program
from moedist.doctor import roll_call
from moedist.doctor.ranks import Trial, block_sizes, partner_of
from moedist.doctor.roll_call import MissingRanksError, RollCall
from moedist.launch.rank_check import check_ranks
from moedist.launch.start import Ranks
from moedist.mesh import MeshConfig, adopt_mesh
from moedist.train.config import LaunchConfig
from tests.ranks import Here, RankPool

Pools = Callable[[int], RankPool]


@pytest.mark.parametrize("world_size", [2, 3, 4, 7, 8])
def test_everybody_meets_everybody_once(world_size: int):
    met = []
    for turn in range(world_size + world_size % 2 - 1):
        partners = [partner_of(rank, turn, world_size) for rank in range(world_size)]
        for rank, partner in enumerate(partners):
            assert partner is None or (partner != rank and partners[partner] == rank)
        met += [(rank, partner) for rank, partner in enumerate(partners) if partner is not None and rank < partner]
    assert sorted(met) == list(itertools.combinations(range(world_size), 2))


def test_uneven_blocks():
    for world_size in (2, 3, 8):
        sizes = block_sizes(1000, world_size, even=False)
        assert sizes[0] == 0 < sizes[-1] and sum(sizes) <= 1000
    assert block_sizes(1000, 1, even=False) == [1000]


def call(rolls: list[RollCall], act: Callable[[RollCall], object]) -> list[object]:
    """What each rank's part returns or raises, all at once."""
    answers: list[object] = [None] * len(rolls)

    def run(place: int) -> None:
        try:
            answers[place] = act(rolls[place])
        except Exception as error:
            answers[place] = error

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(rolls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def test_all_come_and_say_a_word():
    store = dist.HashStore()
    answers = call([RollCall(store, rank, 3, 20.0) for rank in range(3)], lambda roll: roll.begin("x", f"n{roll.rank}"))
    assert answers[0] == answers[1] == answers[2]
    assert [word for word, _ in answers[0]] == ["n0", "n1", "n2"]


def test_those_that_do_not_come_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(roll_call, "GRACE_S", 2.0)
    store = dist.HashStore()
    answers = call([RollCall(store, rank, 4, 2.0) for rank in (0, 2)], lambda roll: roll.begin("the meeting"))
    for answer in answers:
        assert isinstance(answer, MissingRanksError) and answer.ranks == [1, 3]
        assert str(answer) == "ranks 1, 3 did not come to the meeting within 2 s"
    answers = call([RollCall(dist.HashStore(), 2, 4, 0.2)], lambda roll: roll.begin("the meeting"))
    assert isinstance(answers[0], MissingRanksError) and answers[0].ranks == [0], "the one that calls the roll"


ERROR = RuntimeError("gloo: timed out")


def lose(roll: RollCall) -> Exception:
    with roll:
        return roll.lost("all-reduce", ERROR)


@pytest.mark.parametrize("hung", [0, 2])
def test_those_that_hang_in_a_collective_are_named(hung: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(roll_call, "BEAT_S", 0.02)
    store, others = dist.HashStore(), {0, 1, 2} - {hung}
    answers = call([RollCall(store, rank, 3, 600.0) for rank in others], lose)
    for answer in answers:
        assert isinstance(answer, MissingRanksError) and answer.ranks == [hung], "long before the limit"
        assert answer.phase == "the end of all-reduce"


def test_one_that_lives_and_never_comes_back_is_named_at_the_limit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(roll_call, "BEAT_S", 0.02)
    monkeypatch.setattr(roll_call, "GRACE_S", 0.5)
    store = dist.HashStore()
    with RollCall(store, 2, 3, 1.0):
        answers = call([RollCall(store, rank, 3, 1.0) for rank in (0, 1)], lose)
    assert [answer.ranks for answer in answers] == [[2], [2]]


@pytest.mark.parametrize("late", [0, 2])
def test_one_that_is_only_slow_is_not_taken_for_hung(late: int, monkeypatch: pytest.MonkeyPatch):
    """Its own time-out comes long after the others' have had enough beats; nobody is missing then."""
    monkeypatch.setattr(roll_call, "BEAT_S", 0.02)
    store = dist.HashStore()

    def lose_late(roll: RollCall) -> Exception:
        with roll:
            if roll.rank == late:
                store.wait(["beat/1"])
                while int(store.get("beat/1")) < 5 * roll_call.SILENT_BEATS:
                    pass
            return roll.lost("barrier", ERROR)

    answers = call([RollCall(store, rank, 3, 600.0) for rank in range(3)], lose_late)
    assert answers == [ERROR] * 3, "it stays what it is"


class StoppedStore:
    """Its keeper is stopped: it takes what it is sent, and answers nothing."""

    def __getattr__(self, name: str) -> Callable[..., object]:
        return lambda *args: threading.Event().wait()


def test_a_store_that_does_not_answer_names_the_rank_that_keeps_it():
    roll = RollCall(StoppedStore(), 1, 3, 0.2)
    assert roll.lost("all-reduce", ERROR).ranks == [0]
    with pytest.raises(MissingRanksError) as missing:
        roll.begin("the meeting")
    assert missing.value.ranks == [0]


def test_rank_0_may_be_late_itself():
    """The others wait for those that it waits for, from when it came."""
    store = dist.HashStore()
    rolls = [RollCall(store, rank, 3, 3.0) for rank in range(3)]

    def come(roll: RollCall) -> object:
        if roll.rank == 0:
            store.wait(["x/1"])
        if roll.rank == 2:
            store.wait(["x/0"])
        return roll.begin("x")

    assert all(len(answer) == 3 for answer in call(rolls, come))


def _trial(here: Here, folder: str) -> dict[str, object]:
    program.BYTES["cpu"], program.TRIES = 2**18, 1
    entered: list[str] = []
    roll = RollCall(dist.FileStore(f"{folder}/store", here.world), here.rank, here.world, 30.0)
    trial = Trial(adopt_mesh(1, "cpu"), roll, entered.append)
    collectives = [trial.barrier(), trial.all_reduce(), trial.all_to_all(even=True), trial.all_to_all(even=False)]
    pair_bytes, pair_s = trial.pairs()
    return {"compute": trial.compute(), "all": collectives, "bytes": pair_bytes, "pairs": pair_s, "entered": entered}


def test_ranks_measure_each_other(ranks: Pools, tmp_path: Path):
    answers = ranks(2).run(_trial, str(tmp_path))
    assert answers[0] == answers[1], "all know all"
    assert len(answers[0]["compute"]) == 2 and answers[0]["bytes"] > 0
    assert [collective.wrong for collective in answers[0]["all"]] == [()] * 4
    assert all(collective.seconds > 0 for collective in answers[0]["all"])
    lines = answers[0]["pairs"]
    assert lines[0][0] is lines[1][1] is None and lines[0][1] > 0 < lines[1][0]
    assert answers[0]["entered"] == [
        "barrier",
        "all-reduce",
        "all-to-all even",
        "all-to-all uneven",
        "pairs",
        "compute",
    ]


def _garbled(here: Here, folder: str) -> list[tuple[int, ...]]:
    program.BYTES["cpu"], program.TRIES = 2**18, 1
    whole = program.all_to_all

    def flips_a_value(*args: object) -> object:
        received = whole(*args)
        if here.rank == 1 and received.numel():
            received[-1] += 1
        return received

    program.all_to_all = flips_a_value
    try:
        roll = RollCall(dist.FileStore(f"{folder}/store", here.world), here.rank, here.world, 30.0)
        trial = Trial(adopt_mesh(1, "cpu"), roll, lambda phase: None)
        return [trial.all_to_all(even=True).wrong, trial.all_to_all(even=False).wrong]
    finally:
        program.all_to_all = whole


def test_a_rank_that_receives_something_else_is_named(ranks: Pools, tmp_path: Path):
    assert ranks(2).run(_garbled, str(tmp_path)) == [[(1,), (1,)]] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "rank", "words"),
    [
        ("start", 2, "rank 2 did not come to the meeting within 20 s"),
        ("start", 0, "rank 0 did not come to 127.0.0.1:"),
        ("all-reduce", 1, "rank 1 did not come to all-reduce within 20 s"),
        ("in barrier", 2, "rank 2 did not come to the end of barrier within 20 s"),
        ("in all-reduce", 0, "rank 0 did not come to "),  # it, or its end: the store ends with rank 0
        ("asleep in barrier", 1, "rank 1 did not come to the end of barrier within 20 s"),
    ],
)
def test_a_rank_that_never_comes_is_named(where: str, rank: int, words: str, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    target = ["tests.doctor.rank_that_stops", where, str(rank)]
    mesh = MeshConfig(device="cpu", timeout_s=20.0)  # the ranks of a busy machine start apart
    checked = check_ranks(Ranks(3, 1, 1), LaunchConfig(), mesh, target)
    (found,) = checked.findings
    assert checked.measured is None and checked.exit_code == 5 and found.level == "problem"
    assert found.text.startswith(words), found


@pytest.mark.slow
def test_a_rank_that_dies_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    mesh = MeshConfig(device="cpu", timeout_s=20.0)
    target = ["tests.doctor.rank_that_stops", "dies", "1"]
    checked = check_ranks(Ranks(2, 1, 1), LaunchConfig(max_restarts=2), mesh, target)
    (found,) = checked.findings
    assert (
        checked.measured is None and checked.exit_code == 5 and found.text.startswith("Rank 1 was ended by SIGKILL.")
    ), found


@pytest.mark.slow
def test_the_command_as_users_give_it(tmp_path: Path):
    import json

    command = [sys.executable, "-m", "moedist", "doctor", "--json", "--nproc", "3", "mesh.device=cpu", "mesh.ep=1"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "WANDB_MODE": "offline"}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    told = json.loads(ended.stdout)
    assert ended.returncode == told["exit_code"] == 0, ended.stderr
    assert len(told["measured"]["pair_s"]) == 3 and told["measured"]["backend"] == "gloo"
    assert {"disk", "ranks", "pairs on a host"} <= {finding["check"] for finding in told["findings"]}
    assert not list(tmp_path.iterdir()), "nothing is made"
