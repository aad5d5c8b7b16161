"""Gemma4's assistant: an MTP drafter whose layers keep nothing, and read the rows of the target's last layers instead.

A pass takes the last token's embedding beside the target's last state, or what the pass before made of it, and gives
one token. All passes of a draft have the anchor's position and see the rows before it.

Where ranks share the target, each has the rows of some heads, and only rank 0 drafts: there the drafter keeps those
rows itself, with all heads, computed again from the inputs of these layers, which are whole on every rank.

Shapes: R drafting requests, N tokens of a target pass, D the target's width, Da the assistant's, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from dspark_kernels import Kernels
from torch import Tensor

from dspark_server.errors import CheckpointError
from dspark_server.models.config import ModelConfig
from dspark_server.models.decoder import Decoder, layers_prefix
from dspark_server.models.fields import integer, read_json, refuse
from dspark_server.models.gemma4 import SandwichLayer, parse_assistant
from dspark_server.models.layers.attention import AttentionConfig, ContextAttention, QueryAttention
from dspark_server.models.layers.embedding import Head
from dspark_server.models.layers.parts import Parts
from dspark_server.models.loading import WeightReader, open_checkpoint
from dspark_server.runtime.batch import Batch
from dspark_server.runtime.kv import KVPool, LayerCache
from dspark_server.runtime.linear import Linear
from dspark_server.runtime.paging import CacheRows
from dspark_server.speculation import features
from dspark_server.speculation.calibration import Calibration
from dspark_server.speculation.copying import CopyTables
from dspark_server.speculation.model_drafter import ModelDrafter, Slots
from dspark_server.speculation.pair import HARMLESS, check_known, check_widths
from dspark_server.speculation.sequential import BlockSampler

DEPTH = 3  # draft tokens of a block, where the command line does not say: the checkpoint does not

_HARMLESS = HARMLESS | {
    *("backbone_hidden_size", "centroid_intermediate_top_k", "num_centroids", "text_config", "use_ordered_embeddings"),
    *("boi_token_id", "eoi_token_id", "eos_token_id", "image_token_id", "audio_token_id", "video_token_id"),
}


@dataclass(frozen=True)
class AssistantConfig:
    """The assistant's decoder, and for each of its layers the target layer whose rows it reads."""

    decoder: ModelConfig
    sources: tuple[int, ...]

    @classmethod
    def load(cls, directory: Path, target: ModelConfig) -> "AssistantConfig":
        """Read and check config.json against the target. Raises CheckpointError if they do not fit."""
        return cls.parse(read_json(directory / "config.json"), target)

    @classmethod
    def parse(cls, fields: Mapping[str, Any], target: ModelConfig) -> "AssistantConfig":
        """The same from the file's fields."""
        refuse(fields, "use_ordered_embeddings", (False,))
        decoder, width = parse_assistant(fields), integer(fields, "backbone_hidden_size")
        if width != target.hidden_size:
            raise CheckpointError(
                f"The drafter's backbone_hidden_size is {width}, the target's hidden_size {target.hidden_size}: "
                "not a pair."
            )
        check_widths(decoder, target, ("vocab_size",))
        check_known(fields, (), _HARMLESS)

        def source(windowed: bool) -> int:
            layers = [i for i, each in enumerate(target.layers) if (each.attention.window is not None) == windowed]
            if not layers:
                raise CheckpointError(f"The target has no layer with{'' if windowed else 'out'} a window: not a pair.")
            return layers[-1]

        sources = tuple(source(layer.attention.window is not None) for layer in decoder.layers)
        for index, layer in zip(sources, decoder.layers, strict=True):
            mine, its = layer.attention, target.layers[index].attention
            if (mine.kv_heads, mine.head_dim) != (its.kv_heads, its.head_dim):
                raise CheckpointError(
                    f"A layer of the drafter reads {mine.kv_heads} key/value heads of {mine.head_dim}, layer {index} "
                    f"of the target has {its.kv_heads} of {its.head_dim}: not a pair."
                )
        return cls(decoder, sources)


class AssistantDrafter(ModelDrafter):
    """Drafts a token in each pass. `observe` writes the target's last states."""

    method = "mtp"

    def __init__(
        self,
        config: AssistantConfig,
        depth: int,
        layers: list[SandwichLayer],
        projections: tuple[Linear, Linear],
        target: Decoder,
        final_norm: Tensor,
        head: Head,
        sampler: BlockSampler,
        kernels: Kernels,
        copying: CopyTables | None,
        own: dict[int, "SourceRows"],
    ) -> None:
        """`own` rows by layer of the target; empty where the target's are whole."""
        last = target.config.num_layers - 1
        taps = (*(layer - 1 for layer in own), last)
        super().__init__(depth, taps, f"states of layer {last}, rows of {sorted(own)}", sampler, copying)
        self.config = config
        self.passes = depth
        self._layers = layers
        self._into, self._out_of = projections
        self._target = target
        self._final_norm = final_norm
        self._head = head
        self._kernels = kernels
        self._own = own

    @property
    def caches(self) -> list[CacheRows]:
        """Rows of its own, if any, and the target's last states."""
        target, reads = self._target, self.reads
        mine = [target.config.layers[source].attention for source in self._own]
        return [
            *(CacheRows(each.kv_heads, each.head_dim, reads.get(i)) for i, each in zip(self._own, mine, strict=True)),
            CacheRows(1, target.config.hidden_size, values=False, dtype=target.embed.weight.dtype),
        ]

    @property
    def reads(self) -> dict[int, int]:
        """Sliding layers see a token more than the target's, and the anchor's row is not there yet."""
        windows = (layer.attention.window for layer in self.config.decoder.layers)
        sources = zip(self.config.sources, windows, strict=True)
        return {source: window + 1 for source, window in sources if window is not None}

    @classmethod
    def load(
        cls,
        directory: Path,
        target: Decoder,
        target_directory: Path,
        dtype: torch.dtype,
        kernels: Kernels,
        depth: int | None = None,
        copying: bool = True,
    ) -> "AssistantDrafter":
        """Load a checkpoint for `target`; `depth` tokens a draft. `copying` as in `DSparkDrafter.load`.

        Raises CheckpointError if a tensor is missing, unexpected or misshapen, or the pair does not fit.
        """
        config, depth = AssistantConfig.load(directory, target.config), depth or DEPTH
        decoder, length = config.decoder, target.max_model_len
        reader = WeightReader(open_checkpoint(directory), dtype, target.embed.weight.device)
        parts = Parts(reader, kernels, decoder.hidden_size, decoder.rms_norm_eps, length, length + depth)
        wide = target.config.hidden_size
        into = Linear(reader.take("pre_projection.weight", (parts.hidden, 2 * wide)), None, kernels)
        out_of = Linear(reader.take("post_projection.weight", (wide, parts.hidden)), None, kernels)
        head = Linear(parts.matrix("model.embed_tokens", decoder.vocab_size), None, kernels)
        layers = [
            SandwichLayer(parts, layer, f"model.layers.{i}.", QueryAttention) for i, layer in enumerate(decoder.layers)
        ]
        final_norm = parts.norm("model.norm")
        reader.finish(decoder.ropes)
        own: dict[int, SourceRows] = {}
        if target.group.size > 1:
            whole = Parts(
                WeightReader(open_checkpoint(target_directory), dtype, target.embed.weight.device),
                kernels,
                wide,
                target.config.rms_norm_eps,
                length,
                length,
            )
            prefix = layers_prefix(target_directory, whole.reader)
            own = {
                source: SourceRows(whole, target.config.layers[source].attention, f"{prefix}{source}.")
                for source in sorted(set(config.sources))
            }
        calibration = Calibration.load(directory, depth, confidence=False)
        return cls(
            config,
            depth,
            layers,
            (into, out_of),
            target,
            final_norm,
            Head(head, decoder.softcap),
            BlockSampler(decoder.vocab_size, None, None, calibration, None, kernels),
            kernels,
            calibration.copying if copying else None,
            own,
        )

    def observe(self, taps: list[Tensor], batch: Batch, pool: KVPool) -> None:
        """Write each token's last state, after the target's final norm, and its rows."""
        *inputs, last = taps
        *rows, kept = pool.layers(1)
        features.keep(self._target.normed(last), batch, kept)
        for own, x, cache in zip(self._own.values(), inputs, rows, strict=True):
            own.write(x, batch, cache)

    def forward(self, number: int, blocks: Batch, previous: Tensor, state: Tensor | None, pool: KVPool) -> Slots:
        """One token more: its state is the target's last one, or that of the pass before."""
        *own, kept = pool.layers(1)
        rows = dict(zip(self._own, own, strict=True)) or dict(enumerate(pool.layers(0)))
        before = features.last(blocks, kept) if state is None else state
        batch = blocks.slot(0, self.gamma, previous)
        residual = self._into(torch.cat([self._target.embed(previous), before], dim=1))
        for layer, source in zip(self._layers, self.config.sources, strict=True):
            layer.forward(None, residual, batch, [rows[source]])
        normed = self._kernels.rms_norm(residual, self._final_norm, self.config.decoder.rms_norm_eps)
        after = self._out_of(normed)
        return Slots(after.unsqueeze(1), self._head(normed).unsqueeze(1), after)


class SourceRows:
    """Keys and values of a layer of the target, with all heads, from the layer's input."""

    def __init__(self, parts: Parts, config: AttentionConfig, prefix: str) -> None:
        """Read the target's weights under `prefix`, such as "model.layers.46."."""
        self._norm = parts.norm(f"{prefix}input_layernorm")
        self._rows = ContextAttention(parts, [config], [f"{prefix}self_attn."])
        self._rows.tensors.clear()
        self._kernels, self._eps = parts.kernels, parts.eps

    def write(self, x: Tensor, batch: Batch, cache: LayerCache) -> None:
        """Write the rows of the pass's tokens, from the layer's input [N, D]."""
        self._rows.write(self._kernels.rms_norm(x, self._norm, self._eps), batch, [cache])
