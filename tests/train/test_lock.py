from __future__ import annotations

import fcntl
import json
from pathlib import Path

from moedist.train.lock import LOCK, describe_holder, holder_of, is_held


def test_a_lock_is_seen_and_stays_its_holders(tmp_path: Path):
    assert not is_held(tmp_path)
    with (tmp_path / LOCK).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert is_held(tmp_path) and is_held(tmp_path)
    assert not is_held(tmp_path)
    with (tmp_path / LOCK).open("w") as wanted:
        fcntl.flock(wanted, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_the_holder_in_words(tmp_path: Path):
    assert describe_holder(tmp_path) == "another process"
    (tmp_path / LOCK).write_text(json.dumps({"host": "node0", "pid": 7, "since": "noon"}))
    assert holder_of(tmp_path) == {"host": "node0", "pid": "7", "since": "noon"}
    assert describe_holder(tmp_path) == "process 7 on node0, since noon"
    (tmp_path / LOCK).write_text("{")
    assert describe_holder(tmp_path) == "another process"
