"""The DSpark drafter: a parallel backbone over the target's features (DSpark §3.1); `sequential` holds its other half.

DFlash is the same with Markov rank 0 and no confidence head. Shapes: R drafting requests, gamma draft tokens each, B
tokens of a block's pass, D hidden size, V vocabulary, N tokens of a target pass, m taps.
"""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from dspark_kernels import Kernels
from torch import Tensor

from dspark_server.models.config import LayerConfig
from dspark_server.models.decoder import Decoder
from dspark_server.models.family import Layer
from dspark_server.models.layers.attention import ContextAttention
from dspark_server.models.layers.conv import ConvLayer
from dspark_server.models.layers.embedding import Embedding, Head
from dspark_server.models.layers.parts import Parts
from dspark_server.models.loading import WeightReader, open_checkpoint
from dspark_server.models.registry import DRAFT_LAYERS
from dspark_server.runtime.batch import Batch
from dspark_server.runtime.kv import KVPool, LayerCache
from dspark_server.runtime.linear import Linear
from dspark_server.runtime.paging import CacheRows
from dspark_server.speculation.calibration import Calibration
from dspark_server.speculation.copying import CopyTables
from dspark_server.speculation.dspark_formats import DSparkConfig
from dspark_server.speculation.heads import ConfidenceHead, SelectorHead, build_head
from dspark_server.speculation.model_drafter import ModelDrafter, Slots
from dspark_server.speculation.pair import (
    embeddings,
    read_draft_tokens,
    warn_of_mismatch,
)
from dspark_server.speculation.sequential import BlockSampler


class DSparkDrafter(ModelDrafter):
    """Drafts blocks of gamma tokens in one pass. Its context K/V are written by `observe`."""

    passes = 1

    def __init__(
        self,
        config: DSparkConfig,
        layers: list[Layer],
        context: "ContextFeatures",
        sampler: BlockSampler,
        final_norm: Tensor,
        embed: Embedding,
        head: Head,
        kernels: Kernels,
        max_model_len: int,
        copying: CopyTables | None,
    ) -> None:
        super().__init__(config.gamma, config.taps, context.digest, sampler, copying)
        self.config = config
        self.method = "dflash2" if config.selector else "dspark" if config.markov_rank else "dflash"
        self.width = config.block_size
        self.mask_token = config.mask_token_id
        self._layers = layers
        self._context = context
        self._final_norm = final_norm
        self._embed = embed
        self._head = head
        self._kernels = kernels
        self._max_model_len = max_model_len

    @property
    def caches(self) -> list[CacheRows]:
        """The rows that each of its layers keeps."""
        return [rows for layer in self._layers for rows in layer.attention.caches(self._max_model_len)]

    @classmethod
    def load(
        cls,
        directory: Path,
        target: Decoder,
        target_directory: Path,
        dtype: torch.dtype,
        kernels: Kernels,
        shortlist: int | None = None,
        copying: bool = True,
    ) -> "DSparkDrafter":
        """Load a checkpoint for `target`; embeddings equal to the target's are shared with it.

        `shortlist` is K, the number of tokens of each position's base logits that the sequential head looks at; None:
        all. `copying`: drafts may be biased to tokens that followed the same tokens earlier in the sequence.

        Raises CheckpointError if a tensor is missing, unexpected or misshapen, or the pair does not fit.
        """
        config = DSparkConfig.load(directory, target.config)
        decoder, length = config.decoder, target.max_model_len
        reader = WeightReader(open_checkpoint(directory), dtype, target.embed.weight.device)
        hidden = decoder.hidden_size
        parts = Parts(reader, kernels, hidden, decoder.rms_norm_eps, length, length + config.block_size)
        warn_of_mismatch(config.target_digest, decoder.max_length, target, target_directory)
        draft_tokens = read_draft_tokens(reader, config.draft_vocab_size, decoder.vocab_size)
        embed, lm_head = embeddings(
            reader,
            draft_tokens,
            config.embedding_scale,
            config.softcap,
            target,
            target_directory,
            kernels,
            copies=config.copies,
            logit_scale=config.logit_scale,
        )
        head = build_head(
            config.markov_head_type,
            reader,
            rank=config.markov_rank,
            hidden_size=hidden,
            vocab_size=decoder.vocab_size,
            draft_vocab_size=config.draft_vocab_size or decoder.vocab_size,
            kernels=kernels,
        )
        confidence = None
        if config.confidence:
            width = hidden + (config.markov_rank if config.confidence_with_markov else 0)
            confidence = ConfidenceHead(
                reader.take("confidence_head.proj.weight", (1, width)),
                reader.take("confidence_head.proj.bias", (1,)),
                with_markov=config.confidence_with_markov,
            )
        make: Callable[[Parts, LayerConfig, str], Layer] = DRAFT_LAYERS[config.architecture].layer
        if config.conv is not None:
            make = partial(ConvLayer, conv=config.conv)
        layers = [make(parts, layer, f"layers.{i}.") for i, layer in enumerate(decoder.layers)]
        context, final_norm = ContextFeatures(parts, config), parts.norm("norm")
        calibration = Calibration.load(directory, config.gamma)
        vocabulary = decoder.vocab_size
        if config.selector is not None:
            rank, shortlist = config.selector
            head = SelectorHead.load(reader, rank, hidden, vocabulary, config.draft_vocab_size or vocabulary, kernels)
        sampler = BlockSampler(
            vocabulary,
            head,
            confidence,
            calibration,
            draft_tokens,
            kernels,
            shortlist,
            successors=config.selector is None,
        )
        reader.finish(decoder.ropes)
        return cls(
            config,
            layers,
            context,
            sampler,
            final_norm,
            embed,
            lm_head,
            kernels,
            length,
            copying=calibration.copying if copying else None,
        )

    def observe(self, taps: list[Tensor], batch: Batch, pool: KVPool) -> None:
        """Write K and V of H_ctx for every token of the pass (DSPARK.md, "Draft context")."""
        self._context.write(taps, batch, pool.layers(1))

    def forward(self, number: int, blocks: Batch, previous: Tensor, state: Tensor | None, pool: KVPool) -> Slots:
        """The backbone over [anchor, mask, ...], with attention over block and context: h_k after the final norm.

        The last gamma slots are those that predict.
        """
        residual = self._embed(blocks.tokens)
        delta: Tensor | None = None
        for layer, cache, causal in zip(self._layers, pool.layers(1), self.config.causal, strict=True):
            delta = layer.forward(delta, residual, blocks, [cache], causal)
        eps = self.config.decoder.rms_norm_eps
        if delta is None:
            hidden = self._kernels.rms_norm(residual, self._final_norm, eps)
        else:
            hidden = self._kernels.add_rms_norm(delta, residual, self._final_norm, eps)
        if self.width > self.gamma:
            hidden = hidden.unflatten(0, (-1, self.width))[:, self.width - self.gamma :].flatten(0, 1)
        base = self._head(hidden)
        return Slots(hidden.unflatten(0, (-1, self.gamma)), base.unflatten(0, (-1, self.gamma)))


class ContextFeatures:
    """H_ctx = RMSNorm(W_c [H_l1; ...; H_lm]) and its keys and values for all draft layers (DSpark §3.1).

    H_ctx does not pass the layers' input norms, so one stacked projection serves all of them. `digest` names the
    weights that shape the rows, for the prefix cache.
    """

    def __init__(self, parts: Parts, config: DSparkConfig) -> None:
        features = parts.reader.take("fc.weight", (parts.hidden, len(config.taps) * parts.hidden))
        self._features = Linear(features, None, parts.kernels)
        self._norm = parts.norm("hidden_norm")
        self._kernels, self._eps = parts.kernels, parts.eps
        layers = config.decoder.layers
        prefixes = [f"layers.{i}.self_attn." for i in range(len(layers))]
        self._rows = ContextAttention(parts, [layer.attention for layer in layers], prefixes)
        digest = hashlib.sha256()
        for tensor in (features, self._norm, *self._rows.tensors):
            digest.update(tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes())
        self._rows.tensors.clear()
        self.digest = digest.hexdigest()

    def write(self, taps: list[Tensor], batch: Batch, caches: list[LayerCache]) -> None:
        """Write each token's rows in each draft layer, rotated at its own position. taps: m times [N, D]."""
        features = self._features(torch.cat(taps, dim=-1))
        self._rows.write(self._kernels.rms_norm(features, self._norm, self._eps), batch, caches)
