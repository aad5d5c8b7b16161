"""Processors that this process may use: its cpuset, the quota of its control group, the share a hypervisor takes."""

import os
from math import ceil
from pathlib import Path

from dspark_server.runtime.cgroups import CGROUPS, MEMBERSHIP, groups_of

STATISTICS = Path("/proc/stat")


def usable(root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int:
    """Number of processors that this process may use now: its cpuset, limited by its quota, rounded up."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = quota(root, membership)
    return affinity if limit is None else max(1, min(affinity, ceil(limit)))


def quota(root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> float | None:
    """Quota of control groups (version 2 or 1) for this process, in processors; None: no limit.

    The lowest limit of the process's group and its ancestors counts.
    """
    limits = [limit for group in groups_of("cpu", root, membership) if (limit := _limit(group)) is not None]
    return min(limits, default=None)


def stolen(statistics: Path = STATISTICS) -> tuple[int, int]:
    """Ticks that a hypervisor gave to other machines while this one had work, and all ticks, since boot."""
    try:
        fields = statistics.read_text().split("\n", 1)[0].split()
    except OSError:
        return 0, 0
    ticks = [int(field) for field in fields[1:9]]  # user nice system idle iowait irq softirq steal
    return (ticks[7], sum(ticks)) if len(ticks) == 8 else (0, sum(ticks))


def _limit(group: Path) -> float | None:
    """Quota of one group, in processors; None: no limit."""
    try:
        if (group / "cpu.max").exists():
            most, period = (group / "cpu.max").read_text().split()
        else:
            most, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return None if most in ("max", "-1") else int(most) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None
