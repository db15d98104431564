"""What a log shows while a command works: a line at least each half minute, in the middle of one long step too.

A command, and each part of it that takes time, is a phase; a phase in a phase is what is worked on. While there is one,
a thread says a line as often as is due.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime

SECONDS_BETWEEN_LINES = 30.0


@dataclass(eq=False)
class Phase:
    """Part of a command: ``done`` of ``total`` units, ``resumed`` of them by an earlier session; None: not known.

    ``work``: (of this part, of all that comes after it), both in one unit of cost; None where that cannot be known.
    ``gained`` of it was done since ``worked_since``. Times are the heartbeat's clock, seconds.
    """

    words: str
    total: int | None
    unit: str
    started: float
    done: int = 0
    resumed: int = 0
    work: tuple[float, float] | None = None
    gained: float = 0.0
    worked_since: float | None = None

    def begin(self, words: str, total: int | None, done: int, work: tuple[float, float] | None, now: float) -> None:
        """The next part, in the place of the one before; what was gained counts on, as the speed of the whole."""
        self.words, self.total, self.work, self.started = words, total, work, now
        self.done = self.resumed = done
        if self.worked_since is None and work is not None:
            self.worked_since = now

    def advance(self, n: int) -> None:
        """``n`` units more."""
        self.done += n
        if self.work is not None and self.total:
            self.gained += self.work[0] * n / self.total

    def seconds_left(self, now: float) -> float | None:
        """Of the whole run, at the speed so far; None where that is not known."""
        if self.work is None or self.worked_since is None or not self.gained:
            return None
        this, after = self.work
        rest = this * (1 - min(self.done / self.total, 1.0)) if self.total else 0.0
        return (now - self.worked_since) * (rest + after) / self.gained

    def in_words(self, now: float) -> list[str]:
        """Of ``now``, apart from the name."""
        of = "" if self.total is None else f" of {self.total:,}"
        parts = [f"{self.done:,}{of} {self.unit}"] if self.total is not None or self.done else []
        seconds = now - self.started
        if self.done > self.resumed and seconds > 0:
            parts.append(f"{two_digits((self.done - self.resumed) / seconds)} {self.unit}/s")
        parts.append(f"{duration(seconds)} so far")
        if (left := self.seconds_left(now)) is not None:
            parts.append(f"about {duration(left)} left of the whole")
        return parts


class Heartbeat:
    """Says a line each ``every`` seconds by ``clock`` while there is a phase; ``time_of_day`` heads it.

    Without ``say``, on a terminal, nothing is said and no thread is begun.
    """

    def __init__(
        self,
        say: Callable[[str], None] | None,
        *,
        every: float = SECONDS_BETWEEN_LINES,
        clock: Callable[[], float] = time.monotonic,
        time_of_day: Callable[[], str] = lambda: datetime.now().strftime("%H:%M:%S"),
    ) -> None:
        self.say, self.every, self.clock, self.time_of_day = say, every, clock, time_of_day
        self.phases: list[Phase] = []
        self._last = clock()
        self._lock = threading.RLock()
        # no fork while a line is written: the child would have the lock of the console and nobody to release it
        os.register_at_fork(
            before=self._lock.acquire, after_in_parent=self._lock.release, after_in_child=self._in_child
        )

    @contextmanager
    def phase(self, words: str, total: int | None = None, unit: str = "") -> Iterator[Phase]:
        """A part of the command; it ends however its block ends."""
        phase = Phase(words, total, unit, self.clock())
        if self.phases or self.say is None:
            with self._in(phase):
                yield phase
            return
        self._last, over = self.clock(), threading.Event()
        thread = threading.Thread(target=self._run, args=(over,), name="heartbeat", daemon=True)
        with self._in(phase):
            thread.start()
            try:
                yield phase
            finally:
                over.set()
                thread.join()

    def beat(self) -> float:
        """Say a line if one is due; the seconds until the next one is."""
        with self._lock:
            now = self.clock()
            if now - self._last >= self.every and self.phases and self.say is not None:
                self._last = now
                self.say(self.line(now))
            return max(self.every - (now - self._last), 0.0)

    def line(self, now: float) -> str:
        """``14:03:22 evaluate: attack 5 of 9, apgd-t on base: 40 of 200 examples, 1.3 examples/s, ...``."""
        names = ": ".join(phase.words for phase in self.phases)
        return f"{self.time_of_day()} {names}: {', '.join(self.phases[-1].in_words(now))}"

    @contextmanager
    def _in(self, phase: Phase) -> Iterator[None]:
        with self._lock:
            self.phases.append(phase)
        try:
            yield
        finally:
            with self._lock:
                self.phases.remove(phase)

    def _run(self, over: threading.Event) -> None:
        while not over.wait(self.beat()):
            pass

    def _in_child(self) -> None:
        """A process forked off has no heartbeat: its thread stayed behind, and the parent speaks for both."""
        self.say, self.phases = None, []
        self._lock.release()


def two_digits(number: float) -> str:
    """``1,234``, ``12``, ``3.4``, ``0.12``.

    >>> [two_digits(n) for n in (1234.2, 12.3, 3.42, 0.123)]
    ['1,234', '12', '3.4', '0.12']
    """
    return f"{number:,.0f}" if number >= 9.95 else f"{number:.2g}"


def duration(seconds: float) -> str:
    """In the two largest units.

    >>> [duration(s) for s in (0.4, 59.6, 3599, 7260, 100 * 3600)]
    ['0 s', '1 min 0 s', '59 min 59 s', '2 h 1 min', '4 d 4 h']
    """
    rest = round(seconds)
    for size, unit, small, less in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if rest >= size:
            return f"{rest // size} {unit} {rest % size // small} {less}"
    return f"{rest} s"
