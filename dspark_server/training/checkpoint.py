"""A trained drafter to a checkpoint's directory and back; initial weights of a fresh one.

DSpark and DFlash are written in DeepSpec's format A, DFlash2 as z-lab writes it, Eagle3 and MTP as speculators does.
"""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dspark_server.errors import CheckpointError
from dspark_server.models.fields import read_json
from dspark_server.models.loading import WeightReader, open_checkpoint
from dspark_server.models.registry import load_config
from dspark_server.speculation.dspark_formats import DSparkConfig
from dspark_server.speculation.eagle3_formats import Eagle3Config
from dspark_server.speculation.mtp import MtpConfig
from dspark_server.speculation.pair import head_digest, read_draft_tokens
from dspark_server.training.config import TrainConfig
from dspark_server.training.model import DraftModel, TrainedDrafter
from dspark_server.training.pairs import Eagle3Model, MtpModel, PairModel

CONV_TAPS, CONV_GROUP = 2, 16  # of DFlash2, as z-lab publishes it

# A row for each token that may be drafted.
_SUCCESSORS = ("markov_head.markov_w2.weight", "candidate_selector.successor_codebook")

# Rope settings are the target's: the drafter rotates at the target's own positions.
_FROM_TARGET = (
    "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_parameters", "rope_scaling",
    "bos_token_id", "eos_token_id",
)  # fmt: skip


def draft_fields(run: TrainConfig, target_directory: Path) -> dict[str, Any]:
    """config.json of the drafter that `run` describes, for the target in `target_directory`."""
    return _FIELDS[run.method](run, target_directory)


def draft_model(
    run: TrainConfig, target_directory: Path, embedding: Tensor, max_length: int, *, bfloat16: bool = False
) -> TrainedDrafter:
    """An untrained drafter beside the target's `embedding` [V, D], for sequences of up to `max_length` tokens.

    Raises CheckpointError if the target has no such layers.
    """
    fields, target = draft_fields(run, target_directory), load_config(target_directory)
    if run.method == "eagle3":
        return Eagle3Model(Eagle3Config.parse(fields, target), embedding, max_length, bfloat16=bfloat16)
    if run.method == "mtp":
        return MtpModel(MtpConfig.parse(fields, target), embedding, max_length, bfloat16=bfloat16)
    return DraftModel(DSparkConfig.parse(fields, target), embedding, max_length, bfloat16=bfloat16)


def _backbone(run: TrainConfig, target_directory: Path) -> dict[str, Any]:
    """Qwen3-style layers of the target's width, and the tokens that may be drafted.

    If the loss saw only a part of the vocabulary, no other token ever is (`draft_vocab_size`).
    """
    theirs = read_json(target_directory / "config.json")
    shape = load_config(target_directory)
    part = run.vocabulary is not None and run.vocabulary < shape.vocab_size
    drafted = {"draft_vocab_size": run.vocabulary} if part else {}
    return (
        {name: theirs[name] for name in _FROM_TARGET if name in theirs}
        | drafted
        | {
            "model_type": "qwen3",
            "head_dim": shape.layers[0].attention.head_dim,
            "attention_bias": False,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
            "num_target_layers": shape.num_layers,
            "num_hidden_layers": run.num_layers,
            "target_digest": head_digest(target_directory),
        }
    )


def _dspark_fields(run: TrainConfig, target_directory: Path) -> dict[str, Any]:
    """Format A (DSPARK.md); embedding and head are shared with the target's (`share_target_embeddings`)."""
    return _backbone(run, target_directory) | {
        "architectures": ["Qwen3DSparkModel"],
        "block_size": run.block_size,
        "mask_token_id": run.mask_token_id,
        "target_layer_ids": list(run.target_layer_ids),
        "num_anchors": run.anchors_per_sequence,
        "enable_confidence_head": run.confidence,
        "confidence_head_with_markov": run.confidence and run.markov_rank > 0,
        "markov_rank": run.markov_rank,
        "markov_head_type": run.markov_head_type,
        "share_target_embeddings": True,
    }


def _dflash2_fields(run: TrainConfig, target_directory: Path) -> dict[str, Any]:
    """A block holds the anchor beside the slots that predict."""
    return _backbone(run, target_directory) | {
        "architectures": ["DFlash2DraftModel"],
        "is_causal": False,
        "dflash_config": {
            "block_size": run.block_size + 1,
            "conv_kernel_size": CONV_TAPS,
            "conv_group_size": math.gcd(CONV_GROUP, load_config(target_directory).hidden_size),
            "selector_rank": run.markov_rank,
            "selector_top_k": run.selector_top_k,
            "mask_token_id": run.mask_token_id,
            "target_layer_ids": list(run.target_layer_ids),
        },
    }


def _eagle3_fields(run: TrainConfig, target_directory: Path) -> dict[str, Any]:
    """A layer of the target's own kind, with norms of heads where the target has them; taps are counted as inputs."""
    norms = load_config(target_directory).layers[0].attention.qk_norm
    return _speculators(run, target_directory, "Eagle3DraftModel", "qwen3" if norms else "llama", 1) | {
        "eagle_aux_hidden_state_layer_ids": [each + 1 for each in run.target_layer_ids],
        "norm_before_residual": False,
    }


def _mtp_fields(run: TrainConfig, target_directory: Path) -> dict[str, Any]:
    """A Qwen3-style layer, as speculators has no other; the number of layers is the target's there."""
    layers = load_config(target_directory).num_layers
    return _speculators(run, target_directory, "MTPDraftModel", "qwen3", layers) | {"num_nextn_predict_layers": 1}


def _speculators(
    run: TrainConfig, target_directory: Path, architecture: str, model_type: str, layers: int
) -> dict[str, Any]:
    """The fields that all drafters of speculators have, for a layer of this `model_type`."""
    theirs = read_json(target_directory / "config.json")
    shape = load_config(target_directory)
    proposal = {"proposal_type": "greedy", "speculative_tokens": run.block_size}
    return {
        "architectures": [architecture],
        "speculators_model_type": run.method,
        "speculators_config": {
            "algorithm": run.method,
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {"name_or_path": run.model, "architectures": theirs["architectures"]},
        },
        "transformer_layer_config": {name: theirs[name] for name in _FROM_TARGET if name in theirs}
        | {
            "model_type": model_type,
            "num_hidden_layers": layers,
            "head_dim": shape.layers[0].attention.head_dim,
            "attention_bias": False,
        },
        "draft_vocab_size": min(run.vocabulary or shape.vocab_size, shape.vocab_size),
        "target_digest": head_digest(target_directory),
        "dtype": "bfloat16",
    }


_FIELDS = {"dspark": _dspark_fields, "dflash2": _dflash2_fields, "eagle3": _eagle3_fields, "mtp": _mtp_fields}


def export(
    model: TrainedDrafter, run: TrainConfig, target_directory: Path, draft_tokens: Tensor | None, directory: Path
) -> None:
    """Write config.json, model.safetensors (bfloat16) and the run's settings.

    `draft_tokens` [Vd] int64, ascending, are the tokens that may be drafted (None: all), kept as offsets in `d2t`;
    Eagle3's readers want `t2d` and the head's rows of these tokens, too.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(draft_fields(run, target_directory), indent=2) + "\n")
    (directory / "training.json").write_text(json.dumps(asdict(run), indent=2) + "\n")
    tensors = {name: tensor.detach().bfloat16().contiguous() for name, tensor in model.state_dict().items()}
    if draft_tokens is not None:
        offsets = draft_tokens - torch.arange(len(draft_tokens))
        tensors["d2t"] = offsets.int()
        if isinstance(model, Eagle3Model):
            head = target_head(target_directory)
            tensors["d2t"] = offsets
            tensors["t2d"] = torch.zeros(len(head), dtype=torch.bool).index_fill(0, draft_tokens, value=True)
            tensors["lm_head.weight"] = head[draft_tokens].bfloat16()
    save_file(tensors, directory / "model.safetensors")


def load_weights(model: TrainedDrafter, draft_tokens: Tensor | None, target_directory: Path, directory: Path) -> None:
    """Fill the module from a checkpoint of its format; embedding and head are the target's, copies must be equal.

    It may draft other tokens, or blocks of another size, than the checkpoint: rows of W2 go to the tokens they belong
    to, and those of tokens the checkpoint did not draft start at zero. `draft_tokens` [Vd] are the module's, None: all.
    Raises CheckpointError if a tensor is missing, unexpected or misshapen, or a copy differs.
    """
    target = load_config(target_directory)
    config: Eagle3Config | MtpConfig | DSparkConfig
    if isinstance(model, PairModel):
        config = (MtpConfig if isinstance(model, MtpModel) else Eagle3Config).load(directory, target)
    else:
        config = DSparkConfig.load(directory, target)
    reader = WeightReader(open_checkpoint(directory), torch.float32)
    own, vocabulary = model.state_dict(), config.decoder.vocab_size
    state = {name: reader.take(name, tensor.shape) for name, tensor in own.items() if name not in _SUCCESSORS}
    theirs = read_draft_tokens(reader, config.draft_vocab_size, vocabulary)
    every = torch.arange(vocabulary)
    drafted = every if theirs is None else theirs
    for name in own.keys() & _SUCCESSORS:
        rank = own[name].shape[1]
        rows = torch.zeros(vocabulary, rank)
        rows[drafted] = reader.take(name, (len(drafted), rank))
        state[name] = rows[every if draft_tokens is None else draft_tokens]
    _check_copy(reader, "embed_tokens.weight", _read_embedding(target_directory), directory)
    _check_copy(reader, "lm_head.weight", target_head(target_directory)[drafted], directory)
    reader.finish(config.decoder.ropes)
    model.load_state_dict(state)


def target_head(target_directory: Path) -> Tensor:
    """The target's output matrix [V, D], as stored: its embedding's where they are tied."""
    target = open_checkpoint(target_directory)
    if "lm_head.weight" in target.tensors:
        return target.read("lm_head.weight")
    return _read_embedding(target_directory)


def _read_embedding(target_directory: Path) -> Tensor:
    return open_checkpoint(target_directory).read("model.embed_tokens.weight")


def _check_copy(reader: WeightReader, name: str, theirs: Tensor, directory: Path) -> None:
    """Raise CheckpointError if the drafter has a tensor of its own in the target's place: training would ignore it."""
    if name not in reader:
        return
    mine, theirs = reader.take(name, theirs.shape), theirs.float()
    if not torch.equal(mine, theirs) and not torch.equal(mine, theirs.bfloat16().float()):
        raise CheckpointError(f"{directory}: {name} is not the target's; training uses the target's own.")


@torch.no_grad()
def initialise_from_target(model: TrainedDrafter, target_directory: Path) -> None:
    """Layers and final norm start as the target's last ones, and the last features pass through (TRAINING.md, run B).

    Of what an Eagle3 or MTP layer projects, the embedding's half starts at zero, or nearly so.
    """
    config = load_config(target_directory)
    checkpoint = open_checkpoint(target_directory)
    own, hidden = model.state_dict(), config.hidden_size
    layers = len({name.split(".")[1] for name in own if name.startswith(("layers.", "mtp_layers."))})
    first = config.num_layers - layers

    def source(name: str) -> str:
        kind, _, rest = name.partition(".")
        if kind not in ("layers", "mtp_layers"):
            return f"model.{name}"
        index, _, rest = rest.partition(".")
        return "model.norm.weight" if rest == "final_layernorm.weight" else f"model.layers.{first + int(index)}.{rest}"

    for name, tensor in own.items():
        if name.startswith(("layers.", "mtp_layers.", "norm.")) and source(name) in checkpoint.tensors:
            theirs = checkpoint.read(source(name)).float()
            if tensor.shape == theirs.shape:
                tensor.copy_(theirs)
            else:
                tensor[:, :hidden] = 0
                tensor[:, hidden:] = theirs
    # The norm of features: the target made keys and values of rows scaled by the layer's input norm.
    inputs = checkpoint.read(f"model.layers.{first}.input_layernorm.weight").float()
    into = "mtp_layers.0.input_proj.weight" if isinstance(model, MtpModel) else "fc.weight"
    if isinstance(model, Eagle3Model):
        own["layers.0.hidden_norm.weight"].copy_(inputs)
        own["layers.0.input_layernorm.weight"].fill_(1)
    elif not isinstance(model, MtpModel):
        own["hidden_norm.weight"].copy_(inputs)
    project: Tensor = own[into]
    project.normal_(std=0.002, generator=torch.Generator().manual_seed(1))
    project[:, -hidden:] += torch.eye(hidden)
