"""The DSpark drafter: a parallel backbone over the target's features (DSpark §3.1); `sequential` holds its other half.

DFlash is the same with Markov rank 0 and no confidence head. Checkpoints are DeepSpec's format A (DSPARK.md). Shapes: R
drafting requests, gamma = block_size, D hidden size, V vocabulary, N tokens of a target pass, m taps.
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from dspark_kernels import Kernels
from torch import Tensor

from dspark_server.errors import CheckpointError
from dspark_server.models.config import ModelConfig
from dspark_server.models.decoder import Decoder
from dspark_server.models.family import Layer
from dspark_server.models.fields import architecture, flag, read_json
from dspark_server.models.layers.attention import ContextAttention
from dspark_server.models.layers.embedding import Embedding, Head
from dspark_server.models.layers.parts import Parts
from dspark_server.models.loading import WeightReader, open_checkpoint
from dspark_server.models.registry import DRAFT_LAYERS
from dspark_server.runtime.batch import Batch, Run
from dspark_server.runtime.kv import KVPool, LayerCache
from dspark_server.runtime.linear import Linear
from dspark_server.runtime.paging import CacheRows
from dspark_server.speculation.calibration import Calibration
from dspark_server.speculation.copying import CopyBias, CopyTables
from dspark_server.speculation.draft_block import DraftBlock, DraftRequest
from dspark_server.speculation.heads import ConfidenceHead, build_head
from dspark_server.speculation.noise import Streams
from dspark_server.speculation.sampling import SamplingBatch
from dspark_server.speculation.sequential import BlockSampler

logger = logging.getLogger(__name__)

DIGESTED = 256  # rows of a matrix in `head_digest`

# Fields of a drafter's config that say nothing about its computation, or repeat what its architecture implies.
HARMLESS = frozenset(
    {
        *(
            "_name_or_path",
            "architectures",
            "attention_dropout",
            "auto_map",
            "dtype",
            "initializer_range",
            "model_type",
        ),
        *("num_anchors", "pad_token_id", "target_model_type", "target_text_model_type", "torch_dtype"),
        *("transformers_version", "use_cache"),
        *("layer_types", "max_window_layers", "sliding_window", "use_sliding_window"),  # read where they count
        *("head_dim", "num_global_key_value_heads", "global_head_dim", "per_layer_config"),
        *("markov_head_type", "confidence_head_with_markov", "tie_word_embeddings", "target_digest"),
    }
)


class Noted(Mapping[str, Any]):
    """Fields of a config that remember which of them were `read`."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = fields
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return self._fields[name]

    def __contains__(self, name: object) -> bool:
        self.read.add(str(name))
        return name in self._fields

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)


@dataclass(frozen=True)
class DSparkConfig:
    """A format-A config: the backbone's decoder fields, and the drafter's own."""

    architecture: str
    decoder: ModelConfig
    block_size: int
    mask_token_id: int
    taps: tuple[int, ...]
    markov_rank: int
    markov_head_type: str
    confidence: bool
    confidence_with_markov: bool
    share_target_embeddings: bool  # ours: the checkpoint leaves embedding and head out
    target_digest: str | None  # ours: `head_digest` of the target it was trained for
    # Ours, as in speculators' format: number of draftable tokens, named by d2t, one row of W2 each; None: all.
    draft_vocab_size: int | None

    @classmethod
    def load(cls, directory: Path, target: ModelConfig) -> "DSparkConfig":
        """Read and check config.json against the target it was trained for; CheckpointError if they do not fit."""
        return cls.parse(read_json(directory / "config.json"), target)

    @classmethod
    def parse(cls, fields: Mapping[str, Any], target: ModelConfig) -> "DSparkConfig":
        """The same from the file's fields."""
        given, fields = fields, Noted(fields)
        family = DRAFT_LAYERS.get(architecture(fields))
        if family is None:
            raise CheckpointError(
                f"architectures {fields.get('architectures')} is not a drafter this server runs; "
                f"{', '.join(DRAFT_LAYERS)} are."
            )
        decoder = family.parse(fields, {})
        rank = _whole(fields, "markov_rank", minimum=0)
        config = cls(
            architecture=architecture(fields),
            decoder=decoder,
            block_size=_whole(fields, "block_size", minimum=1),
            mask_token_id=_whole(fields, "mask_token_id", minimum=0),
            taps=_taps(fields, target.num_layers),
            markov_rank=rank,
            markov_head_type=str(fields.get("markov_head_type", "vanilla")).lower() if rank else "none",
            confidence=flag(fields, "enable_confidence_head"),
            confidence_with_markov=flag(fields, "confidence_head_with_markov"),
            share_target_embeddings=flag(fields, "share_target_embeddings"),
            target_digest=fields.get("target_digest"),
            draft_vocab_size=_whole(fields, "draft_vocab_size", minimum=1) if "draft_vocab_size" in fields else None,
        )
        config._check(target)
        # A field that nobody reads may say how slots are counted, or what they see.
        if unknown := sorted(set(given) - fields.read - HARMLESS):
            raise CheckpointError(
                f"The drafter's config.json has {', '.join(unknown)}, which this server does not know: it could change "
                "what the drafter computes. If it does not, remove it."
            )
        return config

    def _check(self, target: ModelConfig) -> None:
        if self.confidence_with_markov and self.confidence and self.markov_rank == 0:
            raise CheckpointError("confidence_head_with_markov needs a Markov head, but markov_rank is 0.")
        if self.draft_vocab_size is not None and self.draft_vocab_size > self.decoder.vocab_size:
            raise CheckpointError(f"draft_vocab_size {self.draft_vocab_size} exceeds vocab_size.")
        if self.mask_token_id >= self.decoder.vocab_size:
            raise CheckpointError(f"mask_token_id {self.mask_token_id} is outside the embedding.")
        for name in ("vocab_size", "hidden_size"):
            mine, its = getattr(self.decoder, name), getattr(target, name)
            if mine != its:
                raise CheckpointError(f"The drafter's {name} is {mine}, the target's {its}: not a pair.")


def _whole(fields: Mapping[str, Any], name: str, *, minimum: int) -> int:
    value = fields.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise CheckpointError(f"The drafter's config.json needs {name} as a whole number >= {minimum}, not {value!r}.")
    return value


def _taps(fields: Mapping[str, Any], target_layers: int) -> tuple[int, ...]:
    """target_layer_ids: strictly increasing, -1 for the embeddings, never the last layer."""
    ids = fields.get("target_layer_ids")
    if not isinstance(ids, list) or not ids or not all(isinstance(i, int) for i in ids):
        raise CheckpointError(f"The drafter's config.json needs target_layer_ids as a list of layers, not {ids!r}.")
    if fields.get("num_target_layers", target_layers) != target_layers:
        raise CheckpointError(
            f"The drafter was trained for a target of {fields['num_target_layers']} layers; "
            f"this one has {target_layers}."
        )
    # HF's hidden state after the last layer is already normed, so that id would not mean the layer's output.
    if any(i < -1 or i >= target_layers - 1 for i in ids) or sorted(set(ids)) != ids:
        raise CheckpointError(
            f"target_layer_ids {ids} must increase and lie within -1 .. {target_layers - 2} for this target."
        )
    return tuple(ids)


class DSparkDrafter:
    """Drafts blocks of gamma tokens. Its context K/V are owner 1 of the pool, written by `observe`."""

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
        self.config = config
        self.gamma = self.block = config.block_size
        self.taps = config.taps
        self.identity = context.digest
        self.sampler = sampler
        self.copying = copying
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
        return [layer.attention.config.caches(self._max_model_len) for layer in self._layers]

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
        """Load a format-A checkpoint for `target`; embeddings equal to the target's are shared with it.

        `shortlist` is K, the number of tokens of each position's base logits that the sequential head looks at; None:
        all. `copying`: drafts may be biased to tokens that followed the same tokens earlier in the sequence.

        Raises CheckpointError if a tensor is missing, unexpected or misshapen, or the pair does not fit.
        """
        config = DSparkConfig.load(directory, target.config)
        decoder, length = config.decoder, target.max_model_len
        reader = WeightReader(open_checkpoint(directory), dtype, target.embed.weight.device)
        hidden = decoder.hidden_size
        parts = Parts(reader, kernels, hidden, decoder.rms_norm_eps, length, length + config.block_size)
        _warn_of_mismatch(config, target, target_directory)
        draft_tokens = read_draft_tokens(reader, config)
        embed, lm_head = _embeddings(reader, config, draft_tokens, target, target_directory, dtype, kernels)
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
        family = DRAFT_LAYERS[config.architecture]
        layers = [family.layer(parts, layer, f"layers.{i}.") for i, layer in enumerate(decoder.layers)]
        context, final_norm = ContextFeatures(parts, config), parts.norm("norm")
        reader.finish(decoder.ropes)
        calibration = Calibration.load(directory, config.block_size)
        vocabulary = decoder.vocab_size
        return cls(
            config,
            layers,
            context,
            BlockSampler(
                config.block_size, vocabulary, head, confidence, calibration, draft_tokens, kernels, shortlist
            ),
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

    def propose(
        self, requests: Sequence[DraftRequest], sampling: SamplingBatch, streams: Streams, pool: KVPool
    ) -> DraftBlock:
        """Backbone over [anchor, mask, ...] with attention over block and context, then the sequential head."""
        mask = [self.config.mask_token_id] * (self.gamma - 1)
        runs = [Run([r.anchor, *mask], r.position, r.tables, self.gamma) for r in requests]
        hidden, base = self.backbone(Batch.of(runs, pool.groups), pool)
        anchors = torch.tensor([r.anchor for r in requests])
        block = self.sampler.sample(hidden, base, anchors, sampling, streams, self.copies(requests, sampling))
        return replace(block, requests=requests)

    def copies(self, requests: Sequence[DraftRequest], sampling: SamplingBatch) -> CopyBias | None:
        """Copies from the requests' own texts that bias the draft; None: none."""
        if self.copying is None or all(request.match is None for request in requests):
            return None
        return CopyBias([r.match for r in requests], self.gamma, sampling.temperature, self.copying)

    def backbone(self, batch: Batch, pool: KVPool) -> tuple[Tensor, Tensor]:
        """h_k of every slot after the final norm [R, gamma, D], and its base logits [R, gamma, C] float32.

        `batch` holds R runs of gamma tokens: the anchor, then mask tokens.
        """
        residual = self._embed(batch.tokens)
        delta: Tensor | None = None
        for layer, cache in zip(self._layers, pool.layers(1), strict=True):
            delta = layer.forward(delta, residual, batch, cache, causal=False)
        eps = self.config.decoder.rms_norm_eps
        if delta is None:
            hidden = self._kernels.rms_norm(residual, self._final_norm, eps)
        else:
            hidden = self._kernels.add_rms_norm(delta, residual, self._final_norm, eps)
        base = self._head(hidden)
        return hidden.unflatten(0, (-1, self.gamma)), base.unflatten(0, (-1, self.gamma))


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


def read_draft_tokens(reader: WeightReader, config: DSparkConfig) -> Tensor | None:
    """Ids [Vd] of the tokens that may be drafted: d2t holds each one's distance from its own index; None: all."""
    if config.draft_vocab_size is None:
        return None
    offsets = reader.integers("d2t", (config.draft_vocab_size,))
    tokens = offsets + torch.arange(config.draft_vocab_size, device=offsets.device)
    if bool((tokens.diff() <= 0).any()) or int(tokens[0]) < 0 or int(tokens[-1]) >= config.decoder.vocab_size:
        raise CheckpointError("The drafter's d2t must name distinct tokens of the vocabulary in rising order.")
    return tokens


def head_digest(directory: Path) -> str:
    """Digest of a target's embedding and head, of some rows each: enough to tell one training from another."""
    checkpoint, digest = open_checkpoint(directory), hashlib.sha256()
    names = [name for name in checkpoint.tensors if name.endswith(("embed_tokens.weight", "lm_head.weight"))]
    for name in sorted(names):
        tensor = checkpoint.read(name)
        rows = tensor[:: max(1, len(tensor) // DIGESTED)].bfloat16().contiguous()
        digest.update(rows.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _warn_of_mismatch(config: DSparkConfig, target: Decoder, directory: Path) -> None:
    """Log what suggests that a drafter was trained for something else than what is served."""
    if config.target_digest is not None and config.target_digest != head_digest(directory):
        logger.warning(
            "the drafter was trained for other weights than this target's (their digests differ): its drafts may be "
            "accepted less often; the output is the target's all the same"
        )
    longest = config.decoder.max_length
    if longest < target.max_model_len:
        logger.warning(
            "the drafter's positions end at %d, and sequences of up to %d tokens are served: beyond its end, drafts "
            "will hardly be accepted (dspark:context_accepted_total shows it)",
            longest,
            target.max_model_len,
        )


def _embeddings(
    reader: WeightReader,
    config: DSparkConfig,
    draft_tokens: Tensor | None,
    target: Decoder,
    target_directory: Path,
    dtype: torch.dtype,
    kernels: Kernels,
) -> tuple[Embedding, Head]:
    """The drafter's embedding and head: the target's own where the checkpoint has none or its copies are equal.

    Where ranks share the target, only rank 0 drafts, and its head is whole: gathering gamma rows of logits for each
    request from the others would take as long as computing them (docs/parallel.md).
    """
    shape = (target.config.vocab_size, target.config.hidden_size)
    weight = head = target.embed.weight
    if not target.config.tie_word_embeddings:
        head = open_checkpoint(target_directory).read("lm_head.weight").to(weight.device).to(dtype)
    own = target.group.size > 1
    if not config.share_target_embeddings:
        theirs, their_head = reader.take("embed_tokens.weight", shape), reader.take("lm_head.weight", shape)
        if not torch.equal(theirs, weight):
            weight = theirs
        if not torch.equal(their_head, head):
            own, head = True, their_head
    if draft_tokens is not None:
        own, head = True, head[draft_tokens]
    linear = Linear(head, None, kernels) if own else target.head.linear
    return Embedding(weight, config.decoder.embedding_scale), Head(linear, config.decoder.softcap)
