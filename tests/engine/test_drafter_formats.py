"""The same drafter in its makers' formats drafts the same; what a format has and we have not is refused by name."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dspark_server.config import EngineConfig, SpeculativeConfig
from dspark_server.engine import core as engine_core
from dspark_server.engine.core import EngineCore
from dspark_server.errors import CheckpointError, ConfigError
from dspark_server.evaluation.calibrate import CalibrateConfig, calibrate
from dspark_server.models.registry import load_config
from dspark_server.speculation.calibration import Calibration
from dspark_server.speculation.cost_model import Profile
from dspark_server.speculation.dspark_formats import DSparkConfig
from dspark_server.speculation.eagle3_formats import Eagle3Config

from .support import FIXTURES, greedy, prompts
from .test_drafters import Drafts, agree, drafts_of

EAGLE, DSPARK = FIXTURES / "eagle3_qwen3", FIXTURES / "dspark_qwen3_vanilla"
TEXTS = [[token % 380 for token in prompt] for prompt in prompts(3, shortest=20, longest=60)]
Fields, Tensors = dict[str, Any], dict[str, Tensor]
LAYER = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "head_dim", "max_position_embeddings", "rope_parameters", "vocab_size", "model_type")  # fmt: skip


def fields_of(pair: Path) -> Fields:
    return json.loads((pair / "draft" / "config.json").read_text())  # type: ignore[no-any-return]


def written(directory: Path, fields: Fields, tensors: Tensors) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(fields))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    return directory


def load(pair: Path, drafter: Path, **settings: Any) -> EngineCore:
    speculative = SpeculativeConfig(model=str(drafter), **{"selection": "fixed", "copying": False} | settings)
    return EngineCore.load(
        EngineConfig(str(pair / "target"), dtype="float32", num_blocks=300, block_size=4, speculative=speculative)
    )


def drafts(pair: Path, drafter: Path, **settings: Any) -> Drafts:
    core = load(pair, drafter, **settings)
    return drafts_of(core, lambda: core.generate(TEXTS, greedy(16)))


def own_only(tensors: Tensors) -> Tensors:
    """Without copies of the target's embedding and head."""
    return {name: tensor for name, tensor in tensors.items() if name not in ("embed_tokens.weight", "lm_head.weight")}


def speculators(fields: Fields, kind: str, **more: Any) -> Fields:
    """A config as speculators writes it: the layer's nested, without the defaults of transformers."""
    nested = {name: fields[name] for name in LAYER}
    proposal = {"proposal_type": "greedy", "speculative_tokens": 7}
    config = {"algorithm": kind, "proposal_methods": [proposal], "verifier": {"architectures": ["Qwen3ForCausalLM"]}}
    return {
        "speculators_model_type": kind,
        "speculators_version": "0.3.0",
        "speculators_config": config,
        "transformer_layer_config": nested,
        "draft_vocab_size": fields["vocab_size"],
        "torch_dtype": "float32",
        **more,
    }


def eagle(tensors: Tensors, layer: str = "layers.0.") -> Tensors:
    return {name.replace("layers.0.", layer): tensor for name, tensor in tensors.items()}


def test_eagle3_of_speculators(tmp_path: Path) -> None:
    """Numbers of taps count inputs there; the head is that of the checkpoint."""
    fields, tensors = fields_of(EAGLE), load_file(EAGLE / "draft" / "model.safetensors")
    ids = [each + 1 for each in fields["target_layer_ids"]]
    made = speculators(fields, "eagle3", eagle_aux_hidden_state_layer_ids=ids, norm_before_residual=False)
    agree(drafts(EAGLE, written(tmp_path / "made", made, tensors)), drafts(EAGLE, EAGLE / "draft"))


def test_eagle3_as_safeailab_and_as_speculators_write_it(tmp_path: Path) -> None:
    """A Llama layer without norms of heads, a vocabulary of its own; drafts name tokens of it alone."""
    fields, tensors = fields_of(EAGLE), load_file(EAGLE / "draft" / "model.safetensors")
    tensors = {
        name: tensor for name, tensor in tensors.items() if not name.endswith(("q_norm.weight", "k_norm.weight"))
    }
    tokens = torch.arange(0, 384, 2)
    tensors |= {"d2t": tokens - torch.arange(len(tokens)), "t2d": torch.arange(384) % 2 == 0}
    tensors["lm_head.weight"] = tensors["lm_head.weight"][tokens]
    del tensors["embed_tokens.weight"]
    llama = {name: value for name, value in fields.items() if name in LAYER} | {"model_type": "llama"}
    ids = [each + 1 for each in fields["target_layer_ids"]]
    theirs = {
        **llama,
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": 192,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": ids, "use_aux_hidden_state": True},
    }
    made = written(tmp_path / "safeailab", theirs, eagle(tensors, "midlayer."))
    nested = speculators(fields | llama, "eagle3", eagle_aux_hidden_state_layer_ids=ids) | {"draft_vocab_size": 192}
    other = written(tmp_path / "speculators", nested, tensors)
    mine = drafts(EAGLE, made, tap_convention="inputs")  # the first being 1, they would be outputs
    agree(mine, drafts(EAGLE, other))
    assert all(token % 2 == 0 for block in mine.values() for token in block)
    outputs = {**theirs, "eagle_config": {"eagle_aux_hidden_state_layer_ids": fields["target_layer_ids"]}}
    (made / "config.json").write_text(json.dumps(outputs))
    agree(drafts(EAGLE, made, tap_convention="outputs"), mine)
    assert drafts(EAGLE, made) != mine, "other taps"


def test_a_drafter_of_another_width_has_its_own_embedding(tmp_path: Path) -> None:
    """And features as wide as the target's."""
    fields, noise = fields_of(EAGLE), torch.Generator().manual_seed(3)

    def weight(*shape: int) -> Tensor:
        return torch.randn(shape, generator=noise) * 0.2

    wide, heads, size = 32, 4, 8
    layer = {
        "hidden_norm.weight": torch.ones(wide),
        "input_layernorm.weight": torch.ones(wide),
        "post_attention_layernorm.weight": torch.ones(wide),
        "self_attn.q_proj.weight": weight(heads * size, 2 * wide),
        "self_attn.k_proj.weight": weight(heads * size, 2 * wide),
        "self_attn.v_proj.weight": weight(heads * size, 2 * wide),
        "self_attn.o_proj.weight": weight(wide, heads * size),
        "mlp.gate_proj.weight": weight(64, wide),
        "mlp.up_proj.weight": weight(64, wide),
        "mlp.down_proj.weight": weight(wide, 64),
    }
    tensors = {f"midlayer.{name}": tensor for name, tensor in layer.items()}
    tensors |= {"fc.weight": weight(wide, 3 * 48), "norm.weight": torch.ones(wide)}
    tensors |= {"embed_tokens.weight": weight(384, wide), "lm_head.weight": weight(384, wide)}
    made = {
        "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "hidden_size": wide, "vocab_size": 384,
        "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": heads, "num_key_value_heads": heads,
        "head_dim": size, "max_position_embeddings": 512, "rope_theta": 1e4, "rms_norm_eps": 1e-5,
        "target_hidden_size": 48, "draft_vocab_size": 384, "tie_word_embeddings": False,
    }  # fmt: skip
    core = load(EAGLE, written(tmp_path / "made", made, tensors), num_speculative_tokens=2)
    assert core.loop.executor.gamma == 2
    layers = load_config(EAGLE / "target").num_layers
    assert core.loop.executor.drafter.taps == (1, layers // 2 - 1, layers - 4), "everyone's default"
    bare = EngineCore.load(
        EngineConfig(str(EAGLE / "target"), dtype="float32", num_blocks=300, speculative=SpeculativeConfig("none"))
    )
    assert core.generate(TEXTS, greedy(16)) == bare.generate(TEXTS, greedy(16))
    assert core.loop.stats.draft_tokens > 0
    del tensors["embed_tokens.weight"]
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight is missing"):
        load(EAGLE, written(tmp_path / "incomplete", made, tensors))
    assert fields["hidden_size"] != wide


def test_dspark_of_speculators(tmp_path: Path) -> None:
    fields, tensors = fields_of(DSPARK), load_file(DSPARK / "draft" / "model.safetensors")
    heads = (
        "mask_token_id",
        "markov_rank",
        "markov_head_type",
        "enable_confidence_head",
        "confidence_head_with_markov",
    )
    made = speculators(
        fields,
        "dspark",
        aux_hidden_state_layer_ids=[each + 1 for each in fields["target_layer_ids"]],
        block_size=7,
        sample_from_anchor=True,
        **{name: fields[name] for name in heads},
    )
    agree(drafts(DSPARK, written(tmp_path / "made", made, own_only(tensors))), drafts(DSPARK, DSPARK / "draft"))


def dflash_fields(fields: Fields) -> Fields:
    own = {"mask_token_id": fields["mask_token_id"], "target_layer_ids": fields["target_layer_ids"]}
    kept = {name: fields[name] for name in LAYER} | {"num_target_layers": fields["num_target_layers"]}
    return {**kept, "architectures": ["DFlashDraftModel"], "block_size": 7, "dflash_config": own}


def test_dflash_of_zlab_and_of_speculators(tmp_path: Path) -> None:
    """The anchor's slot predicts nothing: drafts are those of the slots after it, by the same backbone."""
    fields, tensors = fields_of(DSPARK), load_file(DSPARK / "draft" / "model.safetensors")
    bare = {n: t for n, t in own_only(tensors).items() if not n.startswith(("markov_head", "confidence_head"))}
    zlab = written(tmp_path / "zlab", dflash_fields(fields), bare)
    made = speculators(
        fields,
        "dflash",
        aux_hidden_state_layer_ids=[each + 1 for each in fields["target_layer_ids"]],
        block_size=7,
        mask_token_id=fields["mask_token_id"],
    )
    mine = drafts(DSPARK, zlab)
    agree(mine, drafts(DSPARK, written(tmp_path / "speculators", made, bare)))
    anchored = written(tmp_path / "anchored", {**made, "sample_from_anchor": True}, bare)
    theirs = drafts(DSPARK, anchored)
    common = mine.keys() & theirs.keys()
    assert len(common) > 10
    for place in common:
        both = min(len(mine[place]), len(theirs[place]) - 1)
        assert mine[place][:both] == theirs[place][1 : 1 + both]


def test_layers_of_dflash_may_have_a_window_and_see_no_later_token(tmp_path: Path) -> None:
    fields, tensors = fields_of(DSPARK), load_file(DSPARK / "draft" / "model.safetensors")
    bare = {n: t for n, t in own_only(tensors).items() if not n.startswith(("markov_head", "confidence_head"))}
    made = dflash_fields(fields) | {
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 16,
        "use_sliding_window": True,
        "max_window_layers": 1,
    }
    assert DSparkConfig.parse(made, load_config(DSPARK / "target")).causal == (True, False)
    core = load(DSPARK, written(tmp_path / "sliding", made, bare))
    assert len(core.batcher.pool.groups) == 2
    plain = load(DSPARK, DSPARK / "draft")
    assert core.generate(TEXTS, greedy(16)) == plain.generate(TEXTS, greedy(16))
    assert core.loop.stats.draft_tokens > 0


EAGLE_MADE = {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "hidden_size": 48, "vocab_size": 384,
              "intermediate_size": 80, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
              "head_dim": 24, "max_position_embeddings": 512, "draft_vocab_size": 192}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 2}, "of 2 layers are not supported"),
        ({"fc_norm": True}, "has fc_norm"),
        ({"eagle_config": {"norm_output": True}}, "has norm_output"),
        ({"eagle_config": {"parallel_drafting": True}}, "has parallel_drafting"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state false"),
        ({"eagle_config": {"attention_window": 3}}, "has attention_window, which this server does not know"),
        (
            {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [2, 9]}},
            "outputs of layers .1, 8., but this target has 7",
        ),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": "all"}}, "must be a list of layers"),
        ({"target_hidden_size": 64}, "target_hidden_size is 64, the target's hidden_size 48"),
        ({"vocab_size": 512}, "vocab_size is 512, the target's 384"),
        ({"draft_vocab_size": 400}, "draft_vocab_size 400 exceeds"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"slots": 3}, "has slots, which this server does not know"),
    ],
)
def test_an_eagle3_that_is_not_understood_is_refused(changes: Fields, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Eagle3Config.parse(EAGLE_MADE | changes, load_config(EAGLE / "target"))


@pytest.mark.parametrize(
    ("ids", "taps"),
    [
        ([1, 46, 90], (1, 46, 90)),  # SpecForge's for Qwen3-235B-A22B, what its trainer has for a default
        (None, (1, 46, 90)),
        ([24, 30, 36], (23, 29, 35)),  # NVIDIA's for gpt-oss
    ],
)
def test_numbers_of_taps_count_outputs_where_the_first_is_one(ids: list[int] | None, taps: tuple[int, ...]) -> None:
    target = load_config(EAGLE / "target")
    target = replace(target, layers=(target.layers[0],) * 94)
    own = {} if ids is None else {"eagle_config": {"eagle_aux_hidden_state_layer_ids": ids}}
    for architecture in ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM"):
        assert Eagle3Config.parse(EAGLE_MADE | own | {"architectures": [architecture]}, target).taps == taps


MODELOPT = {"use_input_layernorm_in_first_layer": True, "use_last_layernorm": True, "use_mtp_layernorm": False,
            "next_layer_regular": True, "parallel_draft_step": 1, "parallel_draft_heads_num_layers": 1,
            "use_aux_hidden_state": True, "norm_before_fc": None}  # fmt: skip


def test_eagle3_as_nvidias_modelopt_writes_it(tmp_path: Path) -> None:
    """Fields that say what is always so here, and tensors under layers.0."""
    tensors = load_file(EAGLE / "draft" / "model.safetensors")
    bare = {n: t for n, t in own_only(tensors).items() if not n.endswith(("q_norm.weight", "k_norm.weight"))}
    bare["fc.weight"] = bare["fc.weight"][:, : 3 * 48]
    made = EAGLE_MADE | {"draft_vocab_size": 384}
    mine = written(tmp_path / "modelopt", made | {"eagle_config": MODELOPT}, bare)
    agree(drafts(EAGLE, mine), drafts(EAGLE, written(tmp_path / "safeailab", made, eagle(bare, "midlayer."))))
    for name, other in (("use_last_layernorm", False), ("use_mtp_layernorm", True), ("parallel_draft_step", 4)):
        with pytest.raises(CheckpointError, match=name):
            Eagle3Config.parse(made | {"eagle_config": {**MODELOPT, name: other}}, load_config(EAGLE / "target"))


def test_dflash_as_nvidias_modelopt_writes_it() -> None:
    made, target = dflash_fields(fields_of(DSPARK)), load_config(DSPARK / "target")
    for causal in (False, True):
        own = made["dflash_config"] | {"causal": causal}
        assert DSparkConfig.parse(made | {"dflash_config": own}, target).causal == (causal, causal)
    with pytest.raises(CheckpointError, match="use_swa True is not supported, only False is: name the layers"):
        DSparkConfig.parse(made | {"dflash_config": made["dflash_config"] | {"use_swa": True}}, target)


@pytest.mark.parametrize(
    "changes",
    [
        {"speculators_config": "x"},
        {"speculators_config": {"proposal_methods": ["greedy"]}},
        {"speculators_config": {"proposal_methods": {"a": 1}}},
        {"transformer_layer_config": {"model_type": "qwen3", "hidden_size": "big"}},
        {"transformer_layer_config": {"model_type": "llama", "hidden_size": 100, "num_attention_heads": 32}},
    ],
)
def test_malformed_fields_of_speculators_are_one_line(changes: Fields) -> None:
    made = speculators(fields_of(EAGLE), "eagle3") | changes
    with pytest.raises(CheckpointError) as refusal:
        Eagle3Config.parse(made, load_config(EAGLE / "target"))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"speculators_model_type": "peagle", "architectures": ["PEagleSpeculator"]}, "peagle"),
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ({}, ""),
    ],
)
def test_a_checkpoint_of_no_family_is_named(fields: Fields, name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"'{name}' is not a drafter this server runs; .*eagle3"):
        load(EAGLE, written(tmp_path / "made", fields, {}))


def test_a_calibration_does_not_bind_a_drafter_without_confidence(tmp_path: Path) -> None:
    made = Path(shutil.copytree(EAGLE / "draft", tmp_path / "draft"))
    Calibration.identity(7).save(made, {})
    for depth in (2, 12):
        assert load(EAGLE, made, num_speculative_tokens=depth).loop.executor.gamma == depth


def test_a_drafter_without_confidence_is_not_calibrated(tmp_path: Path) -> None:
    run = CalibrateConfig(str(EAGLE / "draft"), tmp_path / "corpus.npz", str(EAGLE / "target"))
    with pytest.raises(ConfigError, match="of method eagle3: it has no confidence head to calibrate"):
        calibrate(run)


def test_costs_are_measured_for_each_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft of more passes costs more: a profile is kept for it alone."""
    seen: list[str] = []

    def measured(*_: object, identity: str, **__: object) -> Profile:
        seen.append(identity)
        return Profile((1, 256), (1e-3, 9e-3), (1, 8), (1e-3, 2e-3), 1e-9, 1e-9)

    monkeypatch.setattr(engine_core, "profile", measured)
    for depth in (2, 12):
        made = load(EAGLE, EAGLE / "draft", selection="causal", num_speculative_tokens=depth)
        assert made.drafter == "eagle3"
    assert len(set(seen)) == 2


def test_a_tap_may_be_the_last_layers_output() -> None:
    made = EAGLE_MADE | {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [2, 7]}}
    assert Eagle3Config.parse(made, load_config(EAGLE / "target")).taps == (1, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda own: own.update(projector_type="domino"), "projector_type 'domino' is not supported"),
        (lambda own: own.update(projector_type="dflash2"), "projector_type 'dflash2' is not supported"),
        (lambda own: own.update(selector_top_k=16), "has selector_top_k, which this server does not know"),
        (lambda own: own.update(target_layer_ids=[1, 5]), "must increase and lie within -1 .. 4"),
        (lambda own: own.pop("mask_token_id"), "needs mask_token_id"),
    ],
)
def test_a_dflash_that_is_not_understood_is_refused(change: Callable[[Fields], Any], message: str) -> None:
    made = dflash_fields(fields_of(DSPARK))
    change(made["dflash_config"])
    with pytest.raises(CheckpointError, match=message):
        DSparkConfig.parse(made, load_config(DSPARK / "target"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "dspark"}, "method is dspark, but .* holds a drafter of method eagle3"),
        ({"shortlist": 8}, "leave it out for eagle3"),
        ({"num_speculative_tokens": 2}, None),
    ],
)
def test_what_is_asked_of_a_drafter_that_it_cannot_do(settings: dict[str, Any], message: str | None) -> None:
    if message is None:
        assert load(EAGLE, EAGLE / "draft", **settings).loop.executor.gamma == 2
        return
    with pytest.raises(ConfigError, match=message):
        load(EAGLE, EAGLE / "draft", **settings)


@pytest.mark.parametrize("spoil", ["t2d", "d2t", "width"])
def test_a_vocabulary_that_contradicts_itself_is_refused(spoil: str, tmp_path: Path) -> None:
    tensors = load_file(EAGLE / "draft" / "model.safetensors")
    tensors = {
        name: tensor for name, tensor in tensors.items() if not name.endswith(("q_norm.weight", "k_norm.weight"))
    }
    tokens = torch.arange(0, 384, 2)
    tensors |= {"d2t": tokens - torch.arange(len(tokens)), "t2d": torch.arange(384) % 2 == 0}
    tensors["lm_head.weight"] = tensors["lm_head.weight"][tokens]
    tensors["fc.weight"] = tensors["fc.weight"][:, :144]
    if spoil == "t2d":
        tensors["t2d"] = ~tensors["t2d"]
    elif spoil == "d2t":
        tensors["d2t"] = tensors["d2t"].flip(0)
    else:
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:100]
    made = written(tmp_path / "made", EAGLE_MADE, eagle(tensors, "midlayer."))
    with pytest.raises(CheckpointError, match=r"t2d and d2t|d2t must name|lm_head.weight has shape"):
        load(EAGLE, made)


def test_an_assistant_of_another_target_is_refused(tmp_path: Path) -> None:
    pair = FIXTURES / "mtp_gemma4_assistant"
    draft = Path(shutil.copytree(pair / "draft", tmp_path / "draft"))
    fields = json.loads((draft / "config.json").read_text())
    for change, message in (
        ({"backbone_hidden_size": 32}, "backbone_hidden_size is 32, the target's hidden_size 64"),
        ({"use_ordered_embeddings": True}, "use_ordered_embeddings True is not supported"),
        (
            {"text_config": fields["text_config"] | {"num_kv_shared_layers": 2}},
            "num_kv_shared_layers 2 is not supported",
        ),
        ({"text_config": fields["text_config"] | {"num_key_value_heads": 4}}, "A layer of the drafter reads 4"),
        ({"drafts_at_once": 4}, "has drafts_at_once, which this server does not know"),
    ):
        (draft / "config.json").write_text(json.dumps(fields | change))
        with pytest.raises(CheckpointError, match=message):
            load(pair, draft)
    with pytest.raises(CheckpointError, match=r"has no layer with a window|not a pair"):
        load(DSPARK, pair / "draft")
