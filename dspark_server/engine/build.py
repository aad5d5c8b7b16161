"""Builds one rank: device, kernels, types, and its executor over the number of KV blocks that every rank can hold."""

from dataclasses import dataclass
from pathlib import Path

import orjson
import torch
from dspark_kernels import Kernels
from dspark_kernels.flash import LARGEST_HEAD

from dspark_server.config import DEFAULT_CACHE_BYTES, UTILIZATION, EngineConfig
from dspark_server.engine.device_executor import DeviceExecutor, working_bytes
from dspark_server.engine.executor import TorchExecutor
from dspark_server.engine.profile import warm_up
from dspark_server.errors import ConfigError
from dspark_server.models.config import ModelConfig
from dspark_server.models.decoder import Decoder
from dspark_server.models.fields import read_json
from dspark_server.models.hub import resolve_model
from dspark_server.models.loading import open_checkpoint, weight_bytes
from dspark_server.models.registry import family_of, load_config
from dspark_server.runtime import host_memory
from dspark_server.runtime.backend import choose_kernels, use_threads
from dspark_server.runtime.device import Device, find_device
from dspark_server.runtime.graphs import default_sizes
from dspark_server.runtime.group import Group, TorchGroup
from dspark_server.runtime.kv import KVPool, blocks_that_fit, cache_dtype
from dspark_server.runtime.linear import choose_backend
from dspark_server.runtime.paging import CacheGroup, CacheLayout
from dspark_server.speculation.drafter import Drafter


@dataclass(frozen=True)
class Place:
    """Device, kernels and types of one rank: weights in `dtype`, KV rows in `stored`."""

    directory: Path  # of the model
    group: Group
    device: Device | None  # None: the CPU
    kernels: Kernels
    dtype: torch.dtype
    stored: torch.dtype
    whole_experts: bool = False  # each on one rank

    @classmethod
    def choose(
        cls, config: EngineConfig, group: Group, device: Device | None = None, kernels: Kernels | None = None
    ) -> "Place":
        """The place that the configuration names; `device` and `kernels` replace its own.

        Downloads the model if needed. Raises CheckpointError if it cannot be found, ConfigError for a device that is
        missing, or that lacks a feature that the settings require.
        """
        device = device or find_device(config.device)
        config.check_device(None if device is None else device.name)
        directory = resolve_model(config.model, revision=config.revision)
        dtype = _dtype(config.dtype, directory)
        kernels = kernels or choose_kernels(
            config.attention_backend,
            device,
            dtype,
            config.block_size,
            config.kv_cache_dtype,
            _flash_obstacle(load_config(directory)),
        )
        if config.kv_cache_dtype == "fp8" and load_config(directory).streams:
            raise ConfigError(
                "--kv-cache-dtype fp8: DeepSeek-V4's rows are kept in the model's type; leave it at auto."
            )
        stored = cache_dtype(config.kv_cache_dtype, dtype, kernels, device)
        if device:
            device.check(dtype)
        return cls(directory, group, device, kernels, dtype, stored, config.enable_expert_parallel)

    def use_threads(self, count: int) -> None:
        """Compute with `count` threads on the CPU."""
        use_threads(count, self.kernels, products=choose_backend(self.dtype, self.kernels) == "native")

    def load_target(self, max_model_len: int | None) -> Decoder:
        """This rank's share of the model's weights; see Decoder.load.

        Raises ConfigError, before anything is loaded, if they do not fit into memory.
        """
        self._check_room()
        where = self.device.where if self.device else None
        whole = self.whole_experts
        return Decoder.load(self.directory, self.dtype, self.kernels, max_model_len, self.group, where, whole)

    def _check_room(self) -> None:
        family, ranks = family_of(self.directory), self.group.size
        checkpoint = open_checkpoint(self.directory)
        needed = weight_bytes(checkpoint, self.dtype.itemsize, ranks, family.embedding, family.unused)
        free = self.device.memory()[0] if self.device else host_memory.available()
        if free is not None and needed > free:
            gib, dtype = 1 << 30, str(self.dtype).removeprefix("torch.")
            each = f" on each of {ranks} ranks" if ranks > 1 else ""
            raise ConfigError(
                f"{self.directory}: the weights need {needed / gib:.2f} GiB in {dtype}{each}, and {free / gib:.2f} GiB "
                f"are free {'on the GPU' if self.device else 'on this host'}: free memory, take more ranks "
                "(--tensor-parallel-size), or a smaller model."
            )


def build_executor(
    config: EngineConfig, target: Decoder, drafter: Drafter, place: Place
) -> TorchExecutor | DeviceExecutor:
    """The executor of one rank, ready to run; all ranks build theirs at the same time.

    Its KV pool has the number of blocks that fits on every rank: the configured one, or what device memory leaves.
    Raises ConfigError if this rank has room for none.
    """
    layout = _cache_layout(config, target, drafter, place)
    if len(layout.groups) > 1 and "flash-attn" in place.kernels.name:  # a drafter with a window of its own
        raise ConfigError(
            "flash-attn does not serve layers that see a window beside layers that see all: --attention-backend triton."
        )
    device, jointly = place.device, config.speculative.acceptance == "block"

    def over(num_blocks: int) -> TorchExecutor | DeviceExecutor:
        pool = KVPool(num_blocks, layout, place.stored, device)
        if device is None:
            return TorchExecutor(target, drafter, pool, place.kernels, jointly=jointly)
        sizes = () if config.enforce_eager else config.cuda_graph_sizes or default_sizes(config.max_num_batched_tokens)
        most = {"max_tokens": config.max_num_batched_tokens, "max_requests": config.max_num_seqs}
        return DeviceExecutor(target, drafter, pool, device, place.kernels, sizes=sizes, jointly=jointly, **most)

    if config.num_blocks:
        fitting = config.num_blocks
    elif device is None or config.kv_cache_memory_bytes is not None:
        fitting = (config.kv_cache_memory_bytes or DEFAULT_CACHE_BYTES) // layout.block_bytes
    else:
        working = working_bytes(over, config, target)
        fitting = blocks_that_fit(device, config.gpu_memory_utilization or UTILIZATION, working, layout.block_bytes)
    executor = over(place.group.least(fitting))
    if isinstance(executor, DeviceExecutor):
        executor.capture()
    else:
        pool, longest = executor.pool, target.max_model_len
        vocabulary = target.config.vocab_size
        warm_up(executor, pool.num_blocks, pool.groups, longest, vocabulary, config.max_num_batched_tokens)
    return executor


def _flash_obstacle(model: ModelConfig) -> str | None:
    """Why flash-attn cannot serve a model; None: it can."""
    widest = max(layer.attention.head_dim for layer in model.layers)
    if widest > LARGEST_HEAD:
        return f"The model's heads have {widest} channels, and flash-attn takes up to {LARGEST_HEAD}."
    if (
        len({layer.attention.window for layer in model.layers}) > 1
    ):  # and so blocks of other sizes than flash-attn's multiples
        return "Some of the model's layers see a window and some the whole context, which it does not serve here."
    return None


def _cache_layout(config: EngineConfig, target: Decoder, drafter: Drafter, place: Place) -> CacheLayout:
    """The layout of caches on this rank. The groups are those of rank 0, which alone has the drafter's layers."""
    wider = {target.caches[layer].reach: reach for layer, reach in drafter.reads.items()}
    kept = [
        rows if rows.reach is None else rows._replace(reach=max(rows.reach, wider.get(rows.reach, 0)))
        for rows in target.caches
    ]
    owners, itemsize, group = [kept, drafter.caches], place.stored.itemsize, place.group
    layout = CacheLayout.of(owners, config.block_size, itemsize)
    if isinstance(group, TorchGroup):
        if group.rank == 0:
            group.send(orjson.dumps(list(map(list, layout.groups))))
        else:
            groups = [CacheGroup(*each) for each in orjson.loads(group.receive())]
            layout = CacheLayout.of(owners, config.block_size, itemsize, groups)
    return layout


def _dtype(name: str, directory: Path) -> torch.dtype:
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[name]
    fields = read_json(directory / "config.json")
    return torch.float32 if fields.get("dtype", fields.get("torch_dtype")) == "float32" else torch.bfloat16
