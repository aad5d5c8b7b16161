"""Memory that this process may still take on its host."""

from pathlib import Path

from dspark_server.runtime.cgroups import CGROUPS, MEMBERSHIP, groups_of

MEMINFO = Path("/proc/meminfo")


def available(root: Path = CGROUPS, membership: Path = MEMBERSHIP, meminfo: Path = MEMINFO) -> int | None:
    """Bytes that may be taken without swapping, as far as the host and control groups say; None: nobody says.

    Files in the page cache give way, so they count as free.
    """
    bounds = [_left(group) for group in groups_of("memory", root, membership)]
    bounds.append(_field(meminfo, "MemAvailable:", 1024))
    return min((bound for bound in bounds if bound is not None), default=None)


def _left(group: Path) -> int | None:
    """Bytes that a group of version 2 or 1 has left of its limit; None: it has no limit."""
    for most, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        try:
            limit, now = int((group / most).read_text()), int((group / used).read_text())
        except (OSError, ValueError):  # absent, or "max"
            continue
        return max(0, limit - now + (_field(group / "memory.stat", "inactive_file", 1) or 0))
    return None


def _field(file: Path, name: str, unit: int) -> int | None:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    words = next((line.split() for line in lines if line.startswith(f"{name} ")), [])
    return int(words[1]) * unit if len(words) > 1 and words[1].isdigit() else None
