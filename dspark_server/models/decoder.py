"""The decoder-only target model: Llama, Mistral, Qwen2 and Qwen3 are one layer with a few options.

Shapes: N query tokens in the pass, M rows whose logits are wanted, D hidden size, Hq/Hkv query and key/value heads,
d head size, F feed-forward size, V vocabulary, P rotary positions. With tensor parallelism each rank has
its share of Hq, Hkv, F and of the head's V; D is whole on all of them.

The residual stream is explicit: a layer takes and returns (delta, residual), the stream being residual + delta, so
that each addition is fused with the norm after it.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from dspark_kernels import FusedLayer, Kernels, LayerParts
from torch import Tensor

from dspark_server.errors import ConfigError
from dspark_server.models.config import ModelConfig, load_config
from dspark_server.models.loading import WeightReader, open_checkpoint
from dspark_server.models.rope import rotary_table
from dspark_server.runtime.batch import Batch
from dspark_server.runtime.kv import LayerCache
from dspark_server.runtime.linear import Linear
from dspark_server.runtime.paging import CacheRows
from dspark_server.runtime.parallel import ALONE, Group

logger = logging.getLogger(__name__)

# Rows of the rotary table beyond the served length: a draft block may begin at the last position.
ROTARY_MARGIN = 64


@dataclass(frozen=True)
class LayerWeights:
    """One layer's tensors, the projections of the same input fused by rows.

    qkv [(Hq + 2 Hkv) * d, D], output [D, Hq * d], gate_up [2F, D], down [D, F], norms [D], q_norm and k_norm [d].
    """

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: Tensor
    output_bias: Tensor | None
    post_attention_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None

    @classmethod
    def read(cls, reader: WeightReader, config: ModelConfig, prefix: str, group: Group = ALONE) -> "LayerWeights":
        """Read the layer's tensors by their Hugging Face names under `prefix`, such as "model.layers.3.".

        `config` is the whole model's. In a group, each rank reads its own heads and its share of the feed-forward: rows
        of qkv and gate_up, columns of output and down, whose products are summed over the ranks.
        """
        hidden, feed_forward, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
        queries, keys = config.num_heads * head_dim, config.num_kv_heads * head_dim

        def fused(rows: dict[str, int], columns: int, bias: bool) -> tuple[Tensor, Tensor | None]:
            weights = [reader.take(f"{prefix}{name}.weight", (n, columns), group.share(n)) for name, n in rows.items()]
            biases = [reader.take(f"{prefix}{name}.bias", (n,), group.share(n)) for name, n in rows.items() if bias]
            return torch.cat(weights), torch.cat(biases) if bias else None

        def summed(name: str, columns: int, bias: bool) -> tuple[Tensor, Tensor | None]:
            weight = reader.take(f"{prefix}{name}.weight", (hidden, columns), columns=group.share(columns))
            added = reader.take(f"{prefix}{name}.bias", (hidden,)) if bias else None
            # A copy, not a view of the file's rows; only one rank adds the bias.
            return weight.clone(memory_format=torch.contiguous_format), added if group.rank == 0 else None

        def norm(name: str, size: int) -> Tensor:
            return reader.take(f"{prefix}{name}.weight", (size,))

        attention = {"self_attn.q_proj": queries, "self_attn.k_proj": keys, "self_attn.v_proj": keys}
        qkv, qkv_bias = fused(attention, hidden, config.qkv_bias)
        output, output_bias = summed("self_attn.o_proj", queries, config.output_bias)
        feed_in = {"mlp.gate_proj": feed_forward, "mlp.up_proj": feed_forward}
        gate_up, gate_up_bias = fused(feed_in, hidden, config.mlp_bias)
        down, down_bias = summed("mlp.down_proj", feed_forward, config.mlp_bias)
        return cls(
            input_norm=norm("input_layernorm", hidden),
            qkv=qkv,
            qkv_bias=qkv_bias,
            q_norm=norm("self_attn.q_norm", head_dim) if config.qk_norm else None,
            k_norm=norm("self_attn.k_norm", head_dim) if config.qk_norm else None,
            output=output,
            output_bias=output_bias,
            post_attention_norm=norm("post_attention_layernorm", hidden),
            gate_up=gate_up,
            gate_up_bias=gate_up_bias,
            down=down,
            down_bias=down_bias,
        )

    def key_value_rows(self, config: ModelConfig) -> tuple[Tensor, Tensor | None]:
        """Return the part of `qkv` for keys and values: weight [2 Hkv * d, D] and bias [2 Hkv * d] (views).

        A drafter stacks these of all its layers into one projection of the context features.
        """
        first = config.num_heads * config.head_dim
        return self.qkv[first:], None if self.qkv_bias is None else self.qkv_bias[first:]


class DecoderLayer:
    """Attention and feed-forward over the residual stream; serves the target (causal) and a drafter (not causal).

    In a group, `config` and `weights` are this rank's share.
    """

    def __init__(
        self, config: ModelConfig, index: int, weights: LayerWeights, kernels: Kernels, group: Group = ALONE
    ) -> None:
        self._kernels = kernels
        self._group = group
        self._eps = config.rms_norm_eps
        self._num_heads = config.num_heads
        self._scale = config.head_dim**-0.5
        self._window = config.sliding_windows[index]
        self._input_norm = weights.input_norm
        self._post_attention_norm = weights.post_attention_norm
        self._q_norm = weights.q_norm
        self._k_norm = weights.k_norm
        self._qkv = Linear(weights.qkv, weights.qkv_bias, kernels)
        self._output = Linear(weights.output, weights.output_bias, kernels)
        self._gate_up = Linear(weights.gate_up, weights.gate_up_bias, kernels)
        self._down = Linear(weights.down, weights.down_bias, kernels)
        self._fused = self._fuse(config, weights)

    def _fuse(self, config: ModelConfig, weights: LayerWeights) -> FusedLayer | None:
        """Fuse the layer into one call, if the kernels can, have all packed weights, and there is one rank."""
        qkv, output, gate_up, down = (product.packed for product in self.products)
        if self._group.size > 1 or qkv is None or output is None or gate_up is None or down is None:
            return None
        return self._kernels.fuse_layer(
            LayerParts(
                weights.input_norm,
                weights.post_attention_norm,
                weights.q_norm,
                weights.k_norm,
                qkv,
                output,
                gate_up,
                down,
                q_heads=config.num_heads,
                kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                window=self._window,
                eps=self._eps,
                scale=self._scale,
            )
        )

    @property
    def products(self) -> list[Linear]:
        """The layer's matrix products in order; they are the lower bound of a pass's time (PERFORMANCE)."""
        return [self._qkv, self._output, self._gate_up, self._down]

    def forward(
        self,
        delta: Tensor | None,
        residual: Tensor,
        batch: Batch,
        cache: LayerCache,
        cos_sin: Tensor,
        causal: bool = True,
    ) -> Tensor:
        """Run the layer and return its delta [N, D]; the layer's output is `residual` + the returned delta.

        `residual` [N, D] is updated in place; `delta` [N, D] is the previous layer's result (it may be overwritten),
        None for the first layer. `cache` receives the rows of this batch's tokens; cos_sin [P, d] float32. With
        causal=False each token sees all tokens of its run (a draft block).
        """
        keys, values, group = cache
        paging = batch.paging[group]
        if self._fused is not None:
            return self._fused(
                delta,
                residual,
                batch.positions,
                cos_sin,
                paging.slots,
                keys,
                values,
                batch.query_start,
                paging.context_len,
                paging.block_tables,
                causal,
            )
        kernels, eps = self._kernels, self._eps
        if delta is None:
            x = kernels.rms_norm(residual, self._input_norm, eps)
        else:
            x = kernels.add_rms_norm(delta, residual, self._input_norm, eps)
        qkv = self._qkv(x)
        kernels.rotary_kv_write(
            qkv,
            batch.positions,
            cos_sin,
            paging.slots,
            keys,
            values,
            self._num_heads,
            self._q_norm,
            self._k_norm,
            eps,
        )
        attended = kernels.paged_attention(
            qkv,
            self._num_heads,
            keys,
            values,
            batch.query_start,
            paging.context_len,
            paging.block_tables,
            self._scale,
            causal,
            self._window,
        )
        summed = self._group.all_reduce(self._output(attended))
        x = kernels.add_rms_norm(summed, residual, self._post_attention_norm, eps)
        return self._group.all_reduce(self._down(kernels.silu_mul(self._gate_up(x))))


class Decoder:
    """The target model. Holds weights only: KV rows belong to the pool, sequences to the engine.

    In a group, every rank holds the embedding and its share of all else; `config` is the whole model's.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: list[DecoderLayer],
        embedding: Tensor,
        final_norm: Tensor,
        lm_head: Linear,
        cos_sin: Tensor,
        kernels: Kernels,
        max_model_len: int,
        group: Group = ALONE,
    ) -> None:
        self.config = config
        self.group = group
        self.layers = layers
        self.embedding = embedding
        self.lm_head = lm_head
        self.cos_sin = cos_sin
        self.max_model_len = max_model_len
        self._final_norm = final_norm
        self._kernels = kernels

    @classmethod
    def load(
        cls,
        directory: Path,
        dtype: torch.dtype,
        kernels: Kernels,
        max_model_len: int | None = None,
        group: Group = ALONE,
        where: torch.device | None = None,
    ) -> "Decoder":
        """Load a model directory to serve sequences of up to `max_model_len` tokens (default: the model's maximum).

        `where`: the device of the weights; None: the CPU.

        Raises CheckpointError if the directory is not a complete checkpoint of a supported architecture, ConfigError if
        the dtype or the length cannot be served, or the group cannot share the model.
        """
        config = load_config(directory)
        share = config.shared_by(group.size)
        length = check_length(config, max_model_len)
        if dtype not in (torch.bfloat16, torch.float32) and (where is None or dtype != torch.float16):
            raise ConfigError(f"dtype {dtype} is not supported on the CPU; use bfloat16 or float32")

        reader = WeightReader(open_checkpoint(directory), dtype, where)
        vocabulary = (config.vocab_size, config.hidden_size)
        embedding = reader.take("model.embed_tokens.weight", vocabulary)
        layers = [
            DecoderLayer(share, i, LayerWeights.read(reader, config, f"model.layers.{i}.", group), kernels, group)
            for i in range(config.num_layers)
        ]
        final_norm = reader.take("model.norm.weight", (config.hidden_size,))
        if config.tie_word_embeddings and not _is_tied(reader, embedding, directory):
            config = replace(config, tie_word_embeddings=False)
        rows = group.share(config.vocab_size)
        tied = config.tie_word_embeddings
        head = embedding[rows] if tied else reader.take("lm_head.weight", vocabulary, rows)
        missing = -(-config.vocab_size // group.size) - len(head)
        if missing:  # the last rank's logits must be as wide as the others' to be gathered
            head = F.pad(head, (0, 0, 0, missing))
        reader.finish(config)

        cos_sin = rotary_table(config, length, positions=length + ROTARY_MARGIN).to(embedding.device)
        return cls(config, layers, embedding, final_norm, Linear(head, None, kernels), cos_sin, kernels, length, group)

    @property
    def caches(self) -> list[CacheRows]:
        """What each layer keeps, with the heads of this rank."""
        return cache_rows(self.config, self.max_model_len, self.config.num_kv_heads // self.group.size)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [N] int64 -> their embeddings [N, D], a fresh tensor."""
        return F.embedding(tokens, self.embedding)

    def forward(
        self, batch: Batch, caches: Sequence[LayerCache], taps: tuple[int, ...] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """Run one pass over the batch and write its tokens' KV rows.

        Returns the hidden rows of `batch.logits_index` after the final norm [M, D], and for each tap the output of that
        decoder layer before any norm [N, D] (HF hidden_states[tap + 1]; -1 = the embeddings), in the order of `taps`,
        none of them a view of another.
        """
        residual = self.embed(batch.tokens)
        tapped = {-1: residual.clone()} if -1 in taps else {}
        delta: Tensor | None = None
        for index, (layer, cache) in enumerate(zip(self.layers, caches, strict=True)):
            delta = layer.forward(delta, residual, batch, cache, self.cos_sin)
            if index in taps:
                # The same sum, rounded the same way, as the next norm computes in place.
                tapped[index] = residual + delta
        assert delta is not None  # a config has at least one layer
        return self._final_rows(delta, residual, batch.logits_index), [tapped[tap] for tap in taps]

    def _final_rows(self, delta: Tensor, residual: Tensor, rows: Tensor) -> Tensor:
        delta, residual = delta.index_select(0, rows), residual.index_select(0, rows)
        if len(rows) == 0:  # a pass of prefill chunks alone
            return residual
        return self._kernels.add_rms_norm(delta, residual, self._final_norm, self.config.rms_norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden rows after the final norm [M, D] -> logits [M, V] float32; those of all ranks on rank 0 only."""
        return self.group.gather(self.lm_head(hidden, out_float32=True), self.config.vocab_size)


def _is_tied(reader: WeightReader, embedding: Tensor, directory: Path) -> bool:
    """Whether the head is the embedding, as config.json says; the file may still hold another head."""
    if "lm_head.weight" not in reader or torch.equal(reader.take("lm_head.weight", embedding.shape), embedding):
        return True
    logger.warning(
        "%s: tie_word_embeddings is true, but lm_head.weight differs from the embedding: the head is lm_head.weight",
        directory,
    )
    return False


def cache_rows(config: ModelConfig, max_model_len: int, kv_heads: int) -> list[CacheRows]:
    """What each layer keeps. A window as long as the longest sequence is none."""
    return [
        CacheRows(kv_heads, config.head_dim, None if window is None or window >= max_model_len else window)
        for window in config.sliding_windows
    ]


def check_length(config: ModelConfig, max_model_len: int | None) -> int:
    """Return the length to serve in tokens. Raises ConfigError if it exceeds the model's positions."""
    if max_model_len is None:
        return config.max_length
    if not 1 <= max_model_len <= config.max_length:
        raise ConfigError(f"max_model_len {max_model_len} is not within 1 .. {config.max_length}, this model's limit")
    return max_model_len
