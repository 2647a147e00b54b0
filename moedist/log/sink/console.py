"""What people see: one line per log step, and on a terminal a live progress bar below them."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from moedist.log.sink.contract import RunInfo, Sink, SinkConfig, Value, step_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


@dataclasses.dataclass(frozen=True)
class ConsoleConfig(SinkConfig):
    """Lines for people, within 100 columns; with a progress bar where the stream is a terminal."""

    def open(self, run: RunInfo, say: Callable[[str], None]) -> Sink:
        return ConsoleSink(run)


class ConsoleSink(Sink):
    """Prints records; times what is left from the steps that this process has seen, evaluation and saves included.

    Args:
        run: its ``terminal`` is written to.
        clock: seconds that only grow.
    """

    def __init__(self, run: RunInfo, clock: Callable[[], float] = time.monotonic):
        self._run, self._clock = run, clock
        self._begin = (run.resumed_step, clock())
        self._since = self._begin
        self._screen = _screen(run.terminal)
        self._bar = _bar(self._screen, run) if self._screen else None

    def write(self, record: Mapping[str, Value]) -> None:
        step = step_of(record)
        eta_s = self._eta_s(step)
        if "train/loss" in record:
            self.say(log_line(record, self._run.num_steps, eta_s))
        if "eval/loss" in record:
            self.say(eval_line(record, self._run.num_steps))
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=step, eta=_duration(eta_s))

    def say(self, line: str) -> None:
        if self._screen:
            self._screen.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=self._run.terminal, flush=True)

    def saved(self, step: int, checkpoint: Path) -> None:
        self.say(f"checkpoint {checkpoint}")

    def alert(self, title: str, text: str) -> None:
        self.say(f"Warning: {title}. {text}")

    def close(self, status: str) -> None:
        if self._bar:
            self._bar.stop()

    def _eta_s(self, step: int) -> float | None:
        """Seconds left at the mean pace since the first record (the first one warms up), None while unknown."""
        now = self._clock()
        first_step, first_time = self._since
        if self._since is self._begin:
            self._since = (step, now)
        if step <= first_step:
            return None
        return (now - first_time) / (step - first_step) * (self._run.num_steps - step)


def log_line(record: Mapping[str, Value], num_steps: int, eta_s: float | None) -> str:
    """One log step in at most 100 columns; what a record lacks is left out."""
    rates = [value for key, value in record.items() if key.startswith("train/lr_") and isinstance(value, float)]
    shown = {
        "loss": _get(record, "train/loss", lambda loss: f"{loss:7.4f}"),
        "MaxVio": _get(record, "moe/max_vio", _short),
        "drop": _get(record, "moe/drop_rate", lambda rate: f"{rate:5.1%}"),
        "attn": _get(record, "attention/max_vio", _short),  # MaxVio of attentions that route
        "norm": None if "attention/max_vio" in record else _get(record, "train/grad_norm", _short),
        "lr": f"{max(rates):.1e}".replace("e-0", "e-") if rates else None,  # groups follow one schedule
    }
    fields = [_place(record, num_steps)] + [f"{label} {text}" for label, text in shown.items() if text is not None]
    fields += [f"{speed} tok/s"] if (speed := _get(record, "train/tokens_per_s", _speed)) else []
    label = [f"[{record['moe/routing']}]"] if "moe/routing" in record else []
    return "  ".join([*fields, f"ETA {_duration(eta_s)}", *label])


def eval_line(record: Mapping[str, Value], num_steps: int) -> str:
    """The held-out loss of one log step."""
    label = f"  [{record['moe/routing']}]" if "moe/routing" in record else ""
    return f"{_place(record, num_steps)}  held-out loss {record['eval/loss']:.4f}{label}"


def _place(record: Mapping[str, Value], num_steps: int) -> str:
    """``step  20/1000``; long runs need the columns of the word for their digits."""
    steps = str(num_steps)
    return f"{'step ' if len(steps) <= 4 else ''}{step_of(record):>{len(steps)}}/{steps}"


def _get(record: Mapping[str, Value], key: str, text: Callable[[float], str]) -> str | None:
    value = record.get(key)
    return text(value) if isinstance(value, (int, float)) else None


def _short(value: float) -> str:
    """Three digits in four columns, where that can be."""
    if not abs(value) < 9999:  # NaN too
        return f"{value:4.0e}"
    return f"{value:4.2f}" if abs(value) < 9.995 else f"{value:4.1f}" if abs(value) < 99.95 else f"{value:4.0f}"


def _speed(per_s: float) -> str:
    """``1234`` as ``1.23k``, in five columns."""
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if per_s >= factor * 0.9995:
            return f"{_short(per_s / factor).strip()}{unit}".rjust(5)
    return f"{per_s:5.0f}"


def _duration(seconds: float | None) -> str:
    """``4:05``, ``3h07m`` or ``12d03h``."""
    if seconds is None:
        return "--:--"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d}"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def _screen(terminal: TextIO) -> Console | None:
    """The terminal behind a stream; None where it cannot redraw lines, as in a file, a pipe or TERM=dumb."""
    if not terminal.isatty():
        return None
    from rich.console import Console

    # The width is asked of this very stream: the rank's stdin, stdout and stderr may be files.
    screen = Console(file=terminal, width=os.get_terminal_size(terminal.fileno()).columns or None)
    return screen if screen.is_terminal and not screen.is_dumb_terminal else None


def _bar(screen: Console, run: RunInfo) -> Progress:
    """A live bar at the bottom of the screen."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:>3.0f} %"),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA {task.fields[eta]}"),
        console=screen,
        expand=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    bar.add_task(run.name, total=run.num_steps, completed=run.resumed_step, eta=_duration(None))
    bar.start()
    screen.show_cursor(True)  # a killed rank could not bring it back
    return bar
