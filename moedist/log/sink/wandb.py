"""Metrics to Weights & Biases: online where that works, else to files below the run folder that upload later.

A run never waits here: one daemon thread imports, decides, connects and sends; the loop fills a bounded queue.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import netrc
import os
import queue
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np

from moedist.log.earlier import earlier_records
from moedist.log.run_files import read_metrics
from moedist.log.series import Row, Series, Tables
from moedist.log.sink.contract import RunInfo, Sink, SinkConfig, Value, step_of

PROBE_S = 3.0
INIT_S = 15
CLOSE_S = 10.0
DONE_S = 30.0
"""The same for a run that is done: nothing will send the rest."""
SETTLE_S = 60.0
"""How long a new process waits for what a killed one left writing."""
MAX_BINS = 512  # of a W&B histogram
FLUSH_ROWS = 1000  # log steps between two uploads of tables
QUEUE_SIZE = 1000

# wandb records command lines, the machine, the packages, git and code by itself; secrets travel in all of them.
PRIVATE: dict[str, Any] = {
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "save_code": False,
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_save_requirements": False,
    "host": "",
}


@dataclasses.dataclass(frozen=True)
class WandbConfig(SinkConfig):
    """Weights & Biases. The key comes from WANDB_API_KEY or netrc only, never from a config.

    Attributes:
        project, entity, group, tags: where the run stands there; entity None for the key's default, group None for the
            runs that began as one (`RunInfo.group_id`).
        mode: ``auto`` obeys WANDB_MODE, and without it is online where there is a key and the server (WANDB_BASE_URL)
            answers; ``online`` falls back to offline likewise, with a warning; ``offline`` writes files below
            ``<run>/wandb`` for ``wandb sync``; ``disabled`` does nothing.
    """

    project: str = "moedist"
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"

    def open(self, run: RunInfo, say: Callable[[str], None]) -> Sink:
        return WandbSink(self, run, say)


class WandbSink(Sink):
    """Sends records in the background, `QUEUE_SIZE` of them at most waiting.

    ``train/step`` is the axis of everything; W&B's own step is never set, so that rows after a resume from an older
    step are kept. Steps that an earlier process of the same run already sent are not sent again: the files below
    ``<run>/wandb`` and, online, the server tell which. Those that it did not get to send, because it was killed or had
    no time to finish, are sent first, from ``metrics.jsonl``.
    """

    def __init__(self, config: WandbConfig, run: RunInfo, say: Callable[[str], None]):
        self._config, self._run, self._say = config, run, say
        self._queue: queue.Queue[Callable[[Any], None] | None] = queue.Queue(QUEUE_SIZE)
        self._folder = run.directory / "wandb"
        self._exit_code = 0
        self._warned: set[str] = set()
        self._series, self._tables = Series(run.max_scalar_keys), Tables()
        self._held: set[int] = set()  # steps that earlier processes have sent
        self._last_online = 0
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def write(self, record: Mapping[str, Value]) -> None:
        self._later(lambda tracker: self._send_row(tracker, record))

    def saved(self, step: int, checkpoint: Path) -> None:
        self._later(lambda tracker: self._send_checkpoint(tracker, step, checkpoint))

    def alert(self, title: str, text: str) -> None:
        self._later(lambda tracker: tracker.alert(title=title, text=text, level="WARN"))

    def _later(self, send: Callable[[Any], None]) -> None:
        try:
            self._queue.put_nowait(send)
        except queue.Full:
            self._warn("is too slow; it misses rows that metrics.jsonl has")

    def close(self, status: str) -> None:
        self._exit_code = {"done": 0, "preempted": 75}.get(status, 1)
        limit_s = DONE_S if status == "done" else CLOSE_S
        deadline = time.monotonic() + limit_s
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=limit_s)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._warn(
                f"did not finish within {limit_s:.0f} s: up to {self._queue.qsize()} rows are in metrics.jsonl only, "
                f"and are sent when the run is resumed; {self._upload_later()}"
            )

    def _work(self) -> None:
        earlier = list(self._folder.glob(f"*run-*-{self._run.run_id}"))
        try:
            tracker = self._start()
            if tracker is None:
                self._drain()
                return
            # What was on its way to the server counts where the server says that it came.
            local = [run for run in earlier if tracker.offline or run.name.startswith("offline-")]
            if not settled(local):
                self._warn("may have some rows twice: an earlier process of the run still writes its file")
            self._held = stored_steps(local)
            self._last_online = _last_step_online(tracker)
            self._tables = Tables(read_metrics(self._run.directory))
            with self._may_miss("rows of an earlier process"):
                self._catch_up(tracker)
        except Exception as error:
            self._warn(f"is off: {_first_line(error)}")
            with contextlib.suppress(Exception):  # it may never have begun
                _end_service()
            self._drain()
            return
        while (send := self._queue.get()) is not None:
            with self._may_miss("rows"):
                send(tracker)
        self._send_tables(tracker)
        try:
            tracker.finish(exit_code=self._exit_code)
            _end_service()  # finish returns before the file is whole
        except Exception as error:  # the server, or wandb's own process, went away
            self._warn(f"did not get everything: {_first_line(error)}; {self._upload_later()}")
        if tracker.offline:
            self._say(f"W&B: {self._upload_later()}")

    def _start(self) -> Any:
        """The tracker's run, or None where it is disabled."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # wandb's own telemetry, which prints when it fails
        mode, reason = decide_mode(self._config.mode)
        if mode == "disabled":
            return None
        tracker = None
        if mode == "online":
            try:
                tracker = self._init("online")
                self._say(f"W&B: online, {tracker.url}")
            except Exception as error:  # a key that the server refuses, a server that goes away meanwhile
                reason = _first_line(error)
                _end_service()  # it holds the id of the run that failed to start
        if tracker is None:
            tracker = self._init("offline")
            self._say("W&B: offline" + (f" ({reason})" if reason else ""))
        tracker.define_metric("train/step")
        # Not synced: W&B would add the last step to rows without one, and have it twice.
        tracker.define_metric("*", step_metric="train/step", step_sync=False)
        return tracker

    def _init(self, mode: Literal["online", "offline"]) -> Any:
        import wandb

        settings = wandb.Settings(
            **PRIVATE,
            silent=True,
            init_timeout=INIT_S,
            login_timeout=INIT_S,
            finish_timeout=0.8 * CLOSE_S,
            finish_timeout_raises=True,
            x_transaction_log_flush_interval=0.1,  # seconds; what a kill may cost
        )
        return wandb.init(
            dir=self._run.directory,
            project=self._config.project,
            entity=self._config.entity,
            group=self._config.group or self._run.group_id,
            tags=self._config.tags,
            name=self._run.name,
            id=self._run.run_id,
            resume="allow",
            mode=mode,
            config={**self._run.config, "hardware": self._run.device, "environment": dict(self._run.environment)},
            settings=settings,
        )

    def _catch_up(self, tracker: Any) -> None:
        for record in earlier_records(self._run):
            # Cut on its own: without arrays it must not choose the series of the records to come.
            self._send_series(tracker, step_of(record), Series(self._run.max_scalar_keys).row(record))

    def _send_row(self, tracker: Any, record: Mapping[str, Value]) -> None:
        row = self._series.row(record)
        self._tables.add(step_of(record), row)
        self._send_series(tracker, step_of(record), row)
        if self._tables.waiting >= FLUSH_ROWS:
            self._send_tables(tracker)

    def _send_series(self, tracker: Any, step: int, row: Row) -> None:
        if step not in self._held and step > self._last_online:
            bars = {key: expert_histogram(count_E) for key, count_E in row.histograms.items()}
            tracker.log({**row.scalars, **bars})

    def _send_tables(self, tracker: Any) -> None:
        with self._may_miss("tables"):
            import wandb

            found = {
                key: wandb.Table(columns=list(part.columns), data=part.rows)
                for key, part in self._tables.flush().items()
            }
            if found:
                tracker.log(found)  # a row of its own, without a step

    def _send_checkpoint(self, tracker: Any, step: int, checkpoint: Path) -> None:
        """Where the checkpoint lies and what it is of; its files stay where they are."""
        import wandb

        about = {"step": step, "run_id": self._run.run_id}
        artifact = wandb.Artifact(f"checkpoint-{self._run.run_id}", type="checkpoint", metadata=about)
        artifact.add_reference(checkpoint.as_uri(), name=checkpoint.name, checksum=False)
        tracker.log_artifact(artifact, aliases=["latest", f"step-{step}"])

    @contextlib.contextmanager
    def _may_miss(self, what: str) -> Iterator[None]:
        """Trouble inside costs ``what``, and one warning."""
        try:
            yield
        except Exception as error:
            self._warn(f"misses {what}: {_first_line(error)}")

    def _drain(self) -> None:
        while self._queue.get() is not None:
            pass

    def _upload_later(self) -> str:
        return f"to upload what is not there: wandb sync {self._folder}/*run-*"

    def _warn(self, what: str) -> None:
        """Each kind of trouble once."""
        kind = what.partition(":")[0]
        if kind not in self._warned:
            self._warned.add(kind)
            self._say(f"Warning: W&B {what}")


def expert_histogram(count_E: np.ndarray | Sequence[int]) -> Any:
    """One bin per expert by global id; above `MAX_BINS` experts, one per equal run of neighbours."""
    import wandb

    width = -(-len(count_E) // MAX_BINS)
    edges = np.arange(0, len(count_E) + width, width)
    count_B = np.add.reduceat(np.asarray(count_E), edges[:-1])
    return wandb.Histogram(np_histogram=(count_B, edges))


def stored_steps(runs: Iterable[Path]) -> set[int]:
    """The steps in the ``.wandb`` files of run folders, read by wandb's own reader, also where a kill cut a file off.

    What a process handed to wandb says less: wandb loses what it has not flushed when that process is killed.

    Raises:
        RuntimeError: the reader was killed, and so what it said is not all.
    """
    steps = set()
    for path in (path for run in runs for path in run.glob("*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        # A session of its own: who stops this rank signals its whole group.
        reader = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
        )
        if reader.returncode < 0:
            raise RuntimeError(f"{path} could not be read; what is not there is sent when the run is resumed")
        for line in reader.stdout.splitlines():
            row = json.loads(line).get("history", {}).get("item", {})
            if "train/step" in row:
                steps.add(row["train/step"])
    return steps


def settled(runs: Sequence[Path]) -> bool:
    """Waits until no process of this machine has a ``.wandb`` file of these run folders open: wandb's own process goes
    on writing for some seconds after the one that it served was killed. False where `SETTLE_S` do not suffice.
    """
    deadline = time.monotonic() + SETTLE_S
    files = {path for run in runs for path in run.resolve().glob("*.wandb")}
    while files & _open_files():
        if time.monotonic() > deadline:
            return False
        time.sleep(SETTLE_S / 100)
    return True


def _open_files() -> set[Path]:
    """What this user's processes have open; nothing on a system without /proc."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # it has been closed meanwhile, or is another user's
            found.add(Path(os.readlink(link)))
    return found


def decide_mode(wish: str) -> tuple[Literal["online", "offline", "disabled"], str]:
    """Where a run goes, before wandb tries (it would block for minutes): the mode, and why it is not online.

    Takes up to `PROBE_S` seconds, and no network where the answer is known without.
    """
    if wish == "auto":
        wish = {"dryrun": "offline", "run": "online"}.get(mode := os.environ.get("WANDB_MODE", "auto"), mode)
        reason = "WANDB_MODE"
    else:
        reason = ""
    if wish == "disabled":
        return "disabled", reason
    if wish == "offline":
        return "offline", reason
    import wandb

    url = wandb.setup(wandb.Settings(silent=True)).settings.base_url
    if not has_key(url):
        return "offline", "no API key: set WANDB_API_KEY or run wandb login"
    trouble = probe(url)
    return ("offline", trouble) if trouble else ("online", "")


def default_entity() -> str:
    """Whose the user's key is; asks the server."""
    import wandb

    return str(wandb.Api(timeout=INIT_S).default_entity)


def has_key(base_url: str) -> bool:
    """Whether wandb will find credentials without asking: environment or netrc."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    # wandb takes the keys of its old address for its present one.
    hosts = {urlsplit(base_url).netloc} | ({"api.wandb.ai"} if base_url.endswith(".coreweave.com") else set())
    try:
        entries = netrc.netrc(os.environ.get("NETRC") or Path.home() / ".netrc")
    except (OSError, netrc.NetrcParseError):
        return False
    return any(host in entries.hosts for host in hosts)


def probe(base_url: str) -> str:
    """Why the server is of no use, or '' if it answers within `PROBE_S` seconds in all, name look-up included."""
    host = urlsplit(base_url).netloc.rpartition("@")[2]
    trouble = f"{host} does not answer within {PROBE_S:.0f} s"

    # The smallest question to the end point that wandb.init will talk to: a front page may answer where that one hangs.
    request = urllib.request.Request(
        f"{base_url}/graphql", data=b'{"query": "{__typename}"}', headers={"Content-Type": "application/json"}
    )

    def ask() -> None:
        nonlocal trouble
        try:
            with urllib.request.urlopen(request, timeout=2 * PROBE_S):
                trouble = ""
        except urllib.error.HTTPError as error:  # an answer all the same, unless the server is broken
            trouble = f"{host} answers with error {error.code}" if error.code >= 500 else ""
        except (OSError, http.client.HTTPException) as error:
            trouble = f"{host} cannot be reached: {_first_line(getattr(error, 'reason', error))}"

    # A thread bounds all of it: name look-up knows no time-out, and the socket's own is per packet.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_S)
    return trouble


def _end_service() -> None:
    """Waits for wandb's own process to write what it has and to end."""
    import wandb

    wandb.teardown()


def _last_step_online(tracker: Any) -> int:
    """The last step that the server already has of this run; 0 offline and for a new run."""
    step = tracker.summary.get("train/step", 0)
    return step if isinstance(step, int) else 0


def _first_line(error: object) -> str:
    """An error as part of a sentence; URLs lose their credentials."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return re.sub(r"//[^/\s]*@", "//", line)
