"""Counters the step thread keeps and /metrics reads. Plain numbers: reading them takes no lock."""

from collections import deque
from dataclasses import dataclass, field


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
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_per_position: list[int] = field(default_factory=list)
    # Drained by the metrics reader; bounded so that an unread server does not grow.
    queue_times: deque[float] = field(default_factory=lambda: deque(maxlen=100_000))
    iteration_tokens: deque[int] = field(default_factory=lambda: deque(maxlen=100_000))
