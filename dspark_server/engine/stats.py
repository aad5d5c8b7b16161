"""Counters the step thread keeps and /metrics reads. Plain numbers: reading them takes no lock."""

from collections import Counter, deque
from dataclasses import dataclass, field

from dspark_server.engine.gain import Gain
from dspark_server.speculation.trust import Trust

SURVIVAL_BINS = 10  # of the predicted survival of verified draft tokens


@dataclass
class SurvivalBin:
    """Verified draft tokens whose predicted survival lies in one tenth of [0, 1]."""

    judged: int = 0
    predicted: float = 0.0  # sum of the predicted survivals
    survived: int = 0


@dataclass
class EngineStats:
    """Monotone counters since start, and gauges of the last step. Lengths in tokens, times in seconds."""

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    steps: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    failed_drafts: int = 0  # times the drafter raised; the step then runs without a draft
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_per_position: list[int] = field(default_factory=list)
    # Of the requests that could draft, each step: "drafted", "copied" from their own context or "skipped".
    drafting: Counter[str] = field(default_factory=Counter)
    # Verified and accepted tokens of the drafter, by the least power of two that the context does not exceed.
    judged_by_context: Counter[int] = field(default_factory=Counter)
    accepted_by_context: Counter[int] = field(default_factory=Counter)
    budgets: Counter[int] = field(default_factory=Counter)  # of them, number with 1 + l tokens verified
    survival: list[SurvivalBin] = field(default_factory=lambda: [SurvivalBin() for _ in range(SURVIVAL_BINS)])
    seconds: dict[str, float] = field(default_factory=lambda: {"draft": 0.0, "verify": 0.0, "host": 0.0})  # of steps
    gain: Gain = field(default_factory=Gain)  # of drafting, where there is a cost table
    verify_seconds: dict[int, float] = field(default_factory=dict)  # selection's estimate of a pass over B tokens
    step_slowdown: float = 1.0  # recent seconds of steps, relative to the profile measured at start
    slow_steps: bool = False  # the slowdown has been above 5 for some seconds
    trust: Trust = field(default_factory=Trust)  # live acceptance against calibration
    # Drained by the metrics reader; bounded so that an unread server does not grow.
    queue_times: deque[float] = field(default_factory=lambda: deque(maxlen=100_000))
    iteration_tokens: deque[int] = field(default_factory=lambda: deque(maxlen=100_000))
