"""Sampling defaults of a checkpoint: generation_config.json, for fields that a request leaves out, as in vLLM."""

import math
from pathlib import Path

from dspark_server.errors import CheckpointError, ConfigError
from dspark_server.models.fields import read_json

FILE = "generation_config.json"
# Least and greatest value; the first is excluded where 0 is.
_BOUNDS = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "top_k": (-1, math.inf),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.0, 1000.0),
}
_ABOVE = ("top_p", "repetition_penalty")

Defaults = dict[str, float | int]


def sampling_defaults(source: str, model: Path) -> Defaults:
    """Defaults of a request's sampling fields, by name; those that are not here are OpenAI's.

    `source`: "auto", the file beside the model, if there is one; "vllm", none; else a directory that has the file.
    `do_sample` and all other keys are not read, as in vLLM. Raises ConfigError if the directory has no such file,
    CheckpointError for values that a request could not have either.
    """
    if source == "vllm":
        return {}
    path = (model if source == "auto" else Path(source)) / FILE
    if not path.is_file():
        if source == "auto":
            return {}
        raise ConfigError(f"--generation-config {source}: {path} does not exist; give auto, vllm or its directory.")
    fields = read_json(path)
    made: Defaults = {}
    for name, (least, greatest) in _BOUNDS.items():
        value = fields.get(name)
        if value is None:
            continue
        kinds = (int,) if name == "top_k" else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not _within(name, value, least, greatest):
            bounds = f"from {least}" if greatest == math.inf else f"from {least} to {greatest}"
            raise CheckpointError(
                f"{path}: {name} must be a number {bounds}, not {value!r}; correct it, or say --generation-config vllm"
            )
        made[name] = max(value, 0) if name == "top_k" else float(value)
    return made


def _within(name: str, value: float, least: float, greatest: float) -> bool:
    return least < value <= greatest if name in _ABOVE else least <= value <= greatest  # False for NaN
