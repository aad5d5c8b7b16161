"""Eagle3: one layer over pairs of a target's features and the next token (Li et al., 2025).

Shapes as in `pairs`; Vd tokens that may be drafted.
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
from dspark_server.runtime.kv import LayerCache
from dspark_server.runtime.linear import Linear
from dspark_server.runtime.paging import CacheRows
from dspark_server.speculation.calibration import Calibration
from dspark_server.speculation.copying import CopyTables
from dspark_server.speculation.eagle3_formats import Eagle3Config
from dspark_server.speculation.pair import embeddings, read_draft_tokens, warn_of_mismatch
from dspark_server.speculation.pairs import PairDrafter
from dspark_server.speculation.sequential import BlockSampler

logger = logging.getLogger(__name__)


class Eagle3Drafter(PairDrafter):
    """Features are a projection of the taps; those of a drafted token are the layer's output before the final norm."""

    method = "eagle3"

    def __init__(
        self,
        config: Eagle3Config,
        layer: "PairLayer",
        context: "PairContext",
        final_norm: Tensor,
        embed: Embedding,
        head: Head,
        sampler: BlockSampler,
        kernels: Kernels,
        copying: CopyTables | None,
    ) -> None:
        own = layer.attention.config
        rows = CacheRows(own.kv_heads, own.head_dim)
        super().__init__(config.depth, config.taps, context.digest, rows, embed, head, sampler, copying)
        self.config = config
        self._layer = layer
        self._context = context
        self._final_norm = final_norm
        self._kernels = kernels

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
        return cls(config, layer, context, final_norm, embed, head, sampler, kernels, copies)

    def features(self, taps: list[Tensor]) -> Tensor:
        """See PairDrafter."""
        return self._context.features(taps)

    def write(self, embedded: Tensor, before: Tensor, batch: Batch, cache: LayerCache) -> None:
        """See PairDrafter."""
        self._context.write(self._layer.inputs(embedded, before)[0], batch, cache)

    def step(self, embedded: Tensor, before: Tensor, batch: Batch, cache: LayerCache) -> tuple[Tensor, Tensor]:
        """See PairDrafter."""
        hidden = self._layer.forward(embedded, before, batch, cache)
        return hidden, self._kernels.rms_norm(hidden, self._final_norm, self.config.decoder.rms_norm_eps)


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
