"""A decoder-only target model, of any family in the registry.

Shapes: N query tokens in the pass, M rows whose logits are wanted, D hidden size, V vocabulary. With tensor parallelism
each rank has its share of every layer and of the head's V; D is whole on all of them.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from dspark_kernels import Kernels
from torch import Tensor

from dspark_server.errors import ConfigError
from dspark_server.models.config import ModelConfig
from dspark_server.models.family import Family, Layer
from dspark_server.models.layers.embedding import Embedding, Head
from dspark_server.models.layers.parts import Parts
from dspark_server.models.layers.streams import StreamHead
from dspark_server.models.loading import WeightReader, open_checkpoint
from dspark_server.models.registry import family_of, load_config
from dspark_server.runtime.batch import Batch
from dspark_server.runtime.group import ONE_RANK, Group
from dspark_server.runtime.kv import LayerCache
from dspark_server.runtime.linear import Linear
from dspark_server.runtime.paging import CacheRows

logger = logging.getLogger(__name__)

# Rows of the rotary table beyond the served length: a draft block may begin at the last position.
ROTARY_MARGIN = 64


class Decoder:
    """The target model. Holds weights only: KV rows belong to the pool, sequences to the engine.

    In a group, every rank holds the embedding and its share of all else; `config` is the whole model's.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: list[Layer],
        embed: Embedding,
        final_norm: Tensor,
        head: Head,
        kernels: Kernels,
        max_model_len: int,
        group: Group = ONE_RANK,
        streams: StreamHead | None = None,
    ) -> None:
        self.config = config
        self.group = group
        self.layers = layers
        ends = list(accumulate(len(layer.attention.caches(max_model_len)) for layer in layers))
        self._kinds = [slice(*each) for each in pairwise([0, *ends])]  # by layer, its caches among all
        self.embed = embed
        self.head = head
        self.max_model_len = max_model_len
        self._final_norm = final_norm
        self._kernels = kernels
        self._streams = streams

    @classmethod
    def load(
        cls,
        directory: Path,
        dtype: torch.dtype,
        kernels: Kernels,
        max_model_len: int | None = None,
        group: Group = ONE_RANK,
        where: torch.device | None = None,
        whole_experts: bool = False,
    ) -> "Decoder":
        """Load a model directory to serve sequences of up to `max_model_len` tokens (default: the model's maximum).

        `where`: the device of the weights; None: the CPU. `whole_experts`: each on one rank of the group.

        Raises CheckpointError if the directory is not a complete checkpoint of a supported architecture, ConfigError if
        the dtype or the length cannot be served, or the group cannot share the model.
        """
        family, config = family_of(directory), load_config(directory, whole_experts)
        config.shared_by(group.size)
        length = check_length(config, max_model_len)
        if dtype not in (torch.bfloat16, torch.float32) and (where is None or dtype != torch.float16):
            raise ConfigError(f"dtype {dtype} is not supported on the CPU; use bfloat16 or float32")

        reader = WeightReader(open_checkpoint(directory), dtype, where)
        prefix = _prefix(family, reader)
        parts = Parts(reader, kernels, config.hidden_size, config.rms_norm_eps, length, length + ROTARY_MARGIN, group)
        vocabulary = (config.vocab_size, config.hidden_size)
        embedding = reader.take(f"{prefix}{family.embedding}", vocabulary)
        layers = [family.layer(parts, layer, f"{prefix}layers.{i}.") for i, layer in enumerate(config.layers)]
        final_norm = parts.norm(f"{prefix}norm")
        streams = StreamHead(parts, config.streams, f"{prefix}hc_head_") if config.streams else None
        if config.tie_word_embeddings and not _is_tied(reader, embedding, directory):
            config = replace(config, tie_word_embeddings=False)
        rows = group.share(config.vocab_size)
        tied = config.tie_word_embeddings
        head = embedding[rows] if tied else reader.take(family.head, vocabulary, rows)
        missing = -(-config.vocab_size // group.size) - len(head)
        if missing:  # the last rank's logits must be as wide as the others' to be gathered
            head = F.pad(head, (0, 0, 0, missing))
        reader.finish(config.ropes, family.unused)
        return cls(
            config,
            layers,
            Embedding(embedding, config.embedding_scale),
            final_norm,
            Head(Linear(head, None, kernels), config.softcap),
            kernels,
            length,
            group,
            streams,
        )

    @property
    def caches(self) -> list[CacheRows]:
        """The kinds of rows that each layer keeps, with the heads of this rank, one layer after the other."""
        return [rows for layer in self.layers for rows in layer.attention.caches(self.max_model_len)]

    def forward(
        self, batch: Batch, caches: Sequence[LayerCache], taps: tuple[int, ...] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """Run one pass over the batch and write its tokens' KV rows.

        Returns the hidden rows of `batch.logits_index` after the final norm [M, D], and for each tap the output of that
        decoder layer before any norm [N, D] (HF hidden_states[tap + 1]; -1 = the embeddings), in the order of `taps`,
        none of them a view of another. Where the residual has several streams, their mean; a tap one beyond the last
        layer is the streams themselves.
        """
        residual = self.embed(batch.tokens)
        tapped = {-1: residual.clone()} if -1 in taps else {}
        if self._streams is not None:
            residual = self._streams.begin(residual)
        delta: Tensor | None = None
        for index, (layer, kinds) in enumerate(zip(self.layers, self._kinds, strict=True)):
            delta = layer.forward(delta, residual, batch, caches[kinds])
            if index in taps:
                # The same sum, rounded the same way, as the next norm computes in place.
                output = residual.clone() if delta is None else residual + delta
                tapped[index] = output if self._streams is None else self._streams.mean(output)
        if len(self.layers) in taps:
            tapped[len(self.layers)] = residual.clone()
        return self._final_rows(delta, residual, batch.logits_index), [tapped[tap] for tap in taps]

    def _final_rows(self, delta: Tensor | None, residual: Tensor, rows: Tensor) -> Tensor:
        residual = residual.index_select(0, rows)
        if self._streams is not None:
            residual = self._streams.end(residual)
        if len(rows) == 0:  # a pass of prefill chunks alone
            return residual
        if delta is None:
            return self.normed(residual)
        delta = delta.index_select(0, rows)
        return self._kernels.add_rms_norm(delta, residual, self._final_norm, self.config.rms_norm_eps)

    def normed(self, output: Tensor) -> Tensor:
        """The last layer's output [N, D], a tap, after the final norm [N, D]."""
        return self._kernels.rms_norm(output, self._final_norm, self.config.rms_norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden rows after the final norm [M, D] -> logits [M, V] float32; those of all ranks on rank 0 only."""
        return self.group.gather(self.head(hidden), self.config.vocab_size)


def layers_prefix(directory: Path, reader: WeightReader) -> str:
    """The prefix of the names of a checkpoint's layers, such as "model.layers."."""
    return f"{_prefix(family_of(directory), reader)}layers."


def _prefix(family: Family, reader: WeightReader) -> str:
    return next((each for each in family.prefixes if f"{each}{family.embedding}" in reader), family.prefixes[0])


def _is_tied(reader: WeightReader, embedding: Tensor, directory: Path) -> bool:
    """Whether the head is the embedding, as config.json says; the file may still hold another head."""
    if "lm_head.weight" not in reader or torch.equal(reader.take("lm_head.weight", embedding.shape), embedding):
        return True
    logger.warning(
        "%s: tie_word_embeddings is true, but lm_head.weight differs from the embedding: the head is lm_head.weight",
        directory,
    )
    return False


def check_length(config: ModelConfig, max_model_len: int | None) -> int:
    """Return the length to serve in tokens. Raises ConfigError if it exceeds the model's positions."""
    if max_model_len is None:
        return config.max_length
    if not 1 <= max_model_len <= config.max_length:
        raise ConfigError(f"max_model_len {max_model_len} is not within 1 .. {config.max_length}, this model's limit")
    return max_model_len
