"""``meansparse reproduce``: a table of the paper from nothing, by the commands that make it, a process each.

A command that was done is done at once, and one that was killed goes on, so the same call goes on as well.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path

from ..errors import ConfigError, MeanSparseError
from ..files import write_bytes
from ..paper.plan import Step, plan
from ..reporting.console import note
from ..settings.arguments import Reproduce
from ..settings.commands import COMMANDS
from .workers import OCCASION, RANK_VARIABLES, Rank, rank_here

GRACE = 5.0
"""Seconds that commands have to end by themselves after Ctrl-C, which a terminal sends to all of them."""


class CommandFailed(MeanSparseError):
    """A command of the chain failed; the exit code is its own."""

    def __init__(self, step: Step, exit_code: int) -> None:
        super().__init__(
            f"not finished (exit code {exit_code}): {step.line}",
            hint="what was finished is kept: the same command goes on from here",
        )
        self.exit_code = exit_code


def reproduce(config: Reproduce) -> None:
    """Run the commands of these tables, or print them; the pages' paths go to stdout."""
    steps = plan(config)
    if config.dry_run:
        print("\n".join(step.line for step in steps))
        return
    rank = rank_here()
    if config.plan:
        if rank is None or rank.number == 0:
            _plan(steps)
        return
    if rank is not None and (config.jobs > 1 or config.keep_going):
        raise ConfigError("--jobs or --keep-going with torchrun", hint="leave it out: its workers share each command")
    _Runner(config.jobs, config.keep_going, rank).run(steps)


def _plan(steps: Sequence[Step]) -> None:
    """The plans of the commands that have one; what needs a command that was not done has none yet."""
    done, later = set[Step](), list[Step]()
    for step in (step for step in steps if COMMANDS[step.words[0]].is_shared):
        if not done.issuperset(step.after):
            later.append(step)
            continue
        print(step.line, flush=True, file=sys.stderr)
        command = [sys.executable, "-m", "meansparse_cli", *step.words, "--plan"]
        finished = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if finished.returncode:
            raise CommandFailed(step, finished.returncode)
        if finished.stdout.strip():  # the path of what was done before
            done.add(step)
    for step in later:
        note(f"no plan before those above are done: {step.line}")


class _Runner:
    def __init__(self, jobs: int, keep_going: bool, rank: Rank | None = None) -> None:
        self.jobs, self.keep_going, self.rank = jobs, keep_going, rank
        self.processes: set[subprocess.Popen[str]] = set()

    def run(self, steps: Sequence[Step]) -> None:
        """Each step after those that it needs, ``jobs`` of them side by side."""
        waiting, done, failed = list(steps), set[Step](), list[tuple[Step, int]]()
        with ThreadPoolExecutor(self.jobs) as pool:
            running: dict[Future[int], Step] = {}
            try:
                while waiting or running:
                    goes_on = self.keep_going or not failed
                    ready = [step for step in waiting if goes_on and done.issuperset(step.after)]
                    for step in ready[: self.jobs - len(running)]:
                        waiting.remove(step)
                        running[pool.submit(self._call, step)] = step
                    if not running:
                        break  # what is left needs what failed
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        step, code = running.pop(future), future.result()
                        if code:
                            failed.append((step, code))
                        else:
                            done.add(step)
            except KeyboardInterrupt:
                for process in list(self.processes):
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(GRACE)
                for process in list(self.processes):
                    process.terminate()
                raise
        for step, code in failed[1:]:
            note(f"not finished (exit code {code}): {step.line}")
        if failed:
            raise CommandFailed(*failed[0])

    def _call(self, step: Step) -> int:
        """The exit code of a command. The path of a page goes to stdout, other paths to stderr.

        Ranks begin the commands that they share in the same order; the first one does the others by itself.
        """
        is_shared, is_first = COMMANDS[step.words[0]].is_shared, self.rank is None or self.rank.number == 0
        if not is_shared and not is_first:
            return 0
        if is_first:
            print(step.line, flush=True, file=sys.stderr)
        command = [sys.executable, "-m", "meansparse_cli", *step.words]
        environment = os.environ | {OCCASION: step.line}
        if not is_shared:
            environment = {name: value for name, value in environment.items() if name not in RANK_VARIABLES}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        self.processes.add(process)
        printed, _ = process.communicate()
        self.processes.remove(process)
        if process.returncode == 0 and step.copy_to is not None:
            write_bytes(step.copy_to, Path(printed.strip()).read_bytes())
            printed = f"{step.copy_to}\n"
        is_wanted = step.words[0] == "table" or step.copy_to is not None
        print(printed, end="", flush=True, file=sys.stdout if is_wanted else sys.stderr)
        return process.returncode if process.returncode >= 0 else 128 - process.returncode
