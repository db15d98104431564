"""How many threads: by the quota of a control group, too."""

import os
from pathlib import Path

import pytest
import torch

from meansparse_cli.runs import device
from meansparse_cli.runs.device import cores_here, pick_device

HAS = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("mine", "files", "cores"),
    [
        ("0::/", {"cpu.max": "100000 100000\n"}, 1),
        ("0::/", {"cpu.max": "max 100000\n"}, HAS),
        ("0::/", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/", {"cpu.max": f"{(HAS + 1) * 100000} 100000\n"}, HAS),
        ("0::/job/step", {"job/cpu.max": "100000 100000\n", "job/step/cpu.max": "max 100000\n"}, 1),
        ("4:cpu,cpuacct:/", {"cpu,cpuacct/cpu.cfs_quota_us": "100000", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, 1),
        ("4:cpuacct,cpu:/", {"cpuacct,cpu/cpu.cfs_quota_us": "1", "cpuacct,cpu/cpu.cfs_period_us": "100000"}, 1),
        ("4:cpu:/a", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, HAS),
        ("0::/", {"cpu.max": "nonsense"}, HAS),
        ("0::/", {}, HAS),
    ],
)
def test_the_quota_of_a_group_and_of_those_above_it(
    mine: str, files: dict[str, str], cores: int, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text)
    (tmp_path / "mine").write_text(f"7:memory:/elsewhere\n{mine}\n")
    assert cores_here(tmp_path / "groups", tmp_path / "mine") == cores


def test_threads_are_no_more_than_cores_unless_somebody_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "cores_here", lambda: 1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        pick_device("cpu")
        assert torch.get_num_threads() == 2
        monkeypatch.delenv("OMP_NUM_THREADS")
        pick_device("cpu")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
