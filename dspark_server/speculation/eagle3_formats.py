"""Configs of Eagle3 checkpoints as their makers write them: DeepSpec, SafeAILab and SpecForge, speculators, NVIDIA.

They differ in names, in the number of taps, and in what a tap's number counts: a layer, whose output is meant, or an
entry of transformers' `hidden_states`, which is the output of the layer before (docs/drafters.md).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from dspark_server.errors import CheckpointError
from dspark_server.models.config import LayerConfig, ModelConfig
from dspark_server.models.fields import Fields, flag, integer, read_json, refuse
from dspark_server.models.gemma4 import parse_drafter as parse_gemma4
from dspark_server.models.llama import parse as parse_llama
from dspark_server.models.qwen3 import parse as parse_qwen3
from dspark_server.speculation.pair import HARMLESS, Noted, check_known, check_widths, format_name, target_layers, whole

TRAINED_DEPTH = 7  # draft tokens where a config does not say how many: SafeAILab and SpecForge train so many steps

Parse = Callable[[Fields, Fields], ModelConfig]


@dataclass(frozen=True)
class Format:
    """Whose checkpoints these are, and what they have in common.

    `layers` are prefixes that the layer's tensors may have; `sandwich`: norms on both sides, as in Gemma4; `copies`:
    whether embedding and head are there (None: each may be). `counts_outputs`: a tap's number is that of a layer; its
    output is meant. None: the first number tells (`_taps`).
    """

    name: str
    layers: tuple[str, ...]
    counts_outputs: bool | None
    sandwich: bool = False
    copies: bool | None = None


DEEPSPEC = Format("DeepSpec", ("layers.0.",), True, copies=True)
DEEPSPEC_GEMMA4 = replace(DEEPSPEC, sandwich=True)
SAFEAILAB = Format("SafeAILab", ("midlayer.", "layers.0."), None)  # the second is ModelOpt's
SPECULATORS = Format("speculators", ("layers.0.",), False)


@dataclass(frozen=True)
class Eagle3Config:
    """An Eagle3 drafter: its layer as a decoder of one, and its own fields.

    `taps` are target layers whose outputs are its features, of `target_hidden_size` channels each (None: the target's
    own). `depth`: draft tokens of a block. `draft_vocab_size`: tokens that may be drafted, None: all. `target_digest`:
    `head_digest` of its target, where we trained it.
    """

    format: Format
    decoder: ModelConfig
    taps: tuple[int, ...]
    depth: int
    target_hidden_size: int | None = None
    draft_vocab_size: int | None = None
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    target_digest: str | None = None

    @property
    def layer(self) -> LayerConfig:
        """The layer; its attention projects what is twice as wide, and place 0 has no pair."""
        layer = self.decoder.layers[0]
        return replace(layer, attention=replace(layer.attention, inputs=2 * self.decoder.hidden_size, first_key=1))

    @classmethod
    def load(
        cls, directory: Path, target: ModelConfig, depth: int | None = None, tap_convention: str = "auto"
    ) -> "Eagle3Config":
        """Read config.json, of any format, and check it against the target.

        Raises CheckpointError if they do not fit.
        """
        return cls.parse(read_json(directory / "config.json"), target, depth, tap_convention)

    @classmethod
    def parse(
        cls, fields: Mapping[str, Any], target: ModelConfig, depth: int | None = None, tap_convention: str = "auto"
    ) -> "Eagle3Config":
        """The same from the file's fields."""
        read = READERS.get(format_name(fields))
        if read is None:
            raise CheckpointError(f"{format_name(fields)!r} is no Eagle3 drafter; {', '.join(READERS)} are.")
        config = read(fields, target, tap_convention)
        if depth is not None:
            config = replace(config, depth=depth)
        config._check(target)
        return config

    def _check(self, target: ModelConfig) -> None:
        if self.decoder.num_layers != 1:
            raise CheckpointError(f"Eagle3 drafters of {self.decoder.num_layers} layers are not supported, only of 1.")
        if self.layer.attention.window is not None:
            raise CheckpointError("An Eagle3 drafter's layer must see the whole context, not a sliding_window.")
        check_widths(self.decoder, target, ("vocab_size",))
        if self.target_hidden_size not in (None, target.hidden_size):
            raise CheckpointError(
                f"The drafter's target_hidden_size is {self.target_hidden_size}, the target's hidden_size "
                f"{target.hidden_size}: not a pair."
            )
        if not self.taps or any(not -1 <= tap < target.num_layers for tap in self.taps):
            raise CheckpointError(
                f"The drafter's taps are the outputs of layers {list(self.taps)}, but this target has "
                f"{target.num_layers}: not a pair, or another tap_convention."
            )
        if self.draft_vocab_size is not None and self.draft_vocab_size > self.decoder.vocab_size:
            raise CheckpointError(f"draft_vocab_size {self.draft_vocab_size} exceeds vocab_size.")


def _deepspec(format: Format, parse: Parse) -> "Reader":
    def read(fields: Mapping[str, Any], target: ModelConfig, tap_convention: str) -> Eagle3Config:
        noted = Noted(fields)
        config = Eagle3Config(
            format, parse(noted, {}), target_layers(noted, target.num_layers), whole(noted, "ttt_length", minimum=1)
        )
        check_widths(config.decoder, target, ("hidden_size",))
        if whole(noted, "draft_num_hidden_layers", minimum=1) != 1 or len(config.taps) != 5 or -1 in config.taps:
            raise CheckpointError("DeepSpec's Eagle3 has one layer and five target_layer_ids from 0 on.")
        check_known(fields, noted.read, HARMLESS | {"step_loss_decay", "target_model_name_or_path"})
        return config

    return read


def _safeailab(fields: Mapping[str, Any], target: ModelConfig, tap_convention: str) -> Eagle3Config:
    noted = Noted(fields)
    given = noted.get("eagle_config")
    if given is not None and not isinstance(given, Mapping):
        raise CheckpointError(f"The drafter's eagle_config should be an object, not {given!r}.")
    own = Noted(given or {})
    for name in ("fc_norm", "norm_output", "parallel_drafting"):
        for each in (noted, own):
            if flag(each, name):
                raise CheckpointError(f"The drafter's config.json has {name} (Eagle 3.1, P-Eagle): not supported.")
    if not flag(own, "use_aux_hidden_state", True):
        raise CheckpointError(
            "The drafter's config.json has use_aux_hidden_state false: only Eagle3 with taps is supported."
        )
    ids = own.get("eagle_aux_hidden_state_layer_ids")
    # What NVIDIA's ModelOpt writes beside these.
    refuse(own, "use_input_layernorm_in_first_layer", (True,))
    refuse(own, "use_last_layernorm", (True,))
    refuse(own, "use_mtp_layernorm", (False,))
    refuse(own, "parallel_draft_step", (0, 1))
    for name in ("next_layer_regular", "parallel_draft_heads_num_layers"):  # of layers and steps that are not there
        own.get(name)
    decoder = parse_llama(noted, {})
    config = Eagle3Config(
        SAFEAILAB,
        decoder,
        _taps(ids, target, SAFEAILAB, tap_convention),
        TRAINED_DEPTH,
        integer(noted, "target_hidden_size", target.hidden_size),
        draft_vocabulary(noted, decoder),
        norm_before_fc=flag(own, "norm_before_fc"),
    )
    check_known(own, own.read, ())
    check_known(fields, noted.read, HARMLESS | {"pretraining_tp"})
    return config


def _speculators(fields: Mapping[str, Any], target: ModelConfig, tap_convention: str) -> Eagle3Config:
    noted = Noted(fields)
    for name in ("fc_norm", "norm_output"):
        if flag(noted, name):
            raise CheckpointError(f"The drafter's config.json has {name} (Eagle 3.1): not supported.")
    decoder = layer_config(noted)
    config = Eagle3Config(
        SPECULATORS,
        decoder,
        _taps(noted.get("eagle_aux_hidden_state_layer_ids"), target, SPECULATORS, tap_convention),
        speculative_tokens(noted, TRAINED_DEPTH),
        integer(noted, "target_hidden_size", target.hidden_size),
        draft_vocabulary(noted, decoder),
        norm_before_residual=flag(noted, "norm_before_residual"),
        norm_before_fc=flag(noted, "norm_before_fc"),
        target_digest=noted.get("target_digest"),
    )
    check_known(fields, noted.read, HARMLESS | SPECULATORS_FIELDS)
    return config


def layer_config(fields: Fields) -> ModelConfig:
    """The decoder of speculators' `transformer_layer_config`, which leaves out what transformers has for defaults."""
    given = fields.get("transformer_layer_config")
    kind = given.get("model_type") if isinstance(given, Mapping) else None
    parse = {"llama": parse_llama, "qwen3": parse_qwen3}.get(str(kind))
    if parse is None:
        raise CheckpointError(
            f"The drafter's transformer_layer_config has model_type {kind!r}; llama and qwen3 are supported."
        )
    assert isinstance(given, Mapping)
    try:
        whole_config = CONFIG_MAPPING[str(kind)](**given).to_dict()
    except Exception as error:  # transformers raises exceptions of any type
        raise CheckpointError(
            f"The drafter's transformer_layer_config is no {kind} config: {' '.join(str(error).split())}"
        ) from None
    return parse(whole_config, {})


def speculative_tokens(fields: Fields, default: int) -> int:
    """The number of draft tokens of speculators' first proposal method."""
    own = fields.get("speculators_config") or {}
    methods = own.get("proposal_methods") or [{}] if isinstance(own, Mapping) else None
    if not isinstance(methods, list) or not isinstance(methods[0], Mapping):
        raise CheckpointError(
            f"The drafter's speculators_config should be an object with a list of proposal_methods, not {own!r}."
        )
    return integer(methods[0], "speculative_tokens", default)


def draft_vocabulary(fields: Fields, decoder: ModelConfig) -> int | None:
    """The number of tokens that may be drafted; None: all."""
    size = integer(fields, "draft_vocab_size", decoder.vocab_size)
    return None if size == decoder.vocab_size else size


def _taps(ids: Any, target: ModelConfig, format: Format, convention: str) -> tuple[int, ...]:
    """Target layers whose outputs are meant by `ids`, or by their absence."""
    layers = target.num_layers
    if ids is None:
        ids, convention = [2, layers // 2, layers - 3], "inputs"  # everyone's default, of hidden_states
    if not isinstance(ids, list) or not all(isinstance(each, int) and not isinstance(each, bool) for each in ids):
        raise CheckpointError(f"The drafter's eagle_aux_hidden_state_layer_ids must be a list of layers, not {ids!r}.")
    outputs = convention == "outputs"
    if convention == "auto":
        # SpecForge and ModelOpt count outputs, by default 1, L/2 - 1 and L - 4; others count inputs in the same format.
        # SGLang (PR 25454) tells the two by the first number, too.
        outputs = ids[:1] == [1] if format.counts_outputs is None else format.counts_outputs
    return tuple(ids) if outputs else tuple(each - 1 for each in ids)


Reader = Callable[[Mapping[str, Any], ModelConfig, str], Eagle3Config]

READERS: dict[str, Reader] = {
    "Qwen3Eagle3Model": _deepspec(DEEPSPEC, parse_qwen3),
    "Gemma4Eagle3Model": _deepspec(DEEPSPEC_GEMMA4, parse_gemma4),
    "LlamaForCausalLMEagle3": _safeailab,
    "Eagle3LlamaForCausalLM": _safeailab,  # the same, elsewhere
    "eagle3": _speculators,
}
SPECULATORS_FIELDS = frozenset(
    {
        "has_no_defaults_at_init",
        "speculators_version",
        "embed_requires_grad",
        "enable_sp_ulysses",
        "speculators_model_type",
    }
)
