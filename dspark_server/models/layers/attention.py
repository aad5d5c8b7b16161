"""Attention: projections, norms of heads, rotary embedding, and the paged kernels.

Shapes: N tokens of the pass, D the model's width, Hq and Hkv this rank's query and key/value heads, d head size.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dspark_server.errors import CheckpointError
from dspark_server.models.layers.parts import Parts
from dspark_server.models.layers.rope import RopeConfig
from dspark_server.models.loading import EVERY
from dspark_server.runtime.batch import Batch
from dspark_server.runtime.kv import LayerCache
from dspark_server.runtime.linear import Linear
from dspark_server.runtime.paging import CacheRows


@dataclass(frozen=True)
class AttentionConfig:
    """One layer's attention. `window`: tokens that a query sees, itself included; None: all.

    `shared_values`: there is no v_proj, values are keys before their norm and rotation. `value_norm`: values are
    normalised, without a weight. `scale` of the scores is head_dim^-0.5 unless given. `inputs` is the width of what is
    projected (None: the model's). No query sees tokens before `first_key`.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rope: RopeConfig
    window: int | None = None
    qk_norm: bool = False
    bias: bool = False
    output_bias: bool = False
    shared_values: bool = False
    value_norm: bool = False
    scale: float | None = None
    inputs: int | None = None
    first_key: int = 0

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads or self.head_dim % 2:
            raise CheckpointError(
                f"config.json: {self.heads} query heads over {self.kv_heads} key/value heads of size {self.head_dim}: "
                "the first must be a multiple of the second, the size even"
            )

    @property
    def parts(self) -> int:
        """The number of parts that ranks can share: whole heads."""
        return self.heads

    @property
    def queries(self) -> int:
        """Channels of all queries."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Channels of all keys; as many are of values."""
        return self.kv_heads * self.head_dim

    def shared_by(self, size: int) -> "AttentionConfig":
        """Return the share of one of `size` ranks; fewer key/value heads than ranks are on several of them."""
        return replace(self, heads=self.heads // size, kv_heads=max(1, self.kv_heads // size))

    def rows(self, length: int) -> CacheRows:
        """The rows that it keeps. A window as long as the longest sequence, of `length` tokens, is none."""
        return CacheRows(self.kv_heads, self.head_dim, None if (self.window or length) >= length else self.window)


@dataclass(frozen=True)
class AttentionWeights:
    """qkv [(Hq + 2 Hkv) * d, D] ([(Hq + Hkv) * d, D] with shared values), q_norm and k_norm [d], output [D, Hq * d]."""

    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: Tensor
    output_bias: Tensor | None

    @classmethod
    def read(cls, parts: Parts, config: AttentionConfig, prefix: str) -> "AttentionWeights":
        """Read this rank's heads under `prefix`, such as "model.layers.3.self_attn."; `config` is the whole layer's."""
        group = parts.group
        own = group.share(config.queries)
        keys = group.share_of_heads(config.kv_heads, config.head_dim)
        rows = {f"{prefix}q_proj": (config.queries, own), f"{prefix}k_proj": (config.keys, keys)}
        if not config.shared_values:
            rows[f"{prefix}v_proj"] = (config.keys, keys)
        qkv, qkv_bias = parts.fused(rows, config.inputs or parts.hidden, config.bias)
        output, output_bias = parts.summed(f"{prefix}o_proj", config.queries, own, config.output_bias)
        return cls(
            qkv,
            qkv_bias,
            parts.norm(f"{prefix}q_norm", config.head_dim) if config.qk_norm else None,
            parts.norm(f"{prefix}k_norm", config.head_dim) if config.qk_norm else None,
            output,
            output_bias,
        )


class Attention:
    """Attention of one layer, without the norm before it."""

    def __init__(self, parts: Parts, config: AttentionConfig, weights: AttentionWeights) -> None:
        self.config = config.shared_by(parts.group.size)
        self.scale = config.head_dim**-0.5 if config.scale is None else config.scale
        self.qkv = Linear(weights.qkv, weights.qkv_bias, parts.kernels)
        self.output = Linear(weights.output, weights.output_bias, parts.kernels)
        self.q_norm = weights.q_norm
        self.k_norm = weights.k_norm
        self.table = parts.rotary_table(config.rope, config.head_dim)
        self._kernels = parts.kernels
        self._group = parts.group
        self._eps = parts.eps

    @classmethod
    def load(cls, parts: Parts, config: AttentionConfig, prefix: str) -> "Attention":
        """Read the weights under `prefix`, and build it."""
        return cls(parts, config, AttentionWeights.read(parts, config, prefix))

    def caches(self, length: int) -> list[CacheRows]:
        """The kinds of rows that it keeps, for sequences of up to `length` tokens."""
        return [self.config.rows(length)]

    @property
    def products(self) -> list[Linear]:
        """Its matrix products, in order."""
        return [self.qkv, self.output]

    def forward(self, x: Tensor, batch: Batch, cache: LayerCache, causal: bool = True) -> Tensor:
        """Attend from x [N, inputs] over the cache, which gets the batch's rows, -> [N, D], the sum of all ranks.

        With causal=False each token sees all tokens of its run (a draft block).
        """
        keys, values, group = cache
        paging, config = batch.paging[group], self.config
        qkv = self.qkv(x)
        self._kernels.rotary_kv_write(
            qkv,
            batch.positions,
            self.table,
            paging.slots,
            keys,
            values,
            config.heads,
            self.q_norm,
            self.k_norm,
            self._eps,
            config.value_norm,
        )
        attended = self._kernels.paged_attention(
            qkv,
            config.heads,
            keys,
            values,
            batch.query_start,
            paging.context_len,
            paging.block_tables,
            self.scale,
            causal,
            config.window,
            first_key=config.first_key,
        )
        return self._group.all_reduce(self.output(attended))


class QueryAttention:
    """Attention of queries alone, over rows that another layer keeps: those of a token see rows before it only."""

    def __init__(self, parts: Parts, config: AttentionConfig, prefix: str) -> None:
        """Read the weights under `prefix`, whole on every rank."""
        self.config = config
        self.scale = config.head_dim**-0.5 if config.scale is None else config.scale
        self.queries = Linear(parts.matrix(f"{prefix}q_proj", config.queries), None, parts.kernels)
        self.output = Linear(*parts.summed(f"{prefix}o_proj", config.queries, EVERY, False), parts.kernels)
        self._q_norm = parts.norm(f"{prefix}q_norm", config.head_dim) if config.qk_norm else None
        self._table = parts.rotary_table(config.rope, config.head_dim)
        self._kernels = parts.kernels
        self._eps = parts.eps

    @property
    def products(self) -> list[Linear]:
        """Its matrix products, in order."""
        return [self.queries, self.output]

    def forward(self, x: Tensor, batch: Batch, cache: LayerCache, causal: bool = True) -> Tensor:
        """Attend from x [N, D], a token of each of N runs, over the rows before it in `cache` -> [N, D]."""
        keys, values, group = cache
        paging, config = batch.paging[group], self.config
        queries = self.queries(x)
        nothing = keys[:, :, :0]
        self._kernels.rotary_kv_write(
            queries,
            batch.positions,
            self._table,
            paging.slots,
            nothing,
            nothing,
            config.heads,
            self._q_norm,
            eps=self._eps,
        )
        attended = self._kernels.paged_attention(
            queries,
            config.heads,
            keys,
            values,
            batch.query_start,
            (paging.context_len - 1).clamp(min=0),
            paging.block_tables,
            self.scale,
            window=config.window,
        )
        return self.output(attended)


class ContextAttention:
    """Keys and values of context features for several layers' attention, in one product: a drafter's context."""

    def __init__(self, parts: Parts, configs: list[AttentionConfig], prefixes: list[str]) -> None:
        self._parts = parts
        self._configs = configs
        weights = [AttentionWeights.read(parts, *each) for each in zip(configs, prefixes, strict=True)]
        self._k_norms = [each.k_norm for each in weights]
        rows = [each.qkv[config.queries :] for each, config in zip(weights, configs, strict=True)]
        biases = [
            each.qkv_bias[config.queries :]
            for each, config in zip(weights, configs, strict=True)
            if each.qkv_bias is not None
        ]
        self.tensors = [torch.cat(rows), *biases]  # that determine the rows
        self._project = Linear(self.tensors[0], torch.cat(biases) if biases else None, parts.kernels)

    def write(self, features: Tensor, batch: Batch, caches: list[LayerCache]) -> None:
        """Write the rows of features [N, D] of the batch's tokens, rotated at their own positions, in each layer."""
        key_values, start = self._project(features), 0
        for config, k_norm, (keys, values, group) in zip(self._configs, self._k_norms, caches, strict=True):
            width = (1 if config.shared_values else 2) * config.keys
            self._parts.kernels.rotary_kv_write(
                key_values[:, start : start + width],
                batch.positions,
                self._parts.rotary_table(config.rope, config.head_dim),
                batch.paging[group].slots,
                keys,
                values,
                num_q_heads=0,
                k_norm=k_norm,
                eps=self._parts.eps,
                value_norm=config.value_norm,
            )
            start += width
