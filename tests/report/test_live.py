from __future__ import annotations

import functools
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from moedist.config import ConfigError
from moedist.report import page
from moedist.report.live import LiveReport, open_server
from tests.report.folders import make_run, write_row

Get = Callable[..., tuple[int, bytes]]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", num_steps=3, ended=None)


@pytest.fixture
def get(run: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Get]:
    monkeypatch.setattr(page, "charting_library", lambda: "const Plotly = {};")
    server = open_server(LiveReport([run]), 0, 1.0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()

    def ask(path: str, host: str | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=30)
        connection.request("GET", path, headers={} if host is None else {"Host": host})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, content

    yield ask
    server.shutdown()
    thread.join()
    server.server_close()


def test_it_tells_what_is_new_and_nothing_else(run: Path, get: Get):
    status, content = get("/")
    assert status == 200 and page.MARK.encode() in content and b"connect-src 'self'" in content
    first = json.loads(get("/data")[1])
    assert first["runs"][0]["step"] == 3
    assert get(f"/data?version={first['version']}") == (204, b"")
    write_row(run, 4, np.full((4, 8), 512), 1.0)
    status, content = get(f"/data?version={first['version']}")
    assert status == 200 and json.loads(content)["runs"][0]["step"] == 4
    assert get("/config.yaml")[0] == get("/../run/config.yaml")[0] == 404


def test_another_name_is_refused(get: Get):
    assert get("/data", host="evil.example")[0] == 403
    assert get("/data", host="localhost:8000")[0] == 200


def test_a_folder_that_goes_is_said(run: Path, get: Get):
    for file in run.iterdir():
        file.unlink()
    status, content = get("/data")
    assert status == 503 and b"holds no run" in content


def test_a_port_that_cannot_be(run: Path):
    with open_server(LiveReport([run]), 0, 1.0) as server:
        for port in (server.server_address[1], 70000):
            with pytest.raises(ConfigError, match="cannot be listened on"):
                open_server(LiveReport([run]), port, 1.0)


def test_ctrl_c_ends_it(run: Path):
    pytest.importorskip("plotly")
    command = [sys.executable, "-m", "moedist", "report", "--watch", str(run)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    started = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # Where these tests run in a shell's background, children begin deaf to Ctrl-C.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert started.stdout is not None
        assert started.stdout.readline().startswith("http://127.0.0.1:")
        started.send_signal(signal.SIGINT)
        assert started.communicate(timeout=60)[1] == "" and started.returncode == 0
    finally:
        started.kill()
        started.wait()
