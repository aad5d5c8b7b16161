"""The control groups of this process, which may limit its processors and its memory."""

from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def groups_of(controller: str, root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> list[Path]:
    """Directories of the process's groups that may hold a limit, from its own to the outermost visible."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    groups = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top = root if (root / "cgroup.controllers").exists() else root / "unified"
        elif controller in controllers.split(","):
            top = next((top for top in (root / controllers, root / controller) if top.exists()), root / controller)
        else:
            continue
        # A container sees its own group as the root, though the path may be the host's.
        own = top / path.lstrip("/")
        groups += [own, *own.parents[: len(own.relative_to(top).parts)]] if own.exists() else [top]
    return groups
