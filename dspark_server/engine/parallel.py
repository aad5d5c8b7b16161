"""One engine on several ranks: rank 0 schedules, drafts and samples; the others run their share of each target pass.

What rank 0 sends, as JSON: first the model it serves, then the number of KV blocks, then the runs of each pass, which
hold every token that the steps before committed; at last nothing, which ends the others. They never sample, so the
ranks cannot disagree about a token. The drafter is whole and on rank 0 alone: what it observes, the outputs of target
layers, is the same on all ranks.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import dspark_kernels
import orjson
import torch
from torch import Tensor

from dspark_server import __version__
from dspark_server.config import EngineConfig
from dspark_server.engine.executor import DraftRequest, Executor, Rest
from dspark_server.errors import ConfigError, EngineDeadError
from dspark_server.models.config import ModelConfig, load_config
from dspark_server.models.decoder import Decoder
from dspark_server.models.hub import resolve_model
from dspark_server.runtime.batch import Batch, Run
from dspark_server.runtime.kv import KVPool, cache_dtype
from dspark_server.runtime.parallel import TorchGroup
from dspark_server.speculation.drafter import DraftBlock
from dspark_server.speculation.noise import Streams
from dspark_server.speculation.sampling import SamplingBatch

logger = logging.getLogger(__name__)


class LeadingExecutor:
    """Rank 0's executor: tells the others what each pass runs, and runs its own share by `executor`."""

    def __init__(self, executor: Executor, group: TorchGroup, num_blocks: int) -> None:
        self.gamma = executor.gamma
        self._executor = executor
        self._group = group
        group.send(orjson.dumps(num_blocks))
        group.wait()  # for weights that others still read

    @property
    def block(self) -> int:
        return self._executor.block

    def draft(
        self,
        requests: list[DraftRequest],
        sampling: SamplingBatch,
        streams: Streams,
        rest: Callable[[], Rest] | None = None,
    ) -> DraftBlock:
        return self._executor.draft(requests, sampling, streams)  # no pass without `verify`, which tells the others

    def verify(self, runs: list[Run]) -> tuple[Tensor, list[int]]:
        """As `Executor`. Raises EngineDeadError for any failure: the other ranks are in the pass and stay there."""
        self._group.send(encode_runs(runs))
        try:
            return self._executor.verify(runs)
        except EngineDeadError:
            raise
        except Exception as error:
            raise EngineDeadError(f"a pass that other ranks share failed: {type(error).__name__}") from error


def announce(directory: Path, dtype: torch.dtype, max_model_len: int | None, group: TorchGroup) -> None:
    """Rank 0, once it has the model's files: the others may look for theirs, and must find the same model.

    Raises ConfigError, and sends nothing, for a model that these ranks cannot share.
    """
    config = load_config(directory)
    config.shared_by(group.size)
    group.send(orjson.dumps([_identity(config), str(dtype).removeprefix("torch."), max_model_len]))


@torch.inference_mode()
def follow(config: EngineConfig, group: TorchGroup) -> None:
    """Run this rank's share of each pass until rank 0 sends the end.

    Raises ConfigError for a model that is not rank 0's, CheckpointError for one that cannot be read, EngineDeadError
    when another rank is gone.
    """
    identity, dtype_name, max_model_len = orjson.loads(group.receive())
    directory = resolve_model(config.model, revision=config.revision)
    if _identity(load_config(directory)) != identity:
        raise ConfigError(f"rank {group.rank} has another model or version than rank 0: start all with the same.")
    dtype = torch.float32 if dtype_name == "float32" else torch.bfloat16
    kernels = dspark_kernels.load()
    target = Decoder.load(directory, dtype, kernels, max_model_len, group)
    stored = cache_dtype(config.kv_cache_dtype, dtype, kernels, None)
    pool = KVPool(orjson.loads(group.receive()), config.block_size, [target.kv_group], stored)
    group.wait()
    logger.info("rank %d of %d is ready", group.rank, group.size)
    while message := group.receive():
        batch = Batch.of(decode_runs(message), pool.block_size)
        hidden, _ = target.forward(batch, pool.layers(0))
        target.logits(hidden)


def encode_runs(runs: list[Run]) -> bytes:
    """Plain data, for `decode_runs`."""
    return orjson.dumps([[run.tokens, run.context_len, run.block_table, run.logits_rows] for run in runs])


def decode_runs(message: bytes) -> list[Run]:
    """What `encode_runs` was given."""
    return [Run(*fields) for fields in orjson.loads(message)]


def _identity(config: ModelConfig) -> str:
    return f"{__version__} {config}"
