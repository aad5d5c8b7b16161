"""One engine on several ranks: rank 0 schedules, drafts and samples; the others run their share of each target pass.

Rank 0 sends JSON: first the model and its settings, then the runs of each pass, which hold every token that the steps
before committed; at last an empty message, which ends the others. They never sample, so the ranks cannot disagree about
a token. The whole drafter is on rank 0 alone: the outputs of target layers that it observes are the same on all ranks.
On GPUs all ranks record the same graphs in the same order, and replay the same one for the same runs.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import orjson
import torch
from dspark_kernels import Kernels
from torch import Tensor

from dspark_server import __version__
from dspark_server.config import EngineConfig
from dspark_server.engine.build import Place, build_executor
from dspark_server.engine.executor import Budget, Clock, Cycle, Executor, with_drafts
from dspark_server.errors import ConfigError, EngineDeadError
from dspark_server.models.fields import read_json
from dspark_server.models.registry import load_config
from dspark_server.runtime.backend import threads_in_use
from dspark_server.runtime.batch import Run
from dspark_server.runtime.device import Device
from dspark_server.runtime.group import TorchGroup
from dspark_server.runtime.paging import BlockTable
from dspark_server.speculation.draft_block import DraftBlock, DraftRequest
from dspark_server.speculation.drafter import NoDrafter
from dspark_server.speculation.noise import CounterStreams, Streams
from dspark_server.speculation.sampling import SamplingBatch

logger = logging.getLogger(__name__)

# Settings that shape a pass and its graphs: every rank uses those of rank 0, whatever it was started with.
SHARED = ("max_model_len", "block_size", "kv_cache_dtype", "max_num_seqs", "max_num_batched_tokens",
          "cuda_graph_sizes", "enforce_eager", "enable_expert_parallel")  # fmt: skip


class LeadingExecutor:
    """Rank 0's executor: sends the runs of each pass to the other ranks, and runs its own share by `executor`."""

    def __init__(self, executor: Executor, group: TorchGroup) -> None:
        self.gamma = executor.gamma
        self.block = executor.block
        self.recorded = executor.recorded
        self._executor = executor
        self._group = group

    def cycle(self, runs: list[Run], streams: Streams, clock: Clock) -> "LeadingCycle":
        return LeadingCycle(self._executor.cycle(runs, streams, clock), runs, self._group)


class LeadingCycle:
    """A step whose pass all ranks share; its draft and acceptance are those of `cycle`."""

    def __init__(self, cycle: Cycle, runs: list[Run], group: TorchGroup) -> None:
        self._cycle = cycle
        self._runs = runs
        self._group = group
        self.accept = cycle.accept
        self.finite_rows = cycle.finite_rows  # hidden states are whole on every rank

    @property
    def seconds(self) -> tuple[float, float]:
        return self._cycle.seconds

    def draft(
        self, requests: Sequence[DraftRequest], sampling: SamplingBatch, budget: Budget | None = None
    ) -> DraftBlock:
        # Without a budget: a pass that only the device knows could not be sent to the others.
        return self._cycle.draft(requests, sampling)

    def verify(self, block: DraftBlock | None) -> tuple[Tensor, list[int]]:
        """As `Cycle`. Raises EngineDeadError for any failure: the other ranks cannot leave the pass."""
        self._group.send(encode_runs(with_drafts(self._runs, block)))
        try:
            return self._cycle.verify(block)
        except EngineDeadError:
            raise
        except Exception as error:
            raise EngineDeadError(f"a pass that other ranks share failed: {type(error).__name__}") from error


def announce(directory: Path, dtype: torch.dtype, config: EngineConfig, group: TorchGroup) -> None:
    """Rank 0 sends its model and settings once it has the files; the others then must find the same model.

    Raises ConfigError, and sends nothing, for a model that these ranks cannot share.
    """
    load_config(directory, config.enable_expert_parallel).shared_by(group.size)
    settings = {name: getattr(config, name) for name in SHARED} | {"dtype": str(dtype).removeprefix("torch.")}
    group.send(orjson.dumps([_identity(directory), settings]))


@torch.inference_mode()
def follow(
    config: EngineConfig, group: TorchGroup, *, device: Device | None = None, kernels: Kernels | None = None
) -> None:
    """Run this rank's share of each pass until rank 0 sends the end; `device` and `kernels` as in `EngineCore.load`.

    Raises ConfigError for a model that is not rank 0's, or has no room on this rank, CheckpointError for one that
    cannot be read, EngineDeadError when another rank is gone.
    """
    identity, settings = orjson.loads(group.receive())
    config = replace(config, **settings | {"cuda_graph_sizes": tuple(settings["cuda_graph_sizes"])})
    place = Place.choose(config, group, device, kernels)
    if _identity(place.directory) != identity:
        raise ConfigError(f"rank {group.rank} has another model or version than rank 0: start all with the same.")
    count = threads_in_use()
    target = place.load_target(config.max_model_len)
    if not place.device:
        place.use_threads(count)
    executor = build_executor(config, target, NoDrafter(), place)
    logger.info("rank %d of %d is ready", group.rank, group.size)
    while message := group.receive():
        executor.cycle(decode_runs(message), CounterStreams(), time.perf_counter).verify(None)


def encode_runs(runs: list[Run]) -> bytes:
    """Encode runs as JSON, for `decode_runs`."""
    return orjson.dumps(
        [
            [run.tokens, run.context_len, [[table.first, table.blocks] for table in run.tables], run.logits_rows]
            for run in runs
        ]
    )


def decode_runs(message: bytes) -> list[Run]:
    """Decode the runs of `encode_runs`."""
    return [
        Run(tokens, context_len, [BlockTable(*table) for table in tables], logits_rows)
        for tokens, context_len, tables, logits_rows in orjson.loads(message)
    ]


def _identity(directory: Path) -> str:
    """Description of version and model, for comparison between ranks."""
    return f"{__version__} {read_json(directory / 'config.json')['architectures']} {load_config(directory)}"
