"""The drafters inside a DeepSeek-V4 checkpoint: DSpark's stages, or the MTP layer of releases before (`mtp.*`).

Both are layers of the target's own kind, of residual streams and a window of rows, without compressed entries.

Shapes: R drafting requests, N tokens of a target pass, g tokens of a block, D the model's width, n streams, m taps.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from dspark_kernels import Kernels
from torch import Tensor

from dspark_server.errors import CheckpointError
from dspark_server.models.config import LayerConfig, ModelConfig
from dspark_server.models.decoder import Decoder
from dspark_server.models.deepseek_v4 import StreamLayer, stage_config
from dspark_server.models.fields import integer
from dspark_server.models.layers.embedding import Head
from dspark_server.models.layers.latent import LatentConfig, LatentContext
from dspark_server.models.layers.parts import Parts
from dspark_server.models.layers.streams import StreamHead
from dspark_server.models.loading import WeightReader, open_checkpoint
from dspark_server.runtime.batch import Batch
from dspark_server.runtime.kv import KVPool, LayerCache
from dspark_server.runtime.linear import Linear
from dspark_server.runtime.paging import CacheRows
from dspark_server.speculation.calibration import Calibration
from dspark_server.speculation.copying import CopyTables
from dspark_server.speculation.heads import ConfidenceHead, build_head
from dspark_server.speculation.model_drafter import ModelDrafter, Slots
from dspark_server.speculation.pairs import PairDrafter
from dspark_server.speculation.sequential import BlockSampler

MTP_DEPTH = 1  # draft tokens of a block, where the command line does not say: the layer was trained for one


@dataclass(frozen=True)
class StagesConfig:
    """`stages` layers; DSpark drafts `block_size` tokens from the outputs of `taps`, an MTP layer has no taps."""

    layer: LayerConfig
    stages: int
    block_size: int = 0
    mask_token_id: int = 0
    taps: tuple[int, ...] = ()
    markov_rank: int = 0

    @classmethod
    def parse(cls, fields: Mapping[str, Any], target: ModelConfig) -> "StagesConfig | None":
        """Read the target's own config.json; None: it has no stages. Raises CheckpointError for what does not fit."""
        layer, stages = stage_config(fields, target)
        block, taps = fields.get("dspark_block_size") or 0, fields.get("dspark_target_layer_ids") or []
        if not stages:
            if block and taps:
                raise CheckpointError(
                    "config.json: dspark_block_size without stages: compress_ratios has none for them."
                )
            return None
        if not (block and taps):
            if stages != 1:
                raise CheckpointError(f"config.json: {stages} MTP stages without DSpark are not supported, only 1 is.")
            return cls(layer, stages)
        if not all(isinstance(tap, int) and 0 <= tap < target.num_layers for tap in taps):
            raise CheckpointError(f"config.json: dspark_target_layer_ids {taps} must be layers of this model.")
        mask = integer(fields, "dspark_noise_token_id")
        if mask >= target.vocab_size:
            raise CheckpointError(f"config.json: dspark_noise_token_id {mask} is outside the embedding.")
        return cls(layer, stages, integer(fields, "dspark_block_size"), mask, tuple(taps),
                   integer(fields, "dspark_markov_rank"))  # fmt: skip


class StageDrafter(ModelDrafter):
    """DSpark: blocks of g tokens in one pass of all stages. `observe` writes each stage's context rows."""

    method = "dspark"
    passes = 1

    def __init__(
        self,
        config: StagesConfig,
        target: Decoder,
        stages: list[StreamLayer],
        context: "StageContext",
        streams: StreamHead,
        final_norm: Tensor,
        head: Head,
        sampler: BlockSampler,
        kernels: Kernels,
        copying: CopyTables | None,
    ) -> None:
        super().__init__(config.block_size, config.taps, context.digest, sampler, copying)
        self.config = config
        self.mask_token = config.mask_token_id
        self._target = target
        self._stages = stages
        self._context = context
        self._streams = streams
        self._final_norm = final_norm
        self._head = head
        self._kernels = kernels

    @property
    def caches(self) -> list[CacheRows]:
        """A row of each stage for the window before a block, and for the block's first token."""
        attention, length = self.config.layer.attention, self._target.max_model_len
        assert attention.window is not None
        reach = attention.window + 1
        return [CacheRows(1, attention.head_dim, None if reach >= length else reach, values=False)] * len(self._stages)

    @property
    def reads(self) -> dict[int, int]:
        """The target's windows are kept as long as the stages': then both are in one group of caches."""
        window = self.config.layer.attention.window
        assert window is not None
        return {0: window + 1}

    @classmethod
    def load(
        cls,
        config: StagesConfig,
        target: Decoder,
        directory: Path,
        dtype: torch.dtype,
        kernels: Kernels,
        copying: bool,
        shortlist: int | None,
    ) -> "StageDrafter":
        """Load the stages of the target's checkpoint. `copying` and `shortlist` as in `DSparkDrafter.load`.

        Raises CheckpointError if a tensor is missing or misshapen.
        """
        parts = _parts(target, directory, dtype, kernels, config.block_size)
        reader, hidden, last = parts.reader, parts.hidden, f"mtp.{config.stages - 1}."
        stages = [StreamLayer(parts, config.layer, f"mtp.{i}.") for i in range(config.stages)]
        assert target.config.streams is not None
        streams = StreamHead(parts, target.config.streams, f"{last}hc_head_")
        vocabulary, rank = target.config.vocab_size, config.markov_rank
        head = build_head(
            "vanilla",
            reader,
            rank=rank,
            hidden_size=hidden,
            vocab_size=vocabulary,
            draft_vocab_size=vocabulary,
            kernels=kernels,
            prefix=last,
        )
        weight = reader.take(f"{last}confidence_head.proj.weight", (1, hidden + rank))
        confidence = ConfidenceHead(weight, weight.new_zeros(1), with_markov=True)
        context = StageContext(parts, config)
        calibration = Calibration.load(directory, config.block_size)
        sampler = BlockSampler(vocabulary, head, confidence, calibration, None, kernels, shortlist)
        copies = calibration.copying if copying else None
        final_norm, whole = parts.norm(f"{last}norm"), _head(parts, target)
        return cls(config, target, stages, context, streams, final_norm, whole, sampler, kernels, copies)

    def observe(self, taps: list[Tensor], batch: Batch, pool: KVPool) -> None:
        """Write the context row of every token of the pass in each stage."""
        self._context.write(taps, batch, pool.layers(1))

    def forward(self, number: int, blocks: Batch, previous: Tensor, state: Tensor | None, pool: KVPool) -> Slots:
        """All stages over [anchor, noise, ...]: h_k before the final norm, as the confidence head takes it."""
        residual = self._streams.begin(self._target.embed(blocks.tokens))
        for stage, cache in zip(self._stages, pool.layers(1), strict=True):
            stage.forward(None, residual, blocks, [cache], causal=False)
        hidden = self._streams.end(residual)
        base = self._head(self._kernels.rms_norm(hidden, self._final_norm, self._target.config.rms_norm_eps))
        return Slots(hidden.unflatten(0, (-1, self.gamma)), base.unflatten(0, (-1, self.gamma)))


class StageContext:
    """H_ctx = norm(W [tap_1; ...; tap_m]), the same for all stages, and each stage's row of it.

    `digest` names the drafter for the prefix cache, by weights of this; its other weights lie in the same checkpoint.
    """

    def __init__(self, parts: Parts, config: StagesConfig) -> None:
        weight = parts.reader.take("mtp.0.main_proj.weight", (parts.hidden, len(config.taps) * parts.hidden))
        self._project = Linear(weight, None, parts.kernels)
        self._norm = parts.norm("mtp.0.main_norm")
        self._kernels, self._eps = parts.kernels, parts.eps
        self._stages = [LatentContext(parts, latent(config), f"mtp.{i}.attn.") for i in range(config.stages)]
        self.digest = _digest(weight, self._norm)

    def write(self, taps: list[Tensor], batch: Batch, caches: list[LayerCache]) -> None:
        """Write each token's row in each stage, rotated at its own position. taps: m times [N, D]."""
        context = self._kernels.rms_norm(self._project(torch.cat(taps, dim=-1)), self._norm, self._eps)
        for stage, cache in zip(self._stages, caches, strict=True):
            stage.write(context, batch, cache)


class StreamMtpDrafter(PairDrafter):
    """The MTP layer: pairs of all of a token's streams and the next token, in a window of their own.

    Streams of a drafted token are the layer's outputs, before they are mixed for its head.
    """

    method = "mtp"

    def __init__(
        self,
        depth: int,
        target: Decoder,
        layer: StreamLayer,
        context: LatentContext,
        pairs: "StreamPairs",
        streams: StreamHead,
        final_norm: Tensor,
        head: Head,
        sampler: BlockSampler,
        kernels: Kernels,
        copying: CopyTables | None,
    ) -> None:
        config, rows = target.config, layer.attention.caches(target.max_model_len)
        width = streams.count * config.hidden_size
        # One more than the number of the last layer: its streams, not their mean.
        taps = (config.num_layers,)
        super().__init__(depth, taps, pairs.digest, rows[0], target.embed, head, sampler, copying, width)
        self._layer = layer
        self._context = context
        self._pairs = pairs
        self._streams = streams
        self._final_norm = final_norm
        self._kernels = kernels
        self._eps = config.rms_norm_eps

    @classmethod
    def load(
        cls,
        config: StagesConfig,
        target: Decoder,
        directory: Path,
        dtype: torch.dtype,
        kernels: Kernels,
        depth: int | None,
        copying: bool,
    ) -> "StreamMtpDrafter":
        """Load the layer of the target's checkpoint; `depth` tokens a draft. `copying` as in `DSparkDrafter.load`.

        Raises CheckpointError if a tensor is missing or misshapen.
        """
        depth = depth or MTP_DEPTH
        parts = _parts(target, directory, dtype, kernels, depth)
        assert target.config.streams is not None
        attention = replace(config.layer.attention, first_key=1)
        layer = StreamLayer(parts, replace(config.layer, attention=attention), "mtp.0.")
        calibration = Calibration.load(directory, depth, confidence=False)
        return cls(
            depth,
            target,
            layer,
            LatentContext(parts, latent(config), "mtp.0.attn."),
            StreamPairs(parts, target.config.streams.count),
            StreamHead(parts, target.config.streams, "mtp.0.hc_head_"),
            parts.norm("mtp.0.norm"),
            _head(parts, target),
            BlockSampler(target.config.vocab_size, None, None, calibration, None, kernels),
            kernels,
            calibration.copying if copying else None,
        )

    def features(self, taps: list[Tensor]) -> Tensor:
        """See PairDrafter: the streams [N, n D]."""
        return taps[0]

    def write(self, embedded: Tensor, before: Tensor, batch: Batch, cache: LayerCache) -> None:
        """See PairDrafter."""
        self._context.write(self._layer.read(self._pairs.join(embedded, before)), batch, cache)

    def step(self, embedded: Tensor, before: Tensor, batch: Batch, cache: LayerCache) -> tuple[Tensor, Tensor]:
        """See PairDrafter."""
        streams = self._pairs.join(embedded, before)
        self._layer.forward(None, streams, batch, [cache])
        return streams, self._kernels.rms_norm(self._streams.end(streams), self._final_norm, self._eps)


class StreamPairs:
    """The streams of pairs: X_j = H norm(features_j) + E norm(embedding). `digest` as in StageContext."""

    def __init__(self, parts: Parts, count: int) -> None:
        into = [parts.matrix(f"mtp.0.{name}", parts.hidden) for name in ("e_proj", "h_proj")]
        self._token, self._feature = (Linear(each, None, parts.kernels) for each in into)
        self._token_norm, self._feature_norm = parts.norm("mtp.0.enorm"), parts.norm("mtp.0.hnorm")
        self._count, self._kernels, self._eps = count, parts.kernels, parts.eps
        self.digest = _digest(*into, self._token_norm, self._feature_norm)

    def join(self, embedded: Tensor, before: Tensor) -> Tensor:
        """Embeddings [N, D] and streams [N, n D] before them -> streams [N, n D]."""
        norm, eps = self._kernels.rms_norm, self._eps
        token = self._token(norm(embedded, self._token_norm, eps))
        each = before.unflatten(1, (self._count, -1)).flatten(0, 1).contiguous()
        features = torch.unflatten(self._feature(norm(each, self._feature_norm, eps)), 0, (-1, self._count))
        return (features + token.unsqueeze(1)).flatten(1)


def latent(config: StagesConfig) -> LatentConfig:
    """Attention of a stage."""
    assert isinstance(config.layer.attention, LatentConfig)
    return config.layer.attention


def _parts(target: Decoder, directory: Path, dtype: torch.dtype, kernels: Kernels, beyond: int) -> Parts:
    config, length = target.config, target.max_model_len
    reader = WeightReader(open_checkpoint(directory), dtype, target.embed.weight.device)
    return Parts(reader, kernels, config.hidden_size, config.rms_norm_eps, length, length + beyond)


def _head(parts: Parts, target: Decoder) -> Head:
    """The target's head; where ranks share it, only rank 0 drafts, and has it whole beside its part."""
    if target.group.size == 1:
        return target.head
    return Head(Linear(parts.matrix("head", target.config.vocab_size), None, parts.kernels))


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()
