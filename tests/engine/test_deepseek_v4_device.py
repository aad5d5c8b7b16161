"""DeepSeek-V4 on the twin of a device (tests/runtime/twin.py): recorded and padded; tokens of the host's executor.

Nothing is read by accident while a step runs, and a rejected block leaves nothing that is seen.
"""

from pathlib import Path
from typing import Any

import dspark_kernels
import pytest

from dspark_server.engine.core import EngineCore
from dspark_server.errors import ConfigError

from ..models.v4 import DSPARK, save_v4
from ..runtime.twin import TwinDevice
from .support import greedy, prompts
from .test_device_executor import executor_of, load, sampled

TEXTS = [[2 + token % 250 for token in prompt] for prompt in prompts(2, shortest=20, longest=130)]
TEXTS.append([2 + token * token % 250 for token in range(270)])
PARAMS = [greedy(8), sampled(0.9, 8), greedy(8)]
SETTINGS: dict[str, Any] = {
    "num_blocks": 300, "max_model_len": 384, "block_size": 16, "method": "auto", "max_num_batched_tokens": 96,
}  # fmt: skip


@pytest.mark.parametrize(
    ("drafter", "selection"), [({"stages": 3, **DSPARK}, "lagged"), ({"stages": 1}, "fixed")], ids=["dspark", "mtp"]
)
def test_tokens_are_those_of_the_hosts_executor(tmp_path: Path, drafter: dict[str, Any], selection: str) -> None:
    """In chunks, with rejected blocks, and with prefix hits at the second time."""
    save_v4(tmp_path / "target", **drafter)
    wanted = generate(load(None, selection, pair=tmp_path, kernels=dspark_kernels.load("native"), **SETTINGS)[0])
    with TwinDevice() as device:
        core, _ = load(device, selection, pair=tmp_path, cuda_graph_sizes=(24,), **SETTINGS)
        device.surprises = []
        assert generate(core) == wanted
        stats = core.loop.stats
        assert stats.draft_tokens > stats.accepted_tokens > 0
        assert stats.failed_drafts == 0
        assert core.generate(TEXTS[-1:], PARAMS[-1:]) == wanted[-1:]
        assert stats.prefix_hits > 0
        assert executor_of(core).passes.replays > 0
        assert executor_of(core).drafts.replays > 0
        assert device.surprises == []


def test_fp8_rows_are_refused(tmp_path: Path) -> None:
    save_v4(tmp_path / "target", stages=1)
    with TwinDevice() as device, pytest.raises(ConfigError, match="DeepSeek-V4's rows are kept in the model's type"):
        load(device, pair=tmp_path, kv_cache_dtype="fp8", **SETTINGS)


def generate(core: EngineCore) -> list[list[int]]:
    return core.generate(TEXTS, PARAMS)
