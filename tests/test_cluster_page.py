"""The cluster page, followed to the letter on the digits model, with stand-ins for Slurm's commands."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

PAGE = (Path(__file__).parent.parent / "docs" / "cluster.md").read_text()
SBATCH = """#!/bin/bash
# sbatch --array=1-N --wrap COMMAND, or sbatch SCRIPT: at once, one job after the other
if [[ $1 == --array=1-* && $2 == --wrap ]]; then
  for i in $(seq "${1#--array=1-}"); do
    SLURM_ARRAY_TASK_ID=$i SLURM_ARRAY_TASK_COUNT=${1#--array=1-} SLURM_ARRAY_TASK_MIN=1 bash -c "$3" || exit
  done
else
  SLURM_JOB_ID=7 JOB_SCRIPT=$1 bash "$1"
fi
"""
SCONTROL = """#!/bin/bash
# scontrol requeue ID: the job begins anew
[[ $1 == requeue && $2 == 7 ]] || exit 1
echo requeued >> requeued.txt
exec bash "$JOB_SCRIPT"
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``runs/R`` up to a sweep in the folder ``begun``, and the stand-ins in ``bin``."""
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "bin").mkdir()
    for name, text in {
        "sbatch": SBATCH,
        "scontrol": SCONTROL,
        "meansparse": f'#!/bin/bash\nexec {sys.executable} -m meansparse_cli "$@"\n',
        "torchrun": f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n',
    }.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    (folder / "begun").mkdir()
    typed("meansparse calibrate --model digits --run runs/R --n-examples 200", folder, "begun")
    typed(
        "meansparse sweep-alpha --run runs/R --alphas 0.1 --attack apgd-ce --n-examples 60 --min-gain 0",
        folder,
        "begun",
    )
    return folder


def typed(line: str, place: Path, folder: str) -> str:
    """A line in a shell, in a copy of what is begun."""
    here = place / folder
    if not here.exists():
        shutil.copytree(place / "begun", here)
    environment = {**os.environ, "PATH": f"{place / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-c", line], cwd=here, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def results(place: Path, folder: str) -> Any:
    report = yaml.safe_load((place / folder / "runs" / "R" / "evaluate.yaml").read_text())
    return {key: value for key, value in report["results"].items() if key != "seconds"}


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's results are its own")
def test_workers_of_every_kind_end_in_one_report(place: Path) -> None:
    block = re.search(r"```console\n(.*?)```", PAGE, re.DOTALL)
    assert block is not None
    jobs, devices, torchrun, array, gather = block[1].splitlines()
    typed(devices, place, "devices")
    for line, folder in ((jobs, "jobs"), (torchrun, "torchrun"), (array, "array"), (gather, "array")):
        typed(line, place, folder)
    for folder in ("jobs", "torchrun", "array"):
        assert results(place, folder) == results(place, "devices"), folder


@pytest.mark.slow
def test_the_job_that_queues_itself_again_ends(place: Path) -> None:
    script = re.search(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    assert script is not None and "--time-limit 230" in script[1]
    shutil.copytree(place / "begun", place / "queued")
    (place / "queued" / "job.sh").write_text(script[1].replace("--time-limit 230", "--time-limit 0.2"))
    typed("sbatch job.sh", place, "queued")
    assert (place / "queued" / "requeued.txt").exists()
    assert results(place, "queued")["n_examples"] == 359
