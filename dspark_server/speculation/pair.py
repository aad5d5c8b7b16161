"""A drafter's checkpoint beside its target: which layers it reads, what the two share, whether they are a pair.

Shapes: V vocabulary, Vd tokens that may be drafted, D hidden size.
"""

import hashlib
import logging
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from dspark_kernels import Kernels
from torch import Tensor

from dspark_server.errors import CheckpointError
from dspark_server.models.config import ModelConfig
from dspark_server.models.decoder import Decoder
from dspark_server.models.fields import architecture
from dspark_server.models.layers.embedding import Embedding, Head
from dspark_server.models.loading import WeightReader, open_checkpoint
from dspark_server.runtime.linear import Linear

logger = logging.getLogger(__name__)

DIGESTED = 256  # rows of a matrix in `head_digest`


# Fields of a drafter's config that say nothing about its computation, or repeat what its architecture implies.
HARMLESS = frozenset(
    {
        *("_name_or_path", "architectures", "attention_dropout", "auto_map", "dtype", "torch_dtype", "model_type"),
        *("initializer_range", "pad_token_id", "target_model_type", "target_text_model_type", "use_cache"),
        *("transformers_version", "tie_word_embeddings", "head_dim"),
        *("layer_types", "max_window_layers", "sliding_window", "use_sliding_window"),  # read where they count
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


def check_known(given: Collection[str], read: Collection[str], harmless: Collection[str]) -> None:
    """Raise CheckpointError for a field that nobody reads: it may say how slots are counted, or what they see."""
    if unknown := sorted(set(given) - set(read) - set(harmless)):
        raise CheckpointError(
            f"The drafter's config.json has {', '.join(unknown)}, which this server does not know: it could change "
            "what the drafter computes. If it does not, remove it."
        )


def format_name(fields: Mapping[str, Any]) -> str:
    """The name of a config's format: `speculators_model_type`, or else the architecture; "" if neither says it."""
    return str(fields.get("speculators_model_type") or architecture(fields))


def whole(fields: Mapping[str, Any], name: str, *, minimum: int) -> int:
    value = fields.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise CheckpointError(f"The drafter's config.json needs {name} as a whole number >= {minimum}, not {value!r}.")
    return value


def target_layers(fields: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """target_layer_ids: strictly increasing, -1 for the embeddings, never the last layer."""
    ids = fields.get("target_layer_ids")
    if not isinstance(ids, list) or not ids or not all(isinstance(i, int) for i in ids):
        raise CheckpointError(f"The drafter's config.json needs target_layer_ids as a list of layers, not {ids!r}.")
    if fields.get("num_target_layers", layers) != layers:
        raise CheckpointError(
            f"The drafter was trained for a target of {fields['num_target_layers']} layers; this one has {layers}."
        )
    # HF's hidden state after the last layer is already normed, so that id would not mean the layer's output.
    if any(i < -1 or i >= layers - 1 for i in ids) or sorted(set(ids)) != ids:
        raise CheckpointError(
            f"target_layer_ids {ids} must increase and lie within -1 .. {layers - 2} for this target."
        )
    return tuple(ids)


def check_widths(drafter: ModelConfig, target: ModelConfig, names: Collection[str]) -> None:
    """Raise CheckpointError if drafter and target differ in one of these fields."""
    for name in names:
        mine, its = getattr(drafter, name), getattr(target, name)
        if mine != its:
            raise CheckpointError(f"The drafter's {name} is {mine}, the target's {its}: not a pair.")


def read_draft_tokens(reader: WeightReader, size: int | None, vocabulary: int) -> Tensor | None:
    """Ids [Vd] of the tokens that may be drafted, `size` of them; None: all.

    d2t [Vd] holds each one's distance from its own index; t2d [V] bool, which some checkpoints have too, must agree.
    """
    if size is None:
        return None
    offsets = reader.integers("d2t", (size,))
    tokens = offsets + torch.arange(size, device=offsets.device)
    if bool((tokens.diff() <= 0).any()) or int(tokens[0]) < 0 or int(tokens[-1]) >= vocabulary:
        raise CheckpointError("The drafter's d2t must name distinct tokens of the vocabulary in rising order.")
    if "t2d" in reader and not torch.equal(reader.integers("t2d", (vocabulary,)).nonzero().squeeze(1), tokens):
        raise CheckpointError("The drafter's t2d and d2t name different tokens: download or export it again.")
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


def warn_of_mismatch(digest: str | None, longest: int, target: Decoder, directory: Path) -> None:
    """Log what suggests that a drafter was trained for something else than what is served.

    `digest` is `head_digest` of its target if its config has one, `longest` its last position in tokens.
    """
    if digest is not None and digest != head_digest(directory):
        logger.warning(
            "the drafter was trained for other weights than this target's (their digests differ): its drafts may be "
            "accepted less often; the output is the target's all the same"
        )
    if longest < target.max_model_len:
        logger.warning(
            "the drafter's positions end at %d, and sequences of up to %d tokens are served: beyond its end, drafts "
            "will hardly be accepted (dspark:context_accepted_total shows it)",
            longest,
            target.max_model_len,
        )


def embeddings(
    reader: WeightReader,
    draft_tokens: Tensor | None,
    scale: float,
    softcap: float | None,
    target: Decoder,
    target_directory: Path,
    kernels: Kernels,
    *,
    copies: bool | None = None,
    width: int | None = None,
    logit_scale: float = 1.0,
) -> tuple[Embedding, Head]:
    """The drafter's embedding and head: the target's own where the checkpoint has none, or copies of them.

    Of `draft_tokens` [Vd], where they are not all, a head of the checkpoint has the rows, unless it has V. `copies`:
    whether the checkpoint must have both tensors (None: it may have each). `width` is the drafter's D where it may
    differ from the target's.

    Where ranks share the target, only rank 0 drafts, and its head is whole: gathering gamma rows of logits for each
    request from the others would take as long as computing them (docs/parallel.md).
    """
    vocabulary, width = target.config.vocab_size, width or target.config.hidden_size
    same = width == target.config.hidden_size

    def has(name: str) -> bool:
        return not same or (name in reader if copies is None else copies)

    weight = head = target.embed.weight
    if not target.config.tie_word_embeddings:
        head = open_checkpoint(target_directory).read("lm_head.weight").to(weight.device).to(reader.dtype)
    own = target.group.size > 1
    if has("embed_tokens.weight"):
        theirs = reader.take("embed_tokens.weight", (vocabulary, width))
        if not same or not torch.equal(theirs, weight):
            weight = theirs
    rows = vocabulary if draft_tokens is None else len(draft_tokens)
    if has("lm_head.weight"):
        cut = draft_tokens is not None and reader.shape("lm_head.weight") != (vocabulary, width)
        theirs = reader.take("lm_head.weight", (rows if cut else vocabulary, width))
        if cut:
            return Embedding(weight, scale), Head(Linear(theirs, None, kernels), softcap, logit_scale)
        if not same or not torch.equal(theirs, head):
            own, head = True, theirs
    if draft_tokens is not None:
        own, head = True, head[draft_tokens]
    linear = Linear(head, None, kernels) if own else target.head.linear
    return Embedding(weight, scale), Head(linear, softcap, logit_scale)
