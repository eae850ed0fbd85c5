"""How far is it? A bar with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_NOTES = 0.25
STEPS_BEFORE_A_GUESS = 20
"""The first steps are slow: from this many on, or a twentieth of all, lines say how much time is left."""


class ProgressLine:
    """Counts up on standard error: `with ProgressLine("run") as line: line.show(3, lambda: "epoch 1", total=9)`."""

    def __init__(self, title: str) -> None:
        self.title, self.started = title, time.monotonic()
        self.said = self.started
        self.bar: Progress | None = None
        if (console := Console(stderr=True)).is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
            left = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
            self.bar = Progress(*columns, *left, console=console, transient=True)
            self.task = self.bar.add_task(title, total=None, note="")

    def __enter__(self) -> ProgressLine:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar:
            self.bar.stop()

    def show(self, done: float, note: Callable[[], str], *, total: float | None) -> None:
        """`done` of `total` (None: nobody knows), with a remark; without a terminal a line every ten seconds.

        Whole numbers are shown as they are, a float as a percentage of the total. The remark is made when it is shown.
        """
        now = time.monotonic()
        due = now - self.said >= (SECONDS_BETWEEN_NOTES if self.bar else SECONDS_BETWEEN_LINES)
        if due:
            self.said = now
        if self.bar:
            self.bar.update(self.task, completed=done, total=total)
            if due:
                self.bar.update(self.task, note=note())
        elif due:
            spent, parts = now - self.started, [self.title + ":"]
            if total is not None:
                parts.append(f"{done / total:.0%}," if isinstance(done, float) else f"{done}/{total},")
            parts.append(f"{spent:.0f} s,")
            if total is not None and (done >= STEPS_BEFORE_A_GUESS or done >= 0.05 * total > 0):
                parts.append(f"about {spent / done * (total - done):.0f} s left,")
            print(" ".join([*parts, note()]).rstrip(" ,"), file=sys.stderr, flush=True)


def training_note(state: Any) -> str:
    """What a line on training tells."""
    last = state.history[-1] if state.history else {}
    robust = f", robust {last['robust_accuracy']:.1%}" if "robust_accuracy" in last else ""
    return f"epoch {state.epoch + 1}, loss {state.figures.get('loss', 0.0):.3f}{robust}"


def evaluation_note(now: Any) -> str:
    """What a line on an evaluation tells."""
    passes = rounded(now.cost.forwards + now.cost.backwards)
    return f"{now.done} examples, {passes} passes, {now.running}".rstrip(", ")


def rounded(number: int) -> str:
    """A large number in three digits or so: 830, 12.4 k, 1.2 M.

    >>> rounded(1234567)
    '1.2 M'
    """
    for size, unit in ((10**9, " G"), (10**6, " M"), (10**3, " k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return str(number)


@contextmanager
def interrupts(say: Callable[[str], object]) -> Iterator[Callable[[], bool]]:
    """Yields whether Ctrl-C (or a polite kill) has come; the second one is not caught."""
    came: list[int] = []

    def note(number: int, frame: Any) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)
        say("stopping after this step, saved; once more stops at once")

    old = {number: signal.signal(number, note) for number in STOPS}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
