"""What a log shows while a command works, by a clock that the test moves."""

import os
import re
import threading
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import pytest

from meansparse_cli.reporting.heartbeat import Heartbeat, Phase


class Clock:
    """Stands until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Log:
    """A heartbeat that says its lines into ``lines``; ``run`` lets time pass, looking as the thread does."""

    def __init__(self) -> None:
        self.clock, self.lines = Clock(), list[str]()
        self.heartbeat = Heartbeat(self.lines.append, clock=self.clock, time_of_day=lambda: "14:03:22")
        self.heartbeat._run = lambda over: over.wait() and None  # type: ignore[method-assign, assignment]

    def run(self, seconds: int) -> None:
        for _ in range(seconds):
            self.clock.now += 1
            self.heartbeat.beat()


@pytest.fixture
def log() -> Iterator[Log]:
    yield Log()
    assert not [thread for thread in threading.enumerate() if thread.name == "heartbeat"]


def test_one_step_that_reports_nothing_for_a_quarter_of_an_hour(log: Log) -> None:
    with log.heartbeat.phase("evaluate"), log.heartbeat.phase("doubts: search of base", 8, "kinds") as part:
        part.begin("doubts: search of base", 8, 3, None, log.clock())
        log.run(29)
        assert log.lines == []
        log.run(1)
        assert log.lines == ["14:03:22 evaluate: doubts: search of base: 3 of 8 kinds, 30 s so far"]
        log.run(900 - 30)
    assert len(log.lines) == 30
    assert log.lines[-1].endswith("3 of 8 kinds, 15 min 0 s so far")


def test_speed_is_of_this_session_and_time_left_of_the_whole_run(log: Log) -> None:
    with log.heartbeat.phase("evaluate"), log.heartbeat.phase("", unit="examples") as part:
        # 100 of 300 examples by an earlier session; each costs 2, and 1,000 comes after
        part.begin("attack 5 of 9, apgd-t on base", 300, 100, (600, 1000), log.clock())
        log.clock.now += 29
        part.advance(50)
        log.run(1)
        # 100 in 30 s; 300 left of this one, 1,000 of what comes after: 390 s
        assert log.lines == [
            "14:03:22 evaluate: attack 5 of 9, apgd-t on base: 150 of 300 examples, 1.7 examples/s, 30 s so far, "
            "about 6 min 30 s left of the whole"
        ]
        part.begin("attack 6 of 9, fab-t on base", 50, 0, (500, 500), log.clock())
        log.run(30)
        assert "0 of 50 examples, 30 s so far, about 10 min 0 s left" in log.lines[-1]  # 100 in 60 s, 1,000 left


def test_no_time_left_where_it_cannot_be_known() -> None:
    phase = Phase("refining", 10, "pairs", 0.0)
    phase.begin("refining", 10, 0, None, 0.0)
    phase.advance(5)
    assert phase.seconds_left(10.0) is None
    phase.begin("a block", 10, 0, (1, 1), 10.0)
    assert phase.seconds_left(20.0) is None, "nothing was done yet"


def test_a_phase_in_a_phase_speaks_alone_and_the_outer_one_after_it(log: Log) -> None:
    with log.heartbeat.phase("calibrate"):
        with log.heartbeat.phase("reading", 10, "images") as part:
            part.advance(4)
            log.run(30)
        log.run(30)
    assert log.lines == [
        "14:03:22 calibrate: reading: 4 of 10 images, 0.13 images/s, 30 s so far",
        "14:03:22 calibrate: 1 min 0 s so far",
    ]
    log.run(60)
    assert len(log.lines) == 2, "nothing works any more"


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_whatever_ends_a_phase_ends_its_thread(stop: type[BaseException]) -> None:
    lines: list[str] = []
    heartbeat = Heartbeat(lines.append, every=0.01)
    with pytest.raises(stop), heartbeat.phase("train"), heartbeat.phase("epoch 1 of 2"):
        deadline = time.monotonic() + 10
        while len(lines) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        raise stop
    n = len(lines)
    assert n >= 3 and any(re.fullmatch(r"\d\d:\d\d:\d\d train: epoch 1 of 2: \d+ s so far", line) for line in lines)
    time.sleep(0.05)
    assert len(lines) == n and heartbeat.phases == []
    assert not [thread for thread in threading.enumerate() if thread.name == "heartbeat"]


def test_on_a_terminal_there_is_no_thread() -> None:
    with Heartbeat(None, every=0.01).phase("evaluate") as phase:
        phase.advance(1)
        assert not [thread for thread in threading.enumerate() if thread.name == "heartbeat"]


def test_a_forked_worker_is_silent(tmp_path: Path) -> None:
    file = tmp_path / "lines"

    def say(line: str) -> None:
        with file.open("a") as log:
            log.write(f"{os.getpid()}\n")

    heartbeat = Heartbeat(say, every=0.01)

    def work() -> None:
        with heartbeat.phase("decoding"):
            time.sleep(0.2)

    with heartbeat.phase("reading"):
        for _ in range(5):
            process = get_context("fork").Process(target=work)
            process.start()
            process.join(20)
            assert process.exitcode == 0
    assert set(file.read_text().split()) == {str(os.getpid())}
