"""Weights & Biases without Weights & Biases: offline files read back, and servers that don't play along."""

from __future__ import annotations

import dataclasses
import gzip
import http.server
import json
import socket
import subprocess
import sys
import threading
import types

import numpy as np
import pytest

from moedist.log import series as series_module
from moedist.log.series import Series, Tables
from moedist.log.sink import wandb as sink_module
from moedist.log.sink.jsonl import JsonlConfig
from moedist.log.sink.wandb import WandbConfig, decide_mode, expert_histogram, has_key, probe, stored_steps
from tests.log.sink.records import record
from tests.rows import flat

NAMES = ("drop_rate", "max_vio", "load_entropy", "router_entropy", "dead_experts", "balance_loss", "z_loss", "load_cv")
KEY = "canary5f0cbd35e1a44b2c9e8d7f6a5b4c3d2e1f"


@pytest.fixture(autouse=True)
def stranger(monkeypatch, tmp_path_factory):
    """A user without a key, settings or a network, and wandb as freshly imported."""
    for name in ("API_KEY", "IDENTITY_TOKEN_FILE", "MODE", "PROJECT", "RUN_ID", "DIR"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / ".netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(home))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(sink_module, "PROBE_S", 0.5)
    yield
    if library := sys.modules.get("wandb"):
        library.teardown()


def log_steps(run_info, *records, config: WandbConfig | None = None, status: str = "done") -> list[str]:
    said: list[str] = []
    sink = (config or WandbConfig()).open(run_info, said.append)
    for each in records:
        sink.write(each)
    sink.close(status)
    return said


def stored(run_info, whole: bool = True) -> list[dict]:
    """All records of all offline files of a run, ``whole`` or cut off, read by wandb's own reader."""
    found = []
    for path in sorted(run_info.directory.glob("wandb/*run-*/*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        lines = subprocess.run(command, check=whole, stdout=subprocess.PIPE, text=True).stdout
        found += [json.loads(line) for line in lines.splitlines()]
    return found


def history(records: list[dict]) -> list[dict]:
    return [each["history"]["item"] for each in records if each["type"] == "history"]


def test_an_offline_file_holds_the_documented_keys_with_their_values(run_info):
    config = WandbConfig(project="p", group="g", tags=("a", "b"))
    said = log_steps(run_info, record(10), record(20, float("nan")) | {"eval/loss": 2.25}, config=config)
    assert said[0] == "W&B: offline (no API key: set WANDB_API_KEY or run wandb login)"
    assert said[1] == f"W&B: to upload what is not there: wandb sync {run_info.directory}/wandb/*run-*"
    records = stored(run_info)
    first, second = history(records)
    scalars = {key: value for key, value in flat(record(10)).items() if not isinstance(value, list)}
    assert scalars.items() <= first.items()
    assert first["moe/layer_01/load._type"] == "histogram"
    assert first["moe/layer_01/load.values"] == [5, 2, 1, 0] and first["moe/layer_01/load.bins"] == [0, 1, 2, 3, 4]
    assert first["moe/layer_01/kept.values"] == [3, 2, 1, 0]
    assert [first[f"moe/layer_01/expert_{expert:03d}/load"] for expert in range(4)] == [5, 2, 1, 0]
    assert [first[f"moe/layer_01/expert_{expert:03d}/kept"] for expert in range(4)] == [3, 2, 1, 0]
    assert second["train/loss"] == "NaN" and second["eval/loss"] == 2.25

    (run,) = [each["run"] for each in records if each["type"] == "run"]
    assert (run["run_id"], run["display_name"], run["project"], run["run_group"]) == ("abcd1234", "tiny", "p", "g")
    assert run["tags"] == ["a", "b"] and run["resume"] is True
    assert run["config"]["update"]["moe"] == {"num_experts": 8}


def test_environment_checkpoints_and_alerts_are_in_the_file(run_info, tmp_path):
    checkpoint = tmp_path / "checkpoints" / "step_00000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_bytes(b"w" * 1000)
    sink = WandbConfig().open(run_info, print)
    sink.write(record(10))
    sink.saved(10, checkpoint)
    sink.alert("the run stalls", "No record.")
    sink.close("done")
    records = stored(run_info)
    (run,) = [each["run"] for each in records if each["type"] == "run"]
    assert run["run_group"] == "first123", "runs that began as one"
    assert run["config"]["update"]["environment"] == {"code": "abc", "torch": "2"}
    (artifact,) = [each["artifact"] for each in records if each["type"] == "artifact"]
    assert artifact["name"] == "checkpoint-abcd1234" and set(artifact["aliases"]) == {"latest", "step-10"}
    references = [content["ref"] for content in artifact["manifest"]["contents"]]
    assert references == [f"{checkpoint.as_uri()}/weights"], "the files stay where they are"
    (alert,) = [each["alert"] for each in records if each["type"] == "alert"]
    assert (alert["title"], alert["text"]) == ("the run stalls", "No record.")


def test_train_step_is_the_axis_of_everything(run_info):
    log_steps(run_info, record(10))
    metrics = [each["metric"] for each in stored(run_info) if each["type"] == "metric"]
    assert {metric.get("name") or metric.get("glob_name"): metric.get("step_metric") for metric in metrics} == {
        "train/step": None,
        "*": "train/step",
    }


@pytest.mark.pitfall("34")
def test_a_resumed_run_goes_on_under_its_id_and_sends_no_step_twice(run_info):
    log_steps(run_info, *map(record, (10, 20, 30)), status="failed")
    later = dataclasses.replace(run_info, resumed_step=10)
    log_steps(later, *map(record, (20, 30, 40)))
    records = stored(run_info)
    assert [row["train/step"] for row in history(records)] == [10, 20, 30, 40]
    assert {each["run"]["run_id"] for each in records if each["type"] == "run"} == {"abcd1234"}
    assert [each["exit"].get("exit_code", 0) for each in records if each["type"] == "exit"] == [1, 0]


def test_steps_are_read_from_files_that_a_kill_cut_off(run_info):
    log_steps(run_info, *map(record, (10, 20, 30)))
    (path,) = run_info.directory.glob("wandb/*run-*/*.wandb")
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.rindex(b"moe/layer_01")])  # in the middle of the last row
    assert stored_steps([path.parent]) == {10, 20}
    later = dataclasses.replace(run_info, resumed_step=10)
    log_steps(later, *map(record, (20, 30)))
    path.write_bytes(b"")
    assert stored_steps(run_info.directory.glob("wandb/offline-run-*")) == {30}


@pytest.mark.pitfall("34")
@pytest.mark.parametrize("began_step", [pytest.param(0, marks=pytest.mark.slow), 15])
def test_what_a_killed_process_did_not_send_is_sent_by_the_next_one(run_info, began_step: int):
    """It wrote three records down; the first never reached W&B, and the last was cut off in its file."""
    lines = JsonlConfig().open(run_info, print)
    for each in (record(10), record(20), record(30, float("nan"))):
        lines.write(each)
    lines.close("failed")
    log_steps(run_info, record(20), record(30, float("nan")), status="failed")
    (path,) = run_info.directory.glob("wandb/*run-*/*.wandb")
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.rindex(b"moe/layer_01")])
    log_steps(dataclasses.replace(run_info, resumed_step=30, began_step=began_step), record(40))
    rows = history(stored(run_info, whole=False))
    by_step = {row["train/step"]: row for row in rows}
    wanted = (10, 20, 30, 40) if began_step == 0 else (20, 30, 40)
    assert sorted(by_step) == sorted(row["train/step"] for row in rows) == list(wanted), "and none of another run"
    assert by_step[30]["train/loss"] == "NaN" and by_step[30].keys() == by_step[40].keys(), "histograms too"
    for key, value in by_step[30].items():
        if key.startswith("moe/"):
            digits = {} if isinstance(value, (str, list)) else {"rel": 1e-5}  # columns have fewer in the file
            assert value == pytest.approx(by_step[40][key], **digits), key


def test_a_file_that_could_not_be_read_is_not_taken_for_an_empty_one(run_info, monkeypatch):
    """Nothing is sent twice because whoever stopped the run killed the reader."""
    for sink in (JsonlConfig(), WandbConfig()):
        (opened := sink.open(run_info, print)).write(record(10))
        opened.close("failed")
    later = dataclasses.replace(run_info, resumed_step=10)
    with monkeypatch.context() as killed:
        ended = subprocess.CompletedProcess([], -15, stdout="")
        reader = types.SimpleNamespace(run=lambda *args, **kwargs: ended, PIPE=None, DEVNULL=None)
        killed.setattr(sink_module, "subprocess", reader)
        said = log_steps(later, record(20), status="failed")
    assert any("W&B is off" in line and "could not be read" in line for line in said), said
    log_steps(later, record(20))
    assert [row["train/step"] for row in history(stored(run_info))] == [10, 20]


def test_files_are_read_when_wandbs_own_process_has_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(sink_module, "SETTLE_S", 1.0)
    (path := tmp_path / "run-abcd1234.wandb").touch()
    assert sink_module.settled([tmp_path])
    with path.open("ab"):
        assert not sink_module.settled([tmp_path])
    monkeypatch.setattr(sink_module, "SETTLE_S", 60.0)
    code = (
        f"import sys; file = open({str(path)!r}, 'ab'); print('open', flush=True); sys.stdin.read(); file.write(b'x')"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout.readline()
        threading.Timer(0.5, writer.stdin.close).start()
        assert sink_module.settled([tmp_path]) and path.read_bytes() == b"x"


def test_no_secret_and_no_argument_is_in_any_file_of_the_run(run_info, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["moedist", "token=canary-argument"])
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("SOME_TOKEN", "canary-variable")
    monkeypatch.setenv("WANDB_BASE_URL", "http://me:canary-password@127.0.0.1:9")
    said = log_steps(run_info, record(10))
    files = [path for path in run_info.directory.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert [path for path in files if b"canary" in path.read_bytes()] == []
    assert "offline" in said[0] and "canary" not in "".join(said)
    records = stored(run_info)
    (run,) = [each["run"] for each in records if each["type"] == "run"]
    assert "host" not in run and "git" not in run
    assert not [each for each in records if each["type"] in ("environment", "files")]


class Server:
    """A server on a local port: ``None`` accepts and never answers, a number is the status of every answer."""

    def __init__(self, status: int | None):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                # the probe's question gets an answer, so that wandb itself meets the status
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self.send_response(200 if b"__typename" in body and status == 401 else status)
                self.end_headers()

            do_GET = do_POST

            def log_message(self, *args):
                pass

        if status is None:
            self.socket = socket.create_server(("127.0.0.1", 0))
            self.close = self.socket.close
            self.port = self.socket.getsockname()[1]
        else:
            self.serve(Handler)

    def serve(self, handler: type[http.server.BaseHTTPRequestHandler]) -> None:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.close = lambda: (server.shutdown(), server.server_close())
        self.port = server.server_port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@pytest.fixture
def serve():
    servers = []

    def start(status: int | None) -> Server:
        servers.append(Server(status))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def test_a_server_is_of_use_if_it_answers(serve):
    assert probe(serve(200).url) == ""
    assert probe(serve(404).url) == ""
    assert "error 500" in probe(serve(500).url)
    assert "does not answer" in probe(serve(None).url)
    closed = serve(None)
    closed.close()
    assert f"127.0.0.1:{closed.port} cannot be reached" in probe(closed.url)
    assert "cannot be reached" in probe("http://no-such-host.invalid")


def test_without_a_key_no_server_is_asked(serve, monkeypatch):
    mute = serve(None)
    monkeypatch.setenv("WANDB_BASE_URL", mute.url)
    assert decide_mode("auto")[0] == decide_mode("online")[0] == "offline"
    mute.socket.setblocking(False)
    with pytest.raises(BlockingIOError):
        mute.socket.accept()


@pytest.mark.parametrize(
    ("wish", "variable", "mode"),
    [
        ("auto", None, "online"),
        ("auto", "offline", "offline"),
        ("auto", "dryrun", "offline"),
        ("auto", "disabled", "disabled"),
        ("online", "offline", "online"),
        ("offline", "online", "offline"),
        ("disabled", "online", "disabled"),
    ],
)
def test_the_config_comes_before_the_variable_and_the_variable_before_the_search(
    serve, monkeypatch, wish, variable, mode
):
    monkeypatch.setenv("WANDB_BASE_URL", serve(200).url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    assert decide_mode(wish)[0] == mode


def test_keys_are_found_where_wandb_looks(monkeypatch, tmp_path):
    netrc = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(netrc))
    assert not has_key("https://host.example")
    netrc.write_text(f"machine host.example login user password {KEY}\n")
    netrc.chmod(0o600)
    assert has_key("https://host.example") and not has_key("https://other.example")
    netrc.write_text(f"machine api.wandb.ai login user password {KEY}\n")
    assert has_key("https://api.forge.coreweave.com")
    netrc.write_text("machine")
    assert not has_key("https://host.example")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert has_key("https://host.example")


@pytest.mark.parametrize("status", [None, pytest.param(500, marks=pytest.mark.slow), 401])
def test_a_server_that_does_not_play_along_means_offline_with_every_row(serve, monkeypatch, run_info, status):
    monkeypatch.setenv("WANDB_BASE_URL", serve(status).url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    said = log_steps(run_info, record(10), record(20))
    assert said[0].startswith("W&B: offline (") and len(said) == 2
    assert [row["train/step"] for row in history(stored(run_info))] == [10, 20]


class FakeWandb(Server):
    """Just enough of W&B for an online run; ``alive = False`` makes every answer an error."""

    def __init__(self):
        self.alive, self.bodies, self.started = True, [], threading.Event()
        fake = self
        bucket = {"id": "x", "name": "abcd1234", "project": {"name": "p", "entity": {"name": "me"}}, "config": "{}"}
        answers = {
            "upsertBucket": {"bucket": bucket, "inserted": True},
            "createRunFiles": {"runID": "x", "uploadHeaders": [], "files": []},
            "serverInfo": {"features": []},
            "viewer": {"id": "v", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}},
        }

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                fake.bodies.append(body.decode())
                data = next(({name: answer} for name, answer in answers.items() if name in fake.bodies[-1]), {})
                self.send_response(200 if fake.alive else 500)
                self.end_headers()
                self.wfile.write(json.dumps({"data": data}).encode())
                if "file_stream" in self.path:
                    fake.started.set()

            do_GET = do_PUT = do_POST

            def log_message(self, *args):
                pass

        self.serve(Handler)

    def sent_steps(self) -> list[int]:
        """The steps of all history rows that came over the wire."""
        found = []
        for body in self.bodies:
            files = json.loads(body).get("files", {}) if body.startswith('{"') else {}
            found += [json.loads(row)["train/step"] for row in files.get("wandb-history.jsonl", {}).get("content", ())]
        return found


@pytest.fixture
def wandb_server(monkeypatch):
    server = FakeWandb()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    yield server
    server.close()


def test_an_online_run_sends_its_rows_and_no_secret(run_info, wandb_server, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["moedist", "token=canary-argument"])
    monkeypatch.setenv("SOME_TOKEN", "canary-variable")
    (line,) = log_steps(run_info, record(10), record(20))
    assert line.startswith(f"W&B: online, {wandb_server.url}/me/p/runs/abcd1234")
    assert wandb_server.sent_steps() == [10, 20]
    assert not [body for body in wandb_server.bodies if "canary" in body or socket.gethostname() in body.split('"')]


def test_a_server_that_dies_costs_nothing_but_the_upload(run_info, wandb_server, monkeypatch):
    monkeypatch.setattr(sink_module, "CLOSE_S", 2.0)
    said: list[str] = []
    sink = WandbConfig().open(run_info, said.append)
    sink.write(record(10))
    assert wandb_server.started.wait(60)
    wandb_server.alive = False
    sink.write(record(20))
    sink.close("done")
    assert "online" in said[0] and "to upload what is not there: wandb sync" in said[1] and len(said) == 2
    assert [row["train/step"] for row in history(stored(run_info))] == [10, 20]


def test_disabled_makes_nothing(run_info):
    assert log_steps(run_info, record(10), config=WandbConfig(mode="disabled")) == []
    assert list(run_info.directory.iterdir()) == []


def test_a_missing_library_is_one_line(run_info, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    (line,) = log_steps(run_info, record(10), record(20))
    assert line.startswith("Warning: W&B is off: ") and "wandb" in line


def test_a_stuck_tracker_costs_rows_and_never_the_run(run_info, monkeypatch):
    stuck = threading.Event()
    monkeypatch.setattr(sink_module, "decide_mode", lambda wish: (stuck.wait(), ("disabled", ""))[1])
    monkeypatch.setattr(sink_module, "QUEUE_SIZE", 2)
    monkeypatch.setattr(sink_module, "DONE_S", 0.1)
    said = log_steps(run_info, *map(record, range(1, 6)))
    stuck.set()
    assert len(said) == 2
    assert "too slow" in said[0]
    assert "did not finish" in said[1] and "2 rows are in metrics.jsonl only" in said[1] and "wandb sync" in said[1]


@pytest.mark.pitfall("33")
def test_more_numbers_than_a_table_may_have_rows_are_all_sent(monkeypatch):
    """40 layers x 256 experts, and more steps than a table may have rows."""
    assert series_module.MAX_ROWS == 10_000 < 40 * 256
    monkeypatch.setattr(series_module, "MAX_ROWS", 50)
    blocks, num_steps = list(range(40)), 55
    series, tables = Series(200), Tables()
    for step in range(1, num_steps + 1):
        columns = {f"moe/layers/{name}": [step + block / 64 for block in blocks] for name in NAMES}
        row = series.row({"train/step": step, "moe/layers/block": blocks, **columns})
        tables.add(step, row)
    assert len(row.tables) == len(NAMES) - 3 and len(row.scalars) <= 200
    found = tables.flush()
    assert {len(table.rows) for table in found.values()} == {series_module.MAX_ROWS, 5}
    for key in row.tables:
        rows = found[key].rows + found[f"{key}.part2"].rows
        assert rows == [[step, *(step + block / 64 for block in blocks)] for step in range(1, num_steps + 1)]
    assert tables.flush() == {}, "nothing new"
    tables.add(num_steps + 1, row)
    assert {len(table.rows) for table in tables.flush().values()} == {6}, "full parts are not sent again"
    loads = series.row({"train/step": 1, "moe/layers/block": blocks, "moe/experts/load": np.ones((40, 256), int)})
    assert sum(len(expert_histogram(bars).histogram) for bars in loads.histograms.values()) == 40 * 256


def test_tables_lie_in_the_file_and_hold_steps_of_earlier_processes(run_info):
    few = dataclasses.replace(run_info, max_scalar_keys=0)
    for steps in ((10, 20), (20, 30)):
        with_files = [JsonlConfig().open(few, print), WandbConfig().open(few, print)]
        for step in steps:
            for sink in with_files:
                sink.write(record(step))
        for sink in with_files:
            sink.close("done")
    rows = history(stored(run_info))
    assert [row["train/step"] for row in rows if "train/step" in row] == [10, 20, 30]
    last = rows[-1]
    assert last["moe/layers/max_vio._type"] == "table-file" and "train/step" not in last
    (path,) = [p for p in run_info.directory.rglob("*.table.json") if p.name in last["moe/layers/max_vio.path"]]
    table = json.loads(path.read_text())
    assert table["columns"] == ["train/step", "layer_01"] and table["data"] == [[10, 1.5], [20, 1.5], [30, 1.5]]


@pytest.mark.parametrize(("num_experts", "bins", "width"), [(1, 1, 1), (512, 512, 1), (513, 257, 2), (2000, 500, 4)])
def test_a_histogram_has_a_bin_per_expert_or_per_equal_run_of_them(num_experts, bins, width):
    histogram = expert_histogram(list(range(num_experts)))
    assert len(histogram.histogram) == bins and len(histogram.bins) == bins + 1
    assert histogram.bins[:2] == [0, width]
    assert sum(histogram.histogram) == sum(range(num_experts))
    assert histogram.histogram[0] == sum(range(width))
