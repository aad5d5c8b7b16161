"""Settings of `dspark-server train`: one YAML file, one dataclass."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dspark_server.errors import ConfigError
from dspark_server.resolve import load_yaml
from dspark_server.settings import suggest


@dataclass(frozen=True)
class TrainConfig:
    """A training run. Paths are relative to the working directory; sizes are in tokens unless stated otherwise.

    `method` is the family: "dspark", which is DFlash with `markov_rank` 0 and no `confidence`; "dflash2", whose
    candidate selector has rank `markov_rank` and chooses among `selector_top_k` tokens; "eagle3" and "mtp", whose one
    layer drafts `block_size` tokens in as many passes, in training too, and which have no such heads.
    `vocabulary` restricts the loss to the most frequent tokens of the corpus (None: all). `init` is "target" (the last
    target layers, its final norm, features passed through from the last tap) or "fresh". `weights` is a checkpoint to
    start from. The learning rate warms up over the share `warmup` of the steps and then follows `schedule`: a "cosine"
    to zero, or "constant", which can be ended at any step. `markov_rate` multiplies the learning rate of the Markov
    head. `averaging` is the decay of a running mean of the weights, which is then evaluated and exported (0: off).
    `reuse` spreads the cost of new sequences' features: each brings reuse - 1 visits to earlier ones (Split.drawn).
    `precision` is that of matrix products; weights, sums, softmaxes and losses are always float32. "auto" is bfloat16
    where the processor is faster at it (AMX, or AMD's AVX512_BF16), else float32.
    """

    corpus: str
    output: str
    model: str = "SmolLM2-135M-Instruct"
    method: str = "dspark"
    weights: str | None = None
    cache_gib: float = 20.0
    mask_token_id: int = 16
    target_layer_ids: tuple[int, ...] = (2, 9, 16, 23, 28)
    num_layers: int = 2
    block_size: int = 7
    markov_rank: int = 64
    markov_head_type: str = "vanilla"
    selector_top_k: int = 16
    confidence: bool = True
    init: str = "target"
    ce_weight: float = 0.1
    tv_weight: float = 0.9
    confidence_weight: float = 1.0
    decay: float = 4.0
    vocabulary: int | None = None
    sequences_per_step: int = 4
    anchors_per_sequence: int = 32
    steps: int = 2000
    learning_rate: float = 1.5e-3
    warmup: float = 0.04
    schedule: str = "cosine"
    markov_rate: float = 1.0
    averaging: float = 0.0
    reuse: int = 1
    precision: str = "auto"
    clip: float = 1.0
    held_out: int = 100
    eval_every: int = 200
    save_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        counts = (
            "num_layers",
            "block_size",
            "sequences_per_step",
            "anchors_per_sequence",
            "steps",
            "held_out",
            "reuse",
            "selector_top_k",
        )
        for name in counts:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1.")
        if self.method not in ("dspark", "dflash2", "eagle3", "mtp"):
            raise ConfigError(f"method must be dspark, dflash2, eagle3 or mtp, not {self.method!r}.")
        if self.method == "dflash2" and self.markov_rank < 1:
            raise ConfigError("markov_rank must be at least 1 for dflash2: it is its candidate selector's rank.")
        if self.init not in ("target", "fresh"):
            raise ConfigError(f"init must be target or fresh, not {self.init!r}.")
        if self.schedule not in ("cosine", "constant"):
            raise ConfigError(f"schedule must be cosine or constant, not {self.schedule!r}.")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ConfigError(f"precision must be auto, float32 or bfloat16, not {self.precision!r}.")
        if not 0 <= self.averaging < 1:
            raise ConfigError(f"averaging must lie in [0, 1), not {self.averaging}.")

    @property
    def identity(self) -> str:
        """Identifies the result of the run: settings that only say where, how often or how fast are left out.

        So are those at their default, so that a run continues under a version of this program that has more of them.
        """
        silent = {"output", "cache_gib", "eval_every", "save_every"}
        values = [(field.name, getattr(self, field.name), field.default) for field in fields(self)]
        return repr([(name, value) for name, value, default in values if name not in silent and value != default])

    @classmethod
    def load(cls, path: Path) -> "TrainConfig":
        """Read a YAML file. Raises ConfigError if it is not a mapping of known keys."""
        values: Any = load_yaml(path)
        known = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or not {"corpus", "output"} <= set(values):
            raise ConfigError(f"{path} must give corpus and output, and may give {', '.join(sorted(known))}.")
        for name in values:
            if name not in known:
                raise ConfigError(f"{path} has the key {name!r}, which is not a setting.{suggest(str(name), known)}")
        if "target_layer_ids" in values:
            values["target_layer_ids"] = tuple(values["target_layer_ids"])
        return cls(**values)
