"""The page of runs that train, on this machine only: it asks for newer data and keeps what its reader has chosen."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from moedist.config import ConfigError
from moedist.log.run_files import EXPERTS, METRICS
from moedist.report.data import page_data
from moedist.report.page import render
from moedist.report.run import CONFIG, read_run
from moedist.report.state import state_of
from moedist.report.sweep import SWEEP, expand
from moedist.train.status import STATUS

HOST = "127.0.0.1"
HOSTS = (HOST, "localhost")
"""Names under which a browser may ask: another name that leads here belongs to a page that wants to read along."""


class LiveReport:
    """The data of some folders, read anew when a file has changed.

    Args:
        folders: of runs and sweeps.
    """

    def __init__(self, folders: Sequence[Path]):
        self.folders = folders
        self._lock = threading.Lock()
        self._version: Any = None
        self._number = 0
        self._data: dict[str, Any] = {}

    def data(self) -> dict[str, Any]:
        """What the page shows, with a ``version`` that grows with each change.

        Raises:
            ConfigError: a folder is gone.
        """
        with self._lock:  # several tabs may ask
            version = self._look()
            if version != self._version:
                paths, sweeps = expand(self.folders)
                self._data = page_data([read_run(path) for path in paths], sweeps)
                self._version = version
                self._number += 1
            return {**self._data, "version": self._number}

    def _look(self) -> Any:
        """What tells a change: sizes and times of the files, and how the runs stand."""
        paths, _ = expand(self.folders)
        files = [path / name for path in paths for name in (METRICS, EXPERTS, STATUS, CONFIG)]
        files += [folder / SWEEP for folder in self.folders]
        return [_seal(file) for file in files], [state_of(path) for path in paths]


def _seal(file: Path) -> tuple[int, int] | None:
    try:
        stat = file.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


def open_server(report: LiveReport, port: int, refresh_s: float) -> ThreadingHTTPServer:
    """A server on the loopback address, which serves nothing but the page at ``/`` and its data at ``/data``.

    Args:
        report: what it shows.
        port: 0 for any that is free.
        refresh_s: seconds between two questions of the page.

    Raises:
        ConfigError: the port is taken or not allowed.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
            if host not in HOSTS:
                self.send_error(403)
                return
            try:
                if url.path == "/":
                    page = render(report.data(), refresh_s=refresh_s)
                    self._send(200, "text/html; charset=utf-8", page.encode())
                elif url.path == "/data":
                    data = report.data()
                    if url.query == f"version={data['version']}":
                        self._send(204, "application/json", b"")
                    else:
                        self._send(200, "application/json", json.dumps(data, allow_nan=False).encode())
                else:
                    self.send_error(404)
            except ConfigError as error:
                self._send(503, "text/plain; charset=utf-8", str(error).encode())
            except ConnectionError:
                self.close_connection = True  # the page was closed

        def _send(self, code: int, kind: str, content: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Questions of the page are no news."""

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except (OSError, OverflowError) as error:
        problem = f"cannot be listened on ({getattr(error, 'strerror', None) or error})"
        raise ConfigError("--port", port, problem, "Name another, or leave it out for any that is free.") from error


def serve(report: LiveReport, port: int, refresh_s: float, say: Callable[[str], None]) -> None:
    """Serves until it is interrupted."""
    try:
        with open_server(report, port, refresh_s) as server:
            server.daemon_threads = True
            say(f"http://{HOST}:{server.server_address[1]}/")
            server.serve_forever()
    except KeyboardInterrupt:
        return
