"""Eagle3: one layer that runs token by token over pairs of a target's features and the next token (Li et al., 2025).

Pair i is (features of token i, token i + 1) and predicts token i + 2. Its row goes to the place of token i + 1, on
whose pass both are known: then a row depends on tokens up to its own place alone. Rotary embedding sees differences of
positions only, so the place serves for the position. Place 0 has no pair, and no query sees it.

Shapes: R drafting requests, N tokens of a target pass, D the drafter's width, Dt the target's, m taps, Vd tokens that
may be drafted.
"""

import hashlib
import logging
from pathlib import Path

import torch
from dspark_kernels import Kernels
from torch import Tensor

from dspark_server.models.decoder import Decoder
from dspark_server.models.layers.attention import Attention, ContextAttention
from dspark_server.models.layers.embedding import Embedding, Head
from dspark_server.models.layers.mlp import Mlp, MlpConfig
from dspark_server.models.layers.parts import Parts
from dspark_server.models.loading import WeightReader, open_checkpoint
from dspark_server.runtime.batch import Batch
from dspark_server.runtime.kv import KVPool, LayerCache
from dspark_server.runtime.linear import Linear
from dspark_server.runtime.paging import CacheRows
from dspark_server.speculation import features
from dspark_server.speculation.calibration import Calibration
from dspark_server.speculation.copying import CopyTables
from dspark_server.speculation.eagle3_formats import Eagle3Config
from dspark_server.speculation.model_drafter import ModelDrafter, Slots
from dspark_server.speculation.pair import embeddings, read_draft_tokens, warn_of_mismatch
from dspark_server.speculation.sequential import BlockSampler

logger = logging.getLogger(__name__)


class Eagle3Drafter(ModelDrafter):
    """Drafts a token in each pass. `observe` writes features of the target's tokens, and keys and values of pairs."""

    method = "eagle3"

    def __init__(
        self,
        config: Eagle3Config,
        layer: "PairLayer",
        context: "PairContext",
        sampler: BlockSampler,
        final_norm: Tensor,
        embed: Embedding,
        head: Head,
        kernels: Kernels,
        max_model_len: int,
        copying: CopyTables | None,
    ) -> None:
        super().__init__(config.depth, config.taps, context.digest, sampler, copying)
        self.config = config
        self.passes = config.depth
        self._layer = layer
        self._context = context
        self._final_norm = final_norm
        self._embed = embed
        self._head = head
        self._kernels = kernels
        self._max_model_len = max_model_len

    @property
    def caches(self) -> list[CacheRows]:
        """Keys and values of the layer, and the features."""
        own = self._layer.attention.config
        return [
            CacheRows(own.kv_heads, own.head_dim),
            CacheRows(1, self.config.decoder.hidden_size, values=False, dtype=self._embed.weight.dtype),
        ]

    @classmethod
    def load(
        cls,
        directory: Path,
        target: Decoder,
        target_directory: Path,
        dtype: torch.dtype,
        kernels: Kernels,
        depth: int | None = None,
        tap_convention: str = "auto",
        copying: bool = True,
    ) -> "Eagle3Drafter":
        """Load a checkpoint of any format in `eagle3_formats` for `target`; `depth` tokens a draft (None: as trained).

        `tap_convention`: whether numbers of taps in the config count layers' outputs or inputs ("auto": the format's);
        `copying` as in `DSparkDrafter.load`.

        Raises CheckpointError if a tensor is missing, unexpected or misshapen, or the pair does not fit.
        """
        config = Eagle3Config.load(directory, target.config, depth, tap_convention)
        logger.info(
            "Eagle3 of %s: its features are the outputs of the target's layers %s (0 is the first)",
            config.format.name,
            ", ".join(map(str, config.taps)),
        )
        decoder, length = config.decoder, target.max_model_len
        reader = WeightReader(open_checkpoint(directory), dtype, target.embed.weight.device)
        parts = Parts(reader, kernels, decoder.hidden_size, decoder.rms_norm_eps, length, length + config.depth)
        warn_of_mismatch(config.target_digest, decoder.max_length, target, target_directory)
        draft_tokens = read_draft_tokens(reader, config.draft_vocab_size, decoder.vocab_size)
        embed, head = embeddings(
            reader,
            draft_tokens,
            decoder.embedding_scale,
            decoder.softcap,
            target,
            target_directory,
            kernels,
            copies=config.format.copies,
            width=decoder.hidden_size,
        )
        prefixes = config.format.layers
        prefix = next((each for each in prefixes if f"{each}hidden_norm.weight" in reader), prefixes[0])
        layer = PairLayer(parts, config, prefix)
        context = PairContext(parts, config, prefix, target.config.hidden_size)
        final_norm = parts.norm("norm")
        reader.finish(decoder.ropes)
        calibration = Calibration.load(directory, config.depth, confidence=False)
        sampler = BlockSampler(decoder.vocab_size, None, None, calibration, draft_tokens, kernels)
        copies = calibration.copying if copying else None
        return cls(config, layer, context, sampler, final_norm, embed, head, kernels, length, copies)

    def observe(self, taps: list[Tensor], batch: Batch, pool: KVPool) -> None:
        """Write each token's features, and the row of the pair that ends with it."""
        rows, kept = pool.layers(1)
        before = features.keep(self._context.features(taps), batch, kept)
        self._context.write(self._layer.inputs(self._embed(batch.tokens), before)[0], batch, rows)

    def forward(self, number: int, blocks: Batch, previous: Tensor, state: Tensor | None, pool: KVPool) -> Slots:
        """One token more: the pair of the features before it, the target's or the drafter's own, and the last token."""
        rows, kept = pool.layers(1)
        before = features.last(blocks, kept) if state is None else state
        batch = blocks.slot(number, self.gamma, previous)
        hidden = self._layer.forward(self._embed(previous), before, batch, rows)
        base = self._head(self._kernels.rms_norm(hidden, self._final_norm, self.config.decoder.rms_norm_eps))
        return Slots(hidden.unsqueeze(1), base.unsqueeze(1), hidden)


class PairLayer:
    """The layer: attention over [norm(embedding); norm(features)], which are twice as wide; the residual is features.

    Gemma4's has norms on both sides, and a scale.
    """

    def __init__(self, parts: Parts, config: Eagle3Config, prefix: str) -> None:
        layer = config.layer
        self._kernels, self._eps = parts.kernels, parts.eps
        self._norm_before_residual = config.norm_before_residual
        self._input_norm = parts.norm(f"{prefix}input_layernorm")
        self._hidden_norm = parts.norm(f"{prefix}hidden_norm")
        self._post_attention_norm = parts.norm(f"{prefix}post_attention_layernorm")
        self._around: tuple[Tensor, Tensor, float] | None = None
        if config.format.sandwich:
            self._around = (
                parts.norm(f"{prefix}pre_feedforward_layernorm"),
                parts.norm(f"{prefix}post_feedforward_layernorm"),
                float(parts.reader.take(f"{prefix}layer_scalar", (1,))),
            )
        self.attention = Attention.load(parts, layer.attention, f"{prefix}self_attn.")
        assert isinstance(layer.mlp, MlpConfig)
        self.mlp = Mlp(parts, layer.mlp, f"{prefix}mlp.")

    def inputs(self, embedding: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """The input of attention [N, 2 D] and the residual [N, D] of pairs; the residual is not `before` itself."""
        normed = self._kernels.rms_norm(before, self._hidden_norm, self._eps)
        wide = torch.cat([self._kernels.rms_norm(embedding, self._input_norm, self._eps), normed], dim=1)
        return wide, normed if self._norm_before_residual else before.clone()

    def forward(self, embedding: Tensor, before: Tensor, batch: Batch, cache: LayerCache) -> Tensor:
        """The layer's output [N, D] for pairs of features `before` [N, D] and tokens' embeddings [N, D]."""
        kernels, eps = self._kernels, self._eps
        wide, residual = self.inputs(embedding, before)
        attended = self.attention.forward(wide, batch, cache)
        if self._around is None:
            x = kernels.add_rms_norm(attended, residual, self._post_attention_norm, eps)
            return residual.add_(self.mlp.forward(x))
        pre, post, scalar = self._around
        kernels.norm_add(attended, residual, self._post_attention_norm, eps)
        kernels.norm_add(self.mlp.forward(kernels.rms_norm(residual, pre, eps)), residual, post, eps, scalar)
        return residual


class PairContext:
    """Features of the target's taps, and keys and values of pairs. `digest` names the drafter by weights of these."""

    def __init__(self, parts: Parts, config: Eagle3Config, prefix: str, target_hidden: int) -> None:
        taps = len(config.taps) * (config.target_hidden_size or target_hidden)
        weight = parts.reader.take("fc.weight", (parts.hidden, taps))
        self._features = Linear(weight, None, parts.kernels)
        self._norm = parts.norm("input_norm", taps) if config.norm_before_fc else None
        self._kernels, self._eps = parts.kernels, parts.eps
        self._rows = ContextAttention(parts, [config.layer.attention], [f"{prefix}self_attn."])
        digest = hashlib.sha256()
        for tensor in (weight, *([] if self._norm is None else [self._norm]), *self._rows.tensors):
            digest.update(tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes())
        self._rows.tensors.clear()
        self.digest = digest.hexdigest()

    def features(self, taps: list[Tensor]) -> Tensor:
        """Features [N, D] of taps, m times [N, Dt]."""
        joined = torch.cat(taps, dim=-1)
        if self._norm is not None:
            joined = self._kernels.rms_norm(joined, self._norm, self._eps)
        return self._features(joined)

    def write(self, wide: Tensor, batch: Batch, cache: LayerCache) -> None:
        """Write keys and values of pairs, from the input of attention [N, 2 D]."""
        self._rows.write(wide, batch, [cache])
