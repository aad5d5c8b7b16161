"""Configs of DSpark and DFlash checkpoints as their makers write them: DeepSpec, speculators, z-lab.

They differ in names, in what a tap's number counts, and in the slots that predict: in DSpark the anchor's predicts the
first draft token, in DFlash the first mask's does (docs/drafters.md).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark_server.errors import CheckpointError
from dspark_server.models.config import ModelConfig
from dspark_server.models.fields import architecture, flag, integer, number, read_json, refuse
from dspark_server.models.layers.conv import ConvConfig
from dspark_server.models.qwen3 import parse as parse_qwen3
from dspark_server.models.registry import DRAFT_LAYERS
from dspark_server.speculation.eagle3_formats import draft_vocabulary, layer_config
from dspark_server.speculation.pair import HARMLESS, Noted, check_known, check_widths, format_name, target_layers, whole

# Fields of a format-A config that say nothing about the computation, or are read where they count.
_HARMLESS = HARMLESS | {
    *("num_anchors", "markov_head_type", "confidence_head_with_markov", "target_digest"),
    *("num_global_key_value_heads", "global_head_dim", "per_layer_config"),
}


@dataclass(frozen=True)
class DSparkConfig:
    """The backbone's decoder fields, and the drafter's own.

    A block's pass has `block_size` tokens. With `from_anchor` each of them predicts the token after it, else each but
    the anchor its own. `causal`: by layer, whether its attention sees no later token of the block. `copies`: whether
    embedding and head are in the checkpoint (None: each may be).
    """

    architecture: str  # whose layers these are, in the registry
    decoder: ModelConfig
    block_size: int
    mask_token_id: int
    taps: tuple[int, ...]
    markov_rank: int
    markov_head_type: str
    confidence: bool
    confidence_with_markov: bool
    copies: bool | None
    target_digest: str | None = None  # ours: `head_digest` of the target it was trained for
    draft_vocab_size: int | None = None  # draftable tokens, named by d2t, one row of W2 each; None: all
    from_anchor: bool = True
    causal: tuple[bool, ...] = ()
    conv: ConvConfig | None = None  # DFlash2: convolutions in its layers
    selector: tuple[int, int] | None = None  # DFlash2: rank and number of candidates
    embedding_scale: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "causal", self.causal or (False,) * self.decoder.num_layers)

    @property
    def gamma(self) -> int:
        """Draft tokens of a block."""
        return self.block_size - (not self.from_anchor)

    @classmethod
    def load(cls, directory: Path, target: ModelConfig) -> "DSparkConfig":
        """Read and check config.json against the target it was trained for; CheckpointError if they do not fit."""
        return cls.parse(read_json(directory / "config.json"), target)

    @classmethod
    def parse(cls, fields: Mapping[str, Any], target: ModelConfig) -> "DSparkConfig":
        """The same from the file's fields, of any format."""
        read = READERS.get(format_name(fields))
        if read is None:
            raise CheckpointError(f"{format_name(fields)!r} is no DSpark or DFlash drafter; {', '.join(READERS)} are.")
        config = read(fields, target)
        config._check(target)
        return config

    def _check(self, target: ModelConfig) -> None:
        if self.confidence_with_markov and self.confidence and self.markov_rank == 0:
            raise CheckpointError("confidence_head_with_markov needs a Markov head, but markov_rank is 0.")
        if self.draft_vocab_size is not None and self.draft_vocab_size > self.decoder.vocab_size:
            raise CheckpointError(f"draft_vocab_size {self.draft_vocab_size} exceeds vocab_size.")
        if self.mask_token_id >= self.decoder.vocab_size:
            raise CheckpointError(f"mask_token_id {self.mask_token_id} is outside the embedding.")
        if self.gamma < 1:
            raise CheckpointError(f"block_size {self.block_size} leaves no slot that predicts.")
        check_widths(self.decoder, target, ("vocab_size", "hidden_size"))


def _deepspec(given: Mapping[str, Any], target: ModelConfig) -> DSparkConfig:
    fields = Noted(given)
    rank, decoder = whole(fields, "markov_rank", minimum=0), DRAFT_LAYERS[architecture(fields)].parse(fields, {})
    config = DSparkConfig(
        architecture=architecture(fields),
        decoder=decoder,
        embedding_scale=decoder.embedding_scale,
        softcap=decoder.softcap,
        block_size=whole(fields, "block_size", minimum=1),
        mask_token_id=whole(fields, "mask_token_id", minimum=0),
        taps=target_layers(fields, target.num_layers),
        markov_rank=rank,
        markov_head_type=str(fields.get("markov_head_type", "vanilla")).lower() if rank else "none",
        confidence=flag(fields, "enable_confidence_head"),
        confidence_with_markov=flag(fields, "confidence_head_with_markov"),
        copies=not flag(fields, "share_target_embeddings"),
        target_digest=fields.get("target_digest"),
        draft_vocab_size=whole(fields, "draft_vocab_size", minimum=1) if "draft_vocab_size" in fields else None,
    )
    check_known(given, fields.read, _HARMLESS)
    return config


def _speculators(given: Mapping[str, Any], target: ModelConfig) -> DSparkConfig:
    """`dspark` and `dflash`; ids of taps are entries of hidden_states, so the outputs of the layers before."""
    fields = Noted(given)
    is_dspark = fields["speculators_model_type"] == "dspark"
    refuse(fields, "projector_type", ("dflash",))
    refuse(fields, "shift_label", (False,))
    decoder = layer_config(fields)
    if any(layer.attention.window is not None for layer in decoder.layers):
        raise CheckpointError("Speculators' drafters with sliding_attention layers are not supported.")
    integer(fields, "target_hidden_size", target.hidden_size)
    ids = target_layers({"target_layer_ids": _before(fields.get("aux_hidden_state_layer_ids"))}, target.num_layers)
    rank = whole(fields, "markov_rank", minimum=0) if is_dspark else 0
    config = DSparkConfig(
        architecture="Qwen3DSparkModel",
        decoder=decoder,
        block_size=whole(fields, "block_size", minimum=1),
        mask_token_id=whole(fields, "mask_token_id", minimum=0),
        taps=ids,
        markov_rank=rank,
        markov_head_type=str(fields.get("markov_head_type", "vanilla")).lower() if rank else "none",
        confidence=is_dspark and flag(fields, "enable_confidence_head"),
        confidence_with_markov=is_dspark and flag(fields, "confidence_head_with_markov"),
        copies=None,
        draft_vocab_size=draft_vocabulary(fields, decoder),
        from_anchor=flag(fields, "sample_from_anchor", is_dspark),
    )
    check_known(given, fields.read, _HARMLESS | _SPECULATORS_HARMLESS)
    return config


def _zlab(given: Mapping[str, Any], target: ModelConfig) -> DSparkConfig:
    """DFlash and DFlash2: `dflash_config` has its own fields, some of which older configs have outside.

    Ours are `draft_vocab_size` and `target_digest`, as in DeepSpec's format.
    """
    fields = Noted(given)
    own = fields.get("dflash_config") or {}
    if not isinstance(own, Mapping):
        raise CheckpointError(f"The drafter's dflash_config should be an object, not {own!r}.")
    noted = Noted(own)
    second = architecture(fields) == "DFlash2DraftModel"
    refuse(noted, "projector_type", ("dflash", "dflash2") if second else ("dflash",))
    refuse(noted, "shift_label", (False,))
    refuse(noted, "use_swa", (False,), ": name the layers with a window in layer_types")
    noted.get("swa_window_size")
    refuse(noted, "attention_mode", ("gqa", "mha"))

    def own_or_outer(name: str, minimum: int) -> int:
        return whole(noted if name in noted else fields, name, minimum=minimum)

    decoder = parse_qwen3(fields, {})
    sliding = [layer.attention.window is not None for layer in decoder.layers]
    # Outside as z-lab writes it, inside as NVIDIA's ModelOpt does.
    stated = [
        flag(each, name) for each, name in ((fields, "is_causal"), (noted, "causal")) if each.get(name) is not None
    ]
    causal = [any(stated)] * len(sliding) if stated else sliding
    ids = noted.get("target_layer_ids", _spread(target.num_layers, decoder.num_layers))
    width = own_or_outer("block_size", 2)
    conv = selector = None
    if second:
        conv = ConvConfig(own_or_outer("conv_kernel_size", 1), own_or_outer("conv_group_size", 1), width)
        selector = own_or_outer("selector_rank", 1), own_or_outer("selector_top_k", 1)
    capped = noted.get("final_logit_softcapping")
    layers = {"target_layer_ids": ids, "num_target_layers": fields.get("num_target_layers", target.num_layers)}
    config = DSparkConfig(
        architecture="Qwen3DSparkModel",
        decoder=decoder,
        block_size=width,
        mask_token_id=own_or_outer("mask_token_id", 0),
        taps=target_layers(layers, target.num_layers),
        conv=conv,
        selector=selector,
        embedding_scale=number(noted, "input_embedding_scale", 1.0),
        softcap=number(noted, "final_logit_softcapping") if capped else None,
        logit_scale=number(noted, "output_multiplier", 1.0),
        markov_rank=0,
        markov_head_type="none",
        confidence=False,
        confidence_with_markov=False,
        copies=False,
        target_digest=fields.get("target_digest"),
        draft_vocab_size=draft_vocabulary(fields, decoder),
        from_anchor=False,
        causal=tuple(causal),
    )
    check_known(own, noted.read, ())
    check_known(given, fields.read, _HARMLESS)
    return config


def _before(ids: Any) -> Any:
    """Layers whose outputs are these entries of hidden_states."""
    whole_numbers = isinstance(ids, list) and all(isinstance(each, int) for each in ids)
    return [each - 1 for each in ids] if whole_numbers else ids


def _spread(target: int, own: int) -> list[int]:
    """z-lab's taps where a config names none: from the second layer to the fourth last, evenly."""
    if own == 1:
        return [target // 2]
    return [round(1 + index * (target - 4) / (own - 1)) for index in range(own)]


READERS: dict[str, Callable[[Mapping[str, Any], ModelConfig], DSparkConfig]] = {
    **dict.fromkeys(DRAFT_LAYERS, _deepspec),
    "dspark": _speculators,
    "dflash": _speculators,
    "DFlashDraftModel": _zlab,
    "DFlash2DraftModel": _zlab,
}
_SPECULATORS_HARMLESS = frozenset(
    {
        *("has_no_defaults_at_init", "speculators_config", "speculators_version", "sliding_window_non_causal"),
        *("ce_loss_alpha", "l1_loss_alpha", "confidence_head_alpha", "loss_decay_gamma", "auf"),
        *("pure_draft_prefix_len", "emb_dim", "gru_hidden_dim", "lambda_base_start", "lambda_base_decay_ratio"),
        *("markov_rank", "enable_confidence_head", "projector_type", "shift_label"),
    }
)
