"""An MTP layer: one layer of the usual kind over pairs of a target's last state and the next token.

As in DeepSeek-V3 (arXiv 2412.19437, §2.2) and FastMTP (arXiv 2509.18362), in the format of speculators' `mtp`. Trained
for one token, it drafts several by repetition: its own normed output takes the place of the target's.

Shapes as in `pairs`; Vd tokens that may be drafted.
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
from dspark_server.models.fields import read_json
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
from dspark_server.speculation.eagle3_formats import (
    SPECULATORS_FIELDS,
    draft_vocabulary,
    layer_config,
    speculative_tokens,
)
from dspark_server.speculation.pair import (
    HARMLESS,
    Noted,
    check_known,
    check_widths,
    embeddings,
    read_draft_tokens,
    warn_of_mismatch,
    whole,
)
from dspark_server.speculation.pairs import PairDrafter
from dspark_server.speculation.sequential import BlockSampler

PREFIX = "mtp_layers.0."


@dataclass(frozen=True)
class MtpConfig:
    """`decoder` has the layer's fields, `depth` draft tokens of a block.

    Ours, beside the format's: `draft_vocab_size` tokens may be drafted (None: all), `target_digest` is `head_digest` of
    the target.
    """

    decoder: ModelConfig
    depth: int
    draft_vocab_size: int | None = None
    target_digest: str | None = None

    @property
    def layer(self) -> LayerConfig:
        """The layer; place 0 has no pair."""
        layer = self.decoder.layers[0]
        return replace(layer, attention=replace(layer.attention, first_key=1))

    @classmethod
    def load(cls, directory: Path, target: ModelConfig, depth: int | None = None) -> "MtpConfig":
        """Read config.json and check it against the target. Raises CheckpointError if they do not fit."""
        return cls.parse(read_json(directory / "config.json"), target, depth)

    @classmethod
    def parse(cls, given: Mapping[str, Any], target: ModelConfig, depth: int | None = None) -> "MtpConfig":
        """The same from the file's fields."""
        fields = Noted(given)
        decoder = layer_config(fields)
        if whole(fields, "num_nextn_predict_layers", minimum=1) != 1:
            raise CheckpointError(
                "MTP drafters of several layers are not supported: num_nextn_predict_layers must be 1."
            )
        if decoder.layers[0].attention.window is not None:
            raise CheckpointError("An MTP layer must see the whole context, not a sliding_window.")
        check_widths(decoder, target, ("vocab_size", "hidden_size"))
        trained = speculative_tokens(fields, 1)
        config = cls(
            decoder,
            depth or trained,
            draft_vocabulary(fields, decoder),
            fields.get("target_digest"),
        )
        check_known(given, fields.read, HARMLESS | SPECULATORS_FIELDS)
        return config


class MtpDrafter(PairDrafter):
    """Features are the target's states after its final norm; those of a drafted token are the layer's after its own."""

    method = "mtp"

    def __init__(
        self,
        config: MtpConfig,
        layer: "MtpLayer",
        target: Decoder,
        embed: Embedding,
        head: Head,
        sampler: BlockSampler,
        copying: CopyTables | None,
    ) -> None:
        own = layer.attention.config
        rows, last = CacheRows(own.kv_heads, own.head_dim), target.config.num_layers - 1
        super().__init__(config.depth, (last,), layer.digest, rows, embed, head, sampler, copying)
        self.config = config
        self._layer = layer
        self._target = target

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
    ) -> "MtpDrafter":
        """Load a checkpoint for `target`; `depth` tokens a draft (None: as trained). `copying`: see `DSparkDrafter`.

        Raises CheckpointError if a tensor is missing, unexpected or misshapen, or the pair does not fit.
        """
        config = MtpConfig.load(directory, target.config, depth)
        decoder, length = config.decoder, target.max_model_len
        reader = WeightReader(open_checkpoint(directory), dtype, target.embed.weight.device)
        parts = Parts(reader, kernels, decoder.hidden_size, decoder.rms_norm_eps, length, length + config.depth)
        warn_of_mismatch(config.target_digest, decoder.max_length, target, target_directory)
        draft_tokens = read_draft_tokens(reader, config.draft_vocab_size, decoder.vocab_size)
        embed, head = embeddings(reader, draft_tokens, 1.0, None, target, target_directory, kernels)
        layer = MtpLayer(parts, config)
        reader.finish(decoder.ropes)
        calibration = Calibration.load(directory, config.depth, confidence=False)
        sampler = BlockSampler(decoder.vocab_size, None, None, calibration, draft_tokens, kernels)
        return cls(config, layer, target, embed, head, sampler, calibration.copying if copying else None)

    def features(self, taps: list[Tensor]) -> Tensor:
        """See PairDrafter."""
        return self._target.normed(taps[0])

    def write(self, embedded: Tensor, before: Tensor, batch: Batch, cache: LayerCache) -> None:
        """See PairDrafter."""
        self._layer.write(self._layer.inputs(embedded, before), batch, cache)

    def step(self, embedded: Tensor, before: Tensor, batch: Batch, cache: LayerCache) -> tuple[Tensor, Tensor]:
        """See PairDrafter."""
        normed = self._layer.forward(self._layer.inputs(embedded, before), batch, cache)
        return normed, normed


class MtpLayer:
    """The layer between a projection of [norm(embedding); norm(features)] and a norm. `digest` names its weights."""

    def __init__(self, parts: Parts, config: MtpConfig) -> None:
        layer, hidden = config.layer, parts.hidden
        self._kernels, self._eps = parts.kernels, parts.eps
        self._token_norm = parts.norm(f"{PREFIX}token_layernorm")
        self._hidden_norm = parts.norm(f"{PREFIX}hidden_layernorm")
        weight = parts.reader.take(f"{PREFIX}input_proj.weight", (hidden, 2 * hidden))
        self._project = Linear(weight, None, parts.kernels)
        self._input_norm = parts.norm(f"{PREFIX}input_layernorm")
        self.attention = Attention.load(parts, layer.attention, f"{PREFIX}self_attn.")
        self._post_attention_norm = parts.norm(f"{PREFIX}post_attention_layernorm")
        assert isinstance(layer.mlp, MlpConfig)
        self._mlp = Mlp(parts, layer.mlp, f"{PREFIX}mlp.")
        self._final_norm = parts.norm(f"{PREFIX}final_layernorm")
        self._rows = ContextAttention(parts, [layer.attention], [f"{PREFIX}self_attn."])
        digest = hashlib.sha256()
        for tensor in (self._token_norm, self._hidden_norm, weight, self._input_norm, *self._rows.tensors):
            digest.update(tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes())
        self._rows.tensors.clear()
        self.digest = digest.hexdigest()

    def inputs(self, embedded: Tensor, before: Tensor) -> Tensor:
        """The residual [N, D] that the layer begins with."""
        kernels, eps = self._kernels, self._eps
        tokens, features = (
            kernels.rms_norm(embedded, self._token_norm, eps),
            kernels.rms_norm(before, self._hidden_norm, eps),
        )
        return self._project(torch.cat([tokens, features], dim=1))

    def write(self, residual: Tensor, batch: Batch, cache: LayerCache) -> None:
        """Write keys and values of pairs, from what the layer begins with [N, D]."""
        self._rows.write(self._kernels.rms_norm(residual, self._input_norm, self._eps), batch, [cache])

    def forward(self, residual: Tensor, batch: Batch, cache: LayerCache) -> Tensor:
        """The normed output [N, D]; `residual` [N, D] is overwritten."""
        kernels, eps = self._kernels, self._eps
        attended = self.attention.forward(kernels.rms_norm(residual, self._input_norm, eps), batch, cache)
        x = kernels.add_rms_norm(attended, residual, self._post_attention_norm, eps)
        return kernels.add_rms_norm(self._mlp.forward(x), residual, self._final_norm, eps)
