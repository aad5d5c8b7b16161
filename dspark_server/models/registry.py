"""The architectures that this server runs. A new one is a file of its own and an entry here."""

from pathlib import Path

from dspark_server.errors import CheckpointError
from dspark_server.models.config import ModelConfig
from dspark_server.models.deepseek_v4 import DEEPSEEK_V4
from dspark_server.models.family import Family
from dspark_server.models.fields import architecture, read_json
from dspark_server.models.gemma4 import GEMMA4, GEMMA4_DRAFTER
from dspark_server.models.llama import LLAMA
from dspark_server.models.mistral import MISTRAL
from dspark_server.models.qwen2 import QWEN2
from dspark_server.models.qwen2_moe import QWEN2_MOE
from dspark_server.models.qwen3 import QWEN3
from dspark_server.models.qwen3_moe import QWEN3_MOE

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": MISTRAL,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
    "Qwen2MoeForCausalLM": QWEN2_MOE,
    "Qwen3MoeForCausalLM": QWEN3_MOE,
    "Gemma4ForConditionalGeneration": GEMMA4,
    "Gemma4ForCausalLM": GEMMA4,
    "Gemma4UnifiedForConditionalGeneration": GEMMA4,
    "Gemma4UnifiedForCausalLM": GEMMA4,
    "DeepseekV4ForCausalLM": DEEPSEEK_V4,
}

# Architectures that resemble one of these, and why they are none.
REFUSED: dict[str, str] = {
    "DeepseekV41ForCausalLM": "V4.1 compresses by other ratios, shares key-value rows between layers and adds Engram "
    "tables, none of which this server computes; it runs DeepSeek-V4 (DeepseekV4ForCausalLM)",
}

# By the architecture of a DSpark drafter, the family of its layers.
DRAFT_LAYERS: dict[str, Family] = {
    "Qwen3DSparkModel": QWEN3,
    "Gemma4DSparkModel": GEMMA4_DRAFTER,
}


def family_of(directory: Path) -> Family:
    """The family of a target checkpoint. Raises CheckpointError if it is none that this server runs."""
    fields = read_json(directory / "config.json")
    family = FAMILIES.get(architecture(fields))
    if reason := REFUSED.get(architecture(fields)):
        raise CheckpointError(f"{directory / 'config.json'}: {architecture(fields)} is not supported: {reason}")
    if family is None:
        raise CheckpointError(
            f"{directory / 'config.json'}: architectures {fields.get('architectures')} is not supported; "
            f"this server runs {', '.join(FAMILIES)}"
        )
    return family


def load_config(directory: Path, whole_experts: bool = False) -> ModelConfig:
    """Read config.json of a target checkpoint, and further end tokens of generation_config.json if there is one.

    `whole_experts` as in `ModelConfig.with_whole_experts`.

    Raises CheckpointError if a file is absent or unreadable, or asks for something this server does not support.
    """
    family, generation = family_of(directory), directory / "generation_config.json"
    config = family.parse(read_json(directory / "config.json"), read_json(generation) if generation.is_file() else {})
    return config.with_whole_experts() if whole_experts else config
