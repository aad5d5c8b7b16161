"""A trained module to a format-A directory and back; initial weights of a fresh drafter."""

import json
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
from dspark_server.speculation.pair import head_digest, read_draft_tokens
from dspark_server.training.config import TrainConfig
from dspark_server.training.model import DraftModel

_W2 = "markov_head.markov_w2.weight"

# Rope settings are the target's: the drafter rotates at the target's own positions.
_FROM_TARGET = (
    "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_parameters", "rope_scaling",
    "bos_token_id", "eos_token_id",
)  # fmt: skip


def draft_fields(run: TrainConfig, target_directory: Path) -> dict[str, Any]:
    """config.json of the drafter that `run` describes: Qwen3-style layers of the target's width (DSPARK.md, format A).

    Embedding and head are left out of its weights and shared with the target's (`share_target_embeddings`). If the loss
    saw only a part of the vocabulary, no other token is ever drafted (`draft_vocab_size`).
    """
    theirs = read_json(target_directory / "config.json")
    shape = load_config(target_directory)
    part = run.vocabulary is not None and run.vocabulary < shape.vocab_size
    drafted = {"draft_vocab_size": run.vocabulary} if part else {}
    return (
        {name: theirs[name] for name in _FROM_TARGET if name in theirs}
        | drafted
        | {
            "architectures": ["Qwen3DSparkModel"],
            "model_type": "qwen3",
            "head_dim": shape.layers[0].attention.head_dim,
            "attention_bias": False,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
            "num_target_layers": shape.num_layers,
            "num_hidden_layers": run.num_layers,
            "block_size": run.block_size,
            "mask_token_id": run.mask_token_id,
            "target_layer_ids": list(run.target_layer_ids),
            "num_anchors": run.anchors_per_sequence,
            "enable_confidence_head": run.confidence,
            "confidence_head_with_markov": run.confidence and run.markov_rank > 0,
            "markov_rank": run.markov_rank,
            "markov_head_type": run.markov_head_type,
            "share_target_embeddings": True,
            "target_digest": head_digest(target_directory),
        }
    )


def draft_config(run: TrainConfig, target_directory: Path) -> DSparkConfig:
    """The same, parsed and checked against the target."""
    return DSparkConfig.parse(draft_fields(run, target_directory), load_config(target_directory))


def export(
    model: DraftModel, run: TrainConfig, target_directory: Path, draft_tokens: Tensor | None, directory: Path
) -> None:
    """Write config.json, model.safetensors (bfloat16) and the run's settings.

    `draft_tokens` [Vd] int64, ascending, are the tokens that may be drafted (None: all), kept as offsets in `d2t`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(draft_fields(run, target_directory), indent=2) + "\n")
    (directory / "training.json").write_text(json.dumps(asdict(run), indent=2) + "\n")
    tensors = {name: tensor.detach().bfloat16().contiguous() for name, tensor in model.state_dict().items()}
    if draft_tokens is not None:
        tensors["d2t"] = (draft_tokens - torch.arange(len(draft_tokens))).int()
    save_file(tensors, directory / "model.safetensors")


def load_weights(model: DraftModel, draft_tokens: Tensor | None, target_directory: Path, directory: Path) -> None:
    """Fill the module from a format-A directory; embedding and head are the target's, its copies must be equal.

    It may draft other tokens, or blocks of another size, than the checkpoint: rows of W2 go to the tokens they belong
    to, and those of tokens the checkpoint did not draft start at zero. `draft_tokens` [Vd] are the module's, None: all.
    Raises CheckpointError if a tensor is missing, unexpected or misshapen, or a copy differs.
    """
    config = DSparkConfig.load(directory, load_config(target_directory))
    reader = WeightReader(open_checkpoint(directory), torch.float32)
    own = model.state_dict()
    state = {name: reader.take(name, tensor.shape) for name, tensor in own.items() if name != _W2}
    theirs = read_draft_tokens(reader, config.draft_vocab_size, config.decoder.vocab_size)
    if _W2 in own:
        vocabulary = config.decoder.vocab_size
        rows = torch.zeros(vocabulary, config.markov_rank)
        every = torch.arange(vocabulary)
        rows[every if theirs is None else theirs] = reader.take(
            _W2, (config.draft_vocab_size or vocabulary, own[_W2].shape[1])
        )
        state[_W2] = rows[every if draft_tokens is None else draft_tokens]
    _check_copies(reader, target_directory, directory)
    reader.finish(config.decoder.ropes)
    model.load_state_dict(state)


def _check_copies(reader: WeightReader, target_directory: Path, directory: Path) -> None:
    """Raise CheckpointError if the drafter has its own embedding or head: training would ignore it."""
    target = open_checkpoint(target_directory)
    embedding = "model.embed_tokens.weight"
    head = "lm_head.weight" if "lm_head.weight" in target.tensors else embedding
    for name, source in (("embed_tokens.weight", embedding), ("lm_head.weight", head)):
        if name in reader:
            theirs = target.read(source).float()
            mine = reader.take(name, theirs.shape)
            if not torch.equal(mine, theirs) and not torch.equal(mine, theirs.bfloat16().float()):
                raise CheckpointError(f"{directory}: {name} is not the target's; training uses the target's own.")


@torch.no_grad()
def initialise_from_target(model: DraftModel, target_directory: Path) -> None:
    """Layers and final norm start as the target's last ones, and `fc` hands on the last tap (TRAINING.md, run B)."""
    config = load_config(target_directory)
    checkpoint = open_checkpoint(target_directory)
    own = model.state_dict()

    def copy(name: str, source: str) -> None:
        own[name].copy_(checkpoint.read(source).float())

    first = config.num_layers - len(model.layers)
    for index in range(len(model.layers)):
        for name in own:
            prefix = f"layers.{index}."
            source = f"model.layers.{first + index}.{name.removeprefix(prefix)}"
            if name.startswith(prefix) and source in checkpoint.tensors:
                copy(name, source)
    copy("norm.weight", "model.norm.weight")
    # The target made context keys and values of rows scaled by the layer's input norm; here hidden_norm does that.
    copy("hidden_norm.weight", f"model.layers.{first}.input_layernorm.weight")
    hidden = config.hidden_size
    fc: Tensor = own["fc.weight"]
    fc.normal_(std=0.002, generator=torch.Generator().manual_seed(1))
    fc[:, -hidden:] += torch.eye(hidden)
