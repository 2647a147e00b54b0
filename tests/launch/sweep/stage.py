"""Jobs that are played, not run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence

from moedist.launch.folder import claim_folder
from moedist.launch.sweep.job import Job
from moedist.train.status import Status

QUICK = ["experiment=null", "data=synthetic", "data.num_tokens=50000", "mesh.device=cpu", "launch.nproc=2"]
DONE = Status("done", 0, "All steps done.")


def losses(*values: float) -> list[dict]:
    """Rows of metrics: an evaluation every ten steps."""
    return [{"train/step": 10 * (i + 1), "eval/loss": value} for i, value in enumerate(values)]


class Played:
    """A job whose metrics and end are given; it writes a row at each poll, and leaves when asked to stop."""

    def __init__(self, job: Job, rows: Sequence[dict], end: Status, room: list[Played]):
        self.job, self.rows, self.end, self.room = job, list(rows), end, room
        self.claim = claim_folder(job.composed.config.run, job.composed.mapping)
        self.asked, self.log = False, job.run_dir / "logs" / "launcher.log"
        room.append(self)

    def poll(self) -> Status | None:
        if self.asked:
            return Status("preempted", 75, "Saved.")
        if not self.rows:
            return self.end
        with (self.job.run_dir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(self.rows.pop(0)) + "\n")
        return None

    def stop(self) -> None:
        self.asked = True

    def kill(self) -> None:
        self.asked = True

    def close(self) -> None:
        self.room.remove(self)
        self.claim.release()


@dataclasses.dataclass
class Stage:
    """Where jobs are played; ``script`` says how one goes."""

    script: Callable[[Job], tuple[Sequence[dict], Status]]
    size: int = 2
    overrides: tuple[str, ...] = ()
    started: list[Job] = dataclasses.field(default_factory=list)
    room: list[Played] = dataclasses.field(default_factory=list)

    def start(self, job: Job) -> Played | None:
        if len(self.room) == self.size:
            return None
        self.started.append(job)
        return Played(job, *self.script(job), self.room)
