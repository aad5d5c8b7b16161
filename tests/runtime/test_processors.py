"""Processors that may be used, by cpuset and control groups."""

import os
from pathlib import Path

import pytest

from dspark_server.runtime import processors


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 processors in the cpuset."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V2 = {"cgroup.controllers": "cpu memory\n", "member": "0::/a/b\n", "a/b/cgroup.procs": ""}
V1 = {"member": "4:memory:/x\n3:cpu,cpuacct:/a/b\n0::/\n", "cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
      "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}  # fmt: skip


@pytest.mark.parametrize(
    ("files", "quota", "usable"),
    [
        ({"member": ""}, None, 64),
        ({**V2, "a/b/cpu.max": "max 100000\n"}, None, 64),
        ({**V2, "a/b/cpu.max": "150000 100000\n"}, 1.5, 2),  # `cpu: 1.5` of a container
        ({**V2, "a/b/cpu.max": "100000 100000\n"}, 1.0, 1),
        ({**V2, "a/b/cpu.max": "5000 100000\n"}, 0.05, 1),
        ({**V2, "a/b/cpu.max": "900000 100000\n", "a/cpu.max": "300000 100000\n"}, 3.0, 3),  # a slice around it
        ({**V2, "member": "0::/host/path\n", "cpu.max": "250000 100000\n"}, 2.5, 3),  # a container's own view
        ({**V1, "cpu,cpuacct/a/b/cpu.cfs_quota_us": "50000", "cpu,cpuacct/a/b/cpu.cfs_period_us": "25000"}, 2.0, 2),
        ({**V1, "cpu,cpuacct/a/b/cpu.cfs_quota_us": "-1", "cpu,cpuacct/a/b/cpu.cfs_period_us": "100000"}, None, 64),
        ({**V1, "cpu,cpuacct/cpu.cfs_quota_us": "400000\n"}, 4.0, 4),
        ({**V2, "a/b/cpu.max": "9999999 100000\n"}, 99.99999, 64),  # more than there are
        ({**V2, "a/b/cpu.max": "no number\n"}, None, 64),
    ],
    ids=lambda value: None,
)
def test_quota(tmp_path: Path, files: dict[str, str], quota: float | None, usable: int) -> None:
    root = write(tmp_path, files)
    assert processors.quota(root, root / "member") == quota
    assert processors.usable(root, root / "member") == usable


def test_a_machine_without_control_groups(tmp_path: Path) -> None:
    assert processors.quota(tmp_path / "none", tmp_path / "none") is None
    assert processors.stolen(tmp_path / "none") == (0, 0)


def test_stolen_ticks(tmp_path: Path) -> None:
    stat = write(tmp_path, {"stat": "cpu  10 1 2 50 3 0 4 30 7 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n"}) / "stat"
    assert processors.stolen(stat) == (30, 100)  # guest time is part of user time
