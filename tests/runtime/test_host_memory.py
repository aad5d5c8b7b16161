"""Memory that may still be taken, by the host and control groups."""

from pathlib import Path

import pytest

from dspark_server.runtime import host_memory

MEMINFO = "MemTotal:       100 kB\nMemFree:  10 kB\nMemAvailable:     50 kB\n"
V2 = {"cgroup.controllers": "cpu memory\n", "member": "0::/a/b\n", "a/b/cgroup.procs": "", "meminfo": MEMINFO}
OWN = {"a/b/memory.max": "40960\n", "a/b/memory.current": "30000\n"}
V1 = {"member": "4:memory:/x\n3:cpu:/a\n", "memory/x/memory.usage_in_bytes": "1000\n", "meminfo": MEMINFO}


@pytest.mark.parametrize(
    ("files", "available"),
    [
        ({"member": ""}, None),
        ({"member": "", "meminfo": MEMINFO}, 50 << 10),
        ({"member": "", "meminfo": "MemTotal: 100 kB\n"}, None),
        ({**V2, "a/b/memory.max": "max\n"}, 50 << 10),
        ({**V2, **OWN}, 10960),
        ({**V2, **OWN, "a/b/memory.stat": "anon 5\ninactive_file 4000\n"}, 14960),  # the page cache gives way
        ({**V2, **OWN, "a/memory.max": "20000", "a/memory.current": "19000"}, 1000),  # a slice around it
        ({**V2, "a/b/memory.max": "10", "a/b/memory.current": "30"}, 0),
        ({**V1, "memory/x/memory.limit_in_bytes": "9223372036854771712\n"}, 50 << 10),  # version 1 without a limit
        ({**V1, "memory/x/memory.limit_in_bytes": "3000\n"}, 2000),
    ],
    ids=lambda value: None,
)
def test_available(files: dict[str, str], available: int | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert host_memory.available(tmp_path, tmp_path / "member", tmp_path / "meminfo") == available


def test_this_host_says_it() -> None:
    assert (host_memory.available() or 0) > 1 << 20
