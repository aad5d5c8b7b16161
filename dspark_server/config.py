"""What a server is told at start. One dataclass; the command line fills it, everything below reads it."""

import json
from dataclasses import dataclass, fields
from typing import Any

from dspark_server.errors import ConfigError

METHODS = ("auto", "dspark", "dflash", "none")
SELECTIONS = ("causal", "lagged", "fixed", "threshold", "none")
DTYPES = ("auto", "bfloat16", "float32")


@dataclass(frozen=True)
class SpeculativeConfig:
    """`--speculative-config`: which drafter, and which policy chooses what the target verifies.

    Method "auto" takes the drafter that ships for the model, if there is one. `threshold` is the survival that policy
    threshold asks for; `min_user_tokens_per_second` bounds the steps of causal and lagged: every user gets that.
    """

    method: str = "auto"
    model: str | None = None
    num_speculative_tokens: int | None = None
    selection: str = "causal"
    threshold: float = 0.5
    min_user_tokens_per_second: float | None = None
    shortlist: int | None = None  # candidates a draft position is chosen from; None: the whole vocabulary
    copying: bool = True  # drafts may also come from where the same tokens stood before in prompt and answer

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"speculative method {self.method!r} is not known; choose from {', '.join(METHODS)}.")
        if self.selection not in SELECTIONS:
            raise ConfigError(f"selection {self.selection!r} is not known; choose from {', '.join(SELECTIONS)}.")
        if self.method in ("auto", "none") and self.model:
            raise ConfigError(f'method {self.method!r} takes no drafter: say {{"method": "dspark", "model": "DIR"}}.')
        if not 0 <= self.threshold <= 1:
            raise ConfigError("threshold must lie between 0 and 1.")
        if self.min_user_tokens_per_second is not None and self.min_user_tokens_per_second <= 0:
            raise ConfigError("min_user_tokens_per_second must be positive; leave it out for no floor.")
        if self.num_speculative_tokens is not None and self.num_speculative_tokens < 1:
            raise ConfigError("num_speculative_tokens must be at least 1; use method none to switch drafting off.")
        if self.shortlist is not None and self.shortlist < 1:
            raise ConfigError("shortlist must be at least 1; leave it out to draft from the whole vocabulary.")

    @classmethod
    def parse(cls, text: str) -> "SpeculativeConfig":
        """Read the JSON object given on the command line.

        Raises ConfigError for anything but an object of known keys.
        """
        try:
            values: Any = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"--speculative-config is not valid JSON: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(
                '--speculative-config must be a JSON object such as {"method": "dspark", "model": "DIR"}.'
            )
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(f"--speculative-config has unknown keys {unknown}; known are {sorted(known)}.")
        return cls(**values)


@dataclass(frozen=True)
class EngineConfig:
    """The engine's settings. Sizes are in tokens unless they say otherwise."""

    model: str = "SmolLM2-135M-Instruct"
    served_model_name: str | None = None
    dtype: str = "auto"
    max_model_len: int | None = None
    block_size: int = 16
    kv_cache_memory_bytes: int = 2 << 30
    num_blocks: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 256
    max_num_queued_reqs: int = 1024
    enable_prefix_caching: bool = True
    seed: int | None = None
    measure_costs_again: bool = False
    speculative: SpeculativeConfig = SpeculativeConfig()
    check_invariants: bool = False

    def __post_init__(self) -> None:
        for name in ("block_size", "max_num_seqs", "max_num_batched_tokens", "kv_cache_memory_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1.")
        if self.max_num_queued_reqs < 0:
            raise ConfigError("max_num_queued_reqs must not be negative.")
        if self.max_num_batched_tokens <= self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must exceed max_num_seqs "
                f"({self.max_num_seqs}): every running request takes at least one token of each step."
            )
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype {self.dtype!r} is not supported; choose from {', '.join(DTYPES)}.")
