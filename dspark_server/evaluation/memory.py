"""The memory that a model needs on each rank, from config.json and the checkpoint's headers: no weight is read.

The layers are built as they are to be served, over a reader that counts and gives tensors without data; of layers
with one config the first is built, and counted for all. A rank's part of the routed experts is as large in whole
experts (expert parallelism) as in parts of each (tensor parallelism).
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from dspark_kernels.reference import ReferenceKernels
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dspark_server.config import UTILIZATION, EngineConfig
from dspark_server.errors import CheckpointError
from dspark_server.models.config import LayerConfig, ModelConfig
from dspark_server.models.decoder import ROTARY_MARGIN, check_length
from dspark_server.models.family import Family
from dspark_server.models.layers.latent import LatentConfig
from dspark_server.models.layers.parts import Parts
from dspark_server.models.layers.rope import RopeConfig
from dspark_server.models.layers.streams import StreamHead
from dspark_server.models.loading import EVERY, Checkpoint, TensorInfo, WeightReader, stored_names
from dspark_server.runtime.group import Group
from dspark_server.runtime.paging import CacheGroup, CacheLayout, CacheRows
from dspark_server.speculation.stages import StagesConfig

GIB = 1 << 30
PARTS = ("embedding", "attention and shared", "routed experts", "head", "drafter", "rotary tables")
_ITEMSIZE = {"F8_E4M3": 1, "F8_E8M0": 1, "I8": 1, "BF16": 2, "F16": 2, "F32": 4, "I32": 4, "I64": 8}
_STAGES = "mtp."  # names of a drafter's tensors within the target's checkpoint


@dataclass
class Weights:
    """Bytes of a rank's weights by part: `served` as the server holds them, `packed` the same share as it is stored.

    `stored` is by dtype of the files, scales with the codes that they belong to.
    """

    served: Counter[str] = field(default_factory=Counter)
    packed: Counter[str] = field(default_factory=Counter)
    stored: Counter[str] = field(default_factory=Counter)

    def add(self, part: str, dtype: str, packed: int, served: int) -> None:
        """Count one tensor."""
        self.served[part] += served
        self.packed[part] += packed
        self.stored[dtype] += packed

    def include(self, others: "Weights") -> None:
        """Count others' tensors, too."""
        self.served.update(others.served)
        self.packed.update(others.packed)
        self.stored.update(others.stored)


@dataclass(frozen=True)
class Need:
    """The bytes that a rank holds. Requests take `block_bytes` for a block of any of `groups`.

    `working` is an estimate of a step's activations: a full pass and a full draft, with logits of all their tokens.
    """

    weights: Weights
    groups: Sequence[CacheGroup]
    block_bytes: int
    working: int

    def request_blocks(self, length: int) -> int:
        """Blocks of one request of `length` tokens, all groups together."""
        return sum(group.blocks_between(0, group.most_kept(length)) for group in self.groups)

    @property
    def token_bytes(self) -> float:
        """Bytes that each further token of a long context takes."""
        return sum(self.block_bytes / group.block_size for group in self.groups if group.reach is None)

    def blocks(self, memory: float, packed: bool = False) -> int:
        """Blocks that fit beside the weights; negative: the weights do not fit."""
        own = self.weights.packed if packed else self.weights.served
        return int((memory - own.total() - self.working) // self.block_bytes)


@dataclass(frozen=True)
class Share(Group):
    """One of `size` ranks, for shares alone."""

    rank: int
    size: int

    def share(self, total: int) -> slice:
        """As every group divides."""
        each = -(-total // self.size)
        return slice(min(total, self.rank * each), min(total, (self.rank + 1) * each))


class HeaderReader(WeightReader):
    """Gives tensors on the device "meta", with names and shapes checked, and counts them in `weights`.

    Single numbers, which layers keep as such, are 0 on the CPU.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, family: Family) -> None:
        super().__init__(checkpoint, dtype, torch.device("meta"))
        self.weights = Weights()
        self._headers, self._family = checkpoint.tensors, family

    def take(
        self,
        name: str,
        shape: Sequence[int],
        rows: slice = EVERY,
        columns: slice = EVERY,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """See WeightReader."""
        where = "cpu" if prod(shape) == 1 else "meta"
        tensor = torch.zeros(tuple(shape), dtype=dtype or self.dtype, device=where)[rows]
        tensor = tensor if columns == EVERY else tensor[:, columns]
        self._count(name, shape, tensor)
        return tensor

    def integers(self, name: str, shape: Sequence[int]) -> Tensor:
        """See WeightReader; layers keep them in 32 bits."""
        tensor = torch.empty(tuple(shape), dtype=torch.int32, device="meta")
        self._count(name, shape, tensor)
        return tensor

    def _count(self, name: str, shape: Sequence[int], taken: Tensor) -> None:
        dtype = "I32" if self._is_packed(name) else self._find(name, shape).dtype
        stored = stored_bytes(self._headers, name) * taken.numel() // prod(shape)
        self.weights.add(self._part(name), dtype, stored, taken.nbytes)

    def _part(self, name: str) -> str:
        if name.endswith(self._family.embedding):
            return "embedding"
        if name == self._family.head:
            return "head"
        return "routed experts" if re.search(r"\.experts\.\d", name) else "attention and shared"


class HeaderParts(Parts):
    """Parts whose rotary tables have no data."""

    def rotary_table(self, rope: RopeConfig, head_dim: int) -> Tensor:
        """See Parts."""
        if (rope, head_dim) not in self._tables:
            self._tables[rope, head_dim] = torch.empty((self.positions, head_dim), dtype=torch.float32, device="meta")
        return self._tables[rope, head_dim]

    @property
    def table_bytes(self) -> int:
        """Bytes of all rotary tables."""
        return sum(table.nbytes for table in self._tables.values())


def stored_bytes(headers: Mapping[str, TensorInfo], name: str) -> int:
    """Bytes of a weight in its file, with its scales. Raises CheckpointError for a dtype that is not served."""
    size = 0
    for info in (headers[each] for each in stored_names(headers, name)):
        if info.dtype not in _ITEMSIZE:
            raise CheckpointError(f"{info.file}: tensor {name} has dtype {info.dtype}, which is not served")
        size += prod(info.shape) * _ITEMSIZE[info.dtype]
    return size


def need(
    checkpoint: Checkpoint, fields: Mapping[str, Any], family: Family, config: EngineConfig, rank: int = 0
) -> Need:
    """Return the need of `rank` of config.tensor_parallel_size; a drafter is counted if it is in the checkpoint.

    `fields` are config.json's. Weights are float32 where `config.dtype`, or for auto the checkpoint, says it, else
    of 16 bits. Raises CheckpointError for tensors that do not belong to the config, ConfigError if the ranks cannot
    share the model.
    """
    model, ranks = family.parse(dict(fields), {}), config.tensor_parallel_size
    model = model.with_whole_experts() if config.enable_expert_parallel else model
    said = fields.get("dtype", fields.get("torch_dtype")) if config.dtype == "auto" else config.dtype
    dtype = torch.float32 if said == "float32" else torch.bfloat16
    model.shared_by(ranks)
    length = check_length(model, config.max_model_len)
    reader = HeaderReader(checkpoint, dtype, family)
    group = Share(rank, ranks)
    parts = HeaderParts(
        reader, ReferenceKernels(), model.hidden_size, model.rms_norm_eps, length, length + ROTARY_MARGIN, group
    )
    prefix = next((each for each in family.prefixes if f"{each}{family.embedding}" in reader), family.prefixes[0])
    vocabulary = (model.vocab_size, model.hidden_size)
    reader.take(f"{prefix}{family.embedding}", vocabulary)
    rows, whole, built = list[CacheRows](), reader.weights, dict[LayerConfig, tuple[Weights, list[CacheRows]]]()
    for number, layer in enumerate(model.layers):
        if layer not in built:
            reader.weights = Weights()
            kept = family.layer(parts, layer, f"{prefix}layers.{number}.").attention.caches(length)
            built[layer] = reader.weights, kept
        whole.include(built[layer][0])
        rows += built[layer][1]
    reader.weights = whole
    whole.served["rotary tables"] = whole.packed["rotary tables"] = parts.table_bytes
    parts.norm(f"{prefix}norm")
    if model.streams:
        StreamHead(parts, model.streams, f"{prefix}hc_head_")
    if not model.tie_word_embeddings:
        reader.take(family.head, vocabulary, group.share(model.vocab_size))
    drafted, drafter = 0, list[CacheRows]()
    if stages := _stages(fields, model, config):
        rows, drafter = _with_stages(rows, stages, model, length, dtype)
        if rank == 0:
            drafted = stages.block_size or 1
            _count_stages(checkpoint, whole, dtype.itemsize, family.head if ranks > 1 else None)
    itemsize = 1 if config.kv_cache_dtype == "fp8" else dtype.itemsize
    layout = CacheLayout.of([rows, drafter], config.block_size, itemsize)
    if rank:
        layout = CacheLayout.of([rows, []], config.block_size, itemsize, layout.groups)
    working = _working(model, config, drafted, dtype.itemsize)
    return Need(whole, layout.groups, layout.block_bytes, working)


def _with_stages(
    rows: list[CacheRows], stages: StagesConfig, model: ModelConfig, length: int, dtype: torch.dtype
) -> tuple[list[CacheRows], list[CacheRows]]:
    """The target's rows, whose windows DSpark's stages keep longer, and the drafter's (speculation/stages.py).

    An MTP layer keeps the streams of every token.
    """
    attention = stages.layer.attention
    assert isinstance(attention, LatentConfig)
    assert attention.window is not None
    window = attention.window + (1 if stages.block_size else 0)
    row = CacheRows(1, attention.head_dim, window if window < length else None, values=False)
    if stages.block_size:
        wider = [each._replace(reach=window) if each.reach == attention.window else each for each in rows]
        return wider, [row] * stages.stages
    assert model.streams is not None
    return rows, [row, CacheRows(1, model.streams.count * model.hidden_size, values=False, dtype=dtype)]


def _stages(fields: Mapping[str, Any], model: ModelConfig, config: EngineConfig) -> StagesConfig | None:
    """The drafter inside the checkpoint, where there is one and it is used."""
    if not model.streams or config.speculative.model or config.speculative.method in ("ngram", "none"):
        return None
    return StagesConfig.parse(fields, model)


def _count_stages(checkpoint: Checkpoint, weights: Weights, itemsize: int, head: str | None) -> None:
    """Rank 0 has a drafter whole, and where ranks share the head another one of its own."""
    for name, info in checkpoint.tensors.items():
        if (name.startswith(_STAGES) and not name.endswith(".scale")) or name == head:
            values = prod(info.shape) * (2 if info.dtype == "I8" else 1)
            served = values * (4 if info.dtype == "F32" else itemsize)
            weights.add("drafter", info.dtype, stored_bytes(checkpoint.tensors, name), served)


def _working(model: ModelConfig, config: EngineConfig, drafted: int, itemsize: int) -> int:
    """Logits in float32, again where ranks gather them; a pass's streams and queries; three rows of V a draft token."""
    tokens, ranks = config.max_num_batched_tokens, config.tensor_parallel_size
    logits = 4 * model.vocab_size * (1 + (1 / ranks if ranks > 1 else 0))
    width = model.hidden_size * (model.streams.count if model.streams else 1)
    queries = max(layer.attention.heads * layer.attention.head_dim for layer in model.layers) // ranks
    draft = config.max_num_seqs * drafted * model.vocab_size * 3 * 4
    return int(tokens * (logits + width * (itemsize + 8) + queries * (itemsize + 4)) + draft)


def report(needs: Sequence[Need], config: EngineConfig, length: int, memory: float) -> Iterator[str]:
    """Lines that say what fits into `memory` bytes of each GPU, with requests of `length` tokens."""
    share = config.gpu_memory_utilization or UTILIZATION
    for title, packed in (("as served", False), ("were they kept as stored", True)):
        room = min(each.blocks(share * memory, packed) for each in needs)
        if room < 0:
            worst = min(needs, key=lambda each: each.blocks(share * memory, packed))
            own = (worst.weights.packed if packed else worst.weights.served).total()
            yield (
                f"Weights {title}: do not fit. A rank needs {(own + worst.working) / GIB:.1f} GiB for weights and a "
                f"step; {share:.0%} of {memory / GIB:.0f} GiB are {share * memory / GIB:.1f}."
            )
            continue
        requests = room // max(each.request_blocks(length) for each in needs)
        yield (
            f"Weights {title}: {room * needs[0].block_bytes / GIB:.1f} GiB are left for the KV cache: "
            f"{requests:,} requests of {length:,} tokens, {requests * length:,} tokens of context."
        )


def show(needs: Sequence[Need], config: EngineConfig, length: int, memory: float, console: Console) -> None:
    """Print the sum for rank 0 and, where there are several, for the others; what fits into GPUs of `memory` bytes."""
    names = [f"rank 0 of {config.tensor_parallel_size}", "each other rank"][: len(needs)]
    table = Table(title="GiB: as served (as stored)")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for part in PARTS:
        own = [(each.weights.served[part], each.weights.packed[part]) for each in needs]
        if any(served for served, _ in own):
            table.add_row(part, *(f"{served / GIB:.2f} ({packed / GIB:.2f})" for served, packed in own))
    totals = [(each.weights.served.total(), each.weights.packed.total()) for each in needs]
    table.add_row("all weights", *(f"{served / GIB:.2f} ({packed / GIB:.2f})" for served, packed in totals))
    table.add_row("a step (estimate)", *(f"{each.working / GIB:.2f}" for each in needs))
    console.print(table)
    for name, each in zip(names, needs, strict=True):
        kinds = ", ".join(f"{dtype} {size / GIB:.2f}" for dtype, size in each.weights.stored.most_common())
        request = each.request_blocks(length) * each.block_bytes
        console.print(f"{name}: stored as {kinds} GiB")
        console.print(
            f"{name}: a request of {length:,} tokens {request / GIB:.3f} GiB, each token {each.token_bytes:,.0f} bytes"
        )
    for line in report(needs, config, length, memory):
        console.print(line)
