"""The families of drafters that this server runs. A new one is a file of its own and an entry here."""

from pathlib import Path

import torch
from dspark_kernels import Kernels

from dspark_server.config import SpeculativeConfig
from dspark_server.errors import CheckpointError, ConfigError
from dspark_server.models.config import ModelConfig
from dspark_server.models.decoder import Decoder
from dspark_server.models.fields import read_json
from dspark_server.speculation import dspark_formats, eagle3_formats
from dspark_server.speculation.assistant import AssistantDrafter
from dspark_server.speculation.dspark import DSparkDrafter
from dspark_server.speculation.eagle3 import Eagle3Drafter
from dspark_server.speculation.model_drafter import ModelDrafter
from dspark_server.speculation.mtp import MtpDrafter
from dspark_server.speculation.pair import format_name
from dspark_server.speculation.stages import StageDrafter, StagesConfig, StreamMtpDrafter

# By a config's `speculators_model_type`, or else its architecture.
FAMILIES = {
    **dict.fromkeys(dspark_formats.READERS, "dspark"),
    **dict.fromkeys(eagle3_formats.READERS, "eagle3"),
    **dict.fromkeys(("Gemma4UnifiedAssistantForCausalLM", "Gemma4AssistantForCausalLM", "mtp"), "mtp"),
}


def own_stages(target_directory: Path, target: ModelConfig) -> StagesConfig | None:
    """The drafter inside the target's checkpoint; None: there is none."""
    return StagesConfig.parse(read_json(target_directory / "config.json"), target) if target.streams else None


def load_own(
    stages: StagesConfig,
    target: Decoder,
    directory: Path,
    dtype: torch.dtype,
    kernels: Kernels,
    config: SpeculativeConfig,
) -> ModelDrafter:
    """Load the drafter inside the target's checkpoint. Raises as `load_drafter`."""
    method, asked = "dspark" if stages.block_size else "mtp", config.num_speculative_tokens
    if config.method not in ("auto", method):
        raise ConfigError(f"method is {config.method}, but the drafter in {directory} is of method {method}.")
    if config.shortlist is not None and method == "mtp":
        raise ConfigError("shortlist is for drafters with a sequential head: leave it out for mtp.")
    if config.tap_convention != "auto":
        raise ConfigError("tap_convention is for eagle3 drafters: leave it out for this one.")
    if method == "mtp":
        return StreamMtpDrafter.load(stages, target, directory, dtype, kernels, asked, config.copying)
    if asked is not None and asked > stages.block_size:
        raise ConfigError(
            f"num_speculative_tokens is {asked}, but the drafter was trained for blocks of {stages.block_size}: "
            f"ask for at most {stages.block_size}."
        )
    return StageDrafter.load(stages, target, directory, dtype, kernels, config.copying, config.shortlist)


def family_of(directory: Path) -> str:
    """The family of a drafter's checkpoint, a method of `--speculative-config`. CheckpointError if it has none."""
    name = format_name(read_json(directory / "config.json"))
    family = FAMILIES.get(name)
    if family is None:
        raise CheckpointError(
            f"{directory / 'config.json'}: {name!r} is not a drafter this server runs; {', '.join(FAMILIES)} are."
        )
    return family


def load_drafter(
    directory: Path,
    target: Decoder,
    target_directory: Path,
    dtype: torch.dtype,
    kernels: Kernels,
    config: SpeculativeConfig,
) -> ModelDrafter:
    """Load the drafter in `directory` for `target`, of the family that its config.json says.

    Raises CheckpointError if it cannot be read or is for another target, ConfigError if `config` asks for another
    method, or for what the drafter cannot do.
    """
    family, asked = family_of(directory), config.num_speculative_tokens
    if config.method not in ("auto", family) and not (family == "dspark" and config.method in ("dflash", "dflash2")):
        raise ConfigError(f"method is {config.method}, but {directory} holds a drafter of method {family}.")
    if family != "dspark" and config.shortlist is not None:
        raise ConfigError(f"shortlist is for drafters with a sequential head: leave it out for {family}.")
    if family != "eagle3" and config.tap_convention != "auto":
        raise ConfigError("tap_convention is for eagle3 drafters: leave it out for this one.")
    if family == "mtp":
        layer = format_name(read_json(directory / "config.json")) == "mtp"
        load = MtpDrafter.load if layer else AssistantDrafter.load
        return load(directory, target, target_directory, dtype, kernels, asked, config.copying)
    if family == "eagle3":
        return Eagle3Drafter.load(
            directory, target, target_directory, dtype, kernels, asked, config.tap_convention, config.copying
        )
    drafter = DSparkDrafter.load(directory, target, target_directory, dtype, kernels, config.shortlist, config.copying)
    if asked is not None and asked > drafter.gamma:
        raise ConfigError(
            f"num_speculative_tokens is {asked}, but the drafter was trained for blocks of {drafter.gamma}: "
            f"ask for at most {drafter.gamma}."
        )
    if config.method == "dflash" and (drafter.config.markov_rank or drafter.config.selector):
        raise ConfigError(
            "method dflash expects a drafter without a sequential head; leave the method out for this one."
        )
    if config.method == "dflash2" and drafter.config.selector is None:
        raise ConfigError(
            "method dflash2 expects a drafter with a candidate selector; leave the method out for this one."
        )
    return drafter
