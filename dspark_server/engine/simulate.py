"""An executor without a model: passes advance a virtual clock, and draft tokens are accepted at random.

The production batcher, step loop and selection run on it unchanged, at any concurrency, on any machine
(ARCHITECTURE.md, decision 7). No scheduling is reimplemented here.

Shapes: R drafting requests, gamma draft tokens each, a_{r,k} the probability that request r's prefix up to k survives.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dspark_server.engine.executor import Budget, Clock, row_starts, with_drafts
from dspark_server.engine.trace import Verification
from dspark_server.errors import ConfigError
from dspark_server.runtime.batch import Run
from dspark_server.speculation.acceptance import Accepted
from dspark_server.speculation.cost_model import CostModel
from dspark_server.speculation.draft_block import DraftBlock, DraftRequest
from dspark_server.speculation.noise import Streams
from dspark_server.speculation.sampling import SamplingBatch

Floats = npt.NDArray[np.float64]

# Acceptance length of blocks of 7 at T = 1, the token of the target included (DSpark, table 1, Qwen3-4B).
PAPER_BLOCK = 7
PAPER_TAU = {
    "dspark": {"math": 6.11, "code": 5.38, "chat": 3.64},
    "dflash": {"math": 5.40, "code": 4.74, "chat": 3.07},
    "eagle3": {"math": 5.14, "code": 4.16, "chat": 2.39},
}
DOMAINS = ("math", "code", "chat")  # GSM8K, HumanEval, MT-Bench


_MIDDLES = np.array([NormalDist().inv_cdf((i + 0.5) / 64) for i in range(64)])  # of 64 equal parts of token noise


@dataclass
class VirtualClock:
    """A clock in seconds that only simulated work advances."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class SurvivalModel:
    """Model of a draft token's acceptance probability c, given that those before it are accepted.

    c = sigmoid(level + request_spread u_r + token_spread e_{r,k}), u and e standard normal, u kept for the request's
    life, e new for every token. The confidence head reports c, so it is calibrated; the spreads make it as informative
    as the paper's (AUC 0.81 to 0.90). `informed` is False for a drafter without such a head.
    """

    level: float
    request_spread: float = 0.7
    token_spread: float = 1.4
    informed: bool = True

    @classmethod
    def of(cls, domain: str, drafter: str = "dspark") -> "SurvivalModel":
        """A model calibrated to the paper's tau. Raises ConfigError for names that the table does not have."""
        if drafter not in PAPER_TAU or domain not in DOMAINS:
            raise ConfigError(
                f"No acceptance is known for drafter {drafter!r} and domain {domain!r}; "
                f"choose from {', '.join(PAPER_TAU)} and {', '.join(DOMAINS)}."
            )
        model = cls(level=0.0, informed=drafter == "dspark")
        return replace(model, level=_level(PAPER_TAU[drafter][domain], model.request_spread, model.token_spread))

    def chances(self, effects: Floats, noise: Floats) -> Floats:
        """Acceptance probabilities c [R, gamma] from request effects u [R] and token noise e [R, gamma]."""
        logits = self.level + self.request_spread * effects[:, None] + self.token_spread * noise
        return np.asarray(1 / (1 + np.exp(-logits)))

    def rates(self, effects: Floats) -> Floats:
        """Mean acceptance probabilities [R] of requests of effects u [R], over token noise."""
        noise = np.tile(_MIDDLES, (len(effects), 1))
        return np.asarray(self.chances(effects, noise).mean(axis=1))

    def tau(self, block: int = PAPER_BLOCK) -> float:
        """Mean number of tokens that a cycle commits when whole blocks are verified."""
        return float(1 + self.chances(*_sample(block)).cumprod(axis=1).sum(axis=1).mean())


@lru_cache
def _sample(block: int) -> tuple[Floats, Floats]:
    """Request effects and token noise, enough of them for averages."""
    rng = np.random.default_rng(20260601)
    return rng.standard_normal(20_000), rng.standard_normal((20_000, block))


@lru_cache
def _level(tau: float, request_spread: float, token_spread: float) -> float:
    """The level at which blocks of the paper's length commit `tau` tokens, by bisection."""
    low, high = -10.0, 10.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        below = SurvivalModel(middle, request_spread, token_spread).tau() < tau
        low, high = (middle, high) if below else (low, middle)
    return low


@dataclass(frozen=True)
class Pass:
    """Contents of one simulated target pass: runs, those that decode, those of them that drafted, tokens."""

    runs: int
    decoding: int
    drafting: int
    drafts: int  # draft tokens verified
    tokens: int  # all, prefill included


@dataclass
class SimulatedExecutor:
    """Implements `Executor`: passes advance `clock` by their cost in `cost_model`.

    A draft token is 1 if it would be accepted, else 0, drawn when it is drafted; selection sees no token. `log` has an
    entry for each pass.
    """

    clock: VirtualClock
    cost_model: CostModel
    survival: SurvivalModel
    gamma: int
    overhead: float = 0.0  # seconds of a sampling step outside draft and pass
    seed: int = 0
    jitter: float = 0.0  # standard deviation of the log of the seconds of a draft or pass
    log: list[Pass] = field(default_factory=list)

    @property
    def block(self) -> int:
        """The drafter makes whole blocks."""
        return self.gamma

    @property
    def recorded(self) -> tuple[Sequence[int], Sequence[int]]:
        """Of the costs that passes have."""
        return self.cost_model.profile.recorded, self.cost_model.profile.recorded_drafts

    def __post_init__(self) -> None:
        self.noise = np.random.default_rng((self.seed, 1))
        self._jitter = np.random.default_rng((self.seed, 4))
        self._effects = np.zeros(0)

    def cycle(self, runs: list[Run], streams: Streams, clock: Clock) -> "SimulatedCycle":
        """A step by the virtual clock."""
        return SimulatedCycle(self, runs)

    def accept(self, verified: Verification, block: DraftBlock | None, sampling: SamplingBatch) -> Accepted:
        """The step loop's `acceptance`: accepts the leading ones of each prefix."""
        self.clock.now += self.overhead
        count = np.zeros(len(verified.requests), dtype=np.int64)
        if block:
            leading = block.tokens.numpy().cumprod(axis=1).sum(axis=1)
            rows = np.array(verified.rows)
            count = np.where(rows < 0, 0, np.minimum(leading, block.lengths)[rows])
        none = np.zeros_like(count)
        return Accepted(*map(torch.from_numpy, (count, none, none.astype(np.bool_))))

    def spend(self, seconds: float) -> float:
        """Advance the clock by the seconds of a draft or pass, with jitter; returns them."""
        took = seconds * (math.exp(self.jitter * self._jitter.standard_normal()) if self.jitter else 1.0)
        self.clock.now += took
        return took

    def effect(self, numbers: npt.NDArray[np.int64]) -> Floats:
        """Request effects u [R]: the same for a request under every policy."""
        most = int(numbers.max()) + 1
        if most > len(self._effects):
            self._effects = np.random.default_rng((self.seed, 2)).standard_normal(2 * most)
        return self._effects[numbers]


class SimulatedCycle:
    """A step that advances the executor's clock."""

    def __init__(self, executor: SimulatedExecutor, runs: list[Run]) -> None:
        self._executor = executor
        self._runs = runs
        self._drafting = 0
        self._draft = self._pass = 0.0

    @property
    def seconds(self) -> tuple[float, float]:
        return self._draft, self._pass

    def draft(
        self, requests: Sequence[DraftRequest], sampling: SamplingBatch, budget: Budget | None = None
    ) -> DraftBlock:
        """Blocks of ones and zeros; `sampling.key`, a request's number, is the index of its request effect."""
        executor, self._drafting = self._executor, len(requests)
        noise = executor.noise.standard_normal((len(requests), executor.gamma))
        chances = executor.survival.chances(executor.effect(sampling.key.numpy()), noise)
        stands = executor.noise.random(chances.shape) < chances
        self._draft = executor.spend(executor.cost_model.draft(len(requests)))
        informed = executor.survival.informed
        return DraftBlock(
            tokens=torch.from_numpy(stands.astype(np.int64)),
            usable=torch.from_numpy(np.full(len(requests), executor.gamma)),
            survival=torch.from_numpy(chances.cumprod(axis=1).astype(np.float32)) if informed else None,
            has_confidence=informed,
            requests=requests,
        )

    def verify(self, block: DraftBlock | None) -> tuple[Tensor, list[int]]:
        """Advance the clock; logits are of a vocabulary of one, since `accept` reads the drafts themselves."""
        executor = self._executor
        self._runs = with_drafts(self._runs, block)
        decoding = verified = context = tokens = 0
        pairs = 0.0
        for run in self._runs:
            length = len(run.tokens)
            tokens += length
            context += run.context_len
            pairs += length * run.context_len
            if length == run.logits_rows:
                decoding += 1
                verified += length
            else:  # a chunk's tokens see half of the chunk too (as `Load` counts)
                pairs += length * length / 2
        cost = float(executor.cost_model.raw[min(tokens, len(executor.cost_model.raw) - 1)])
        self._pass = executor.spend(cost + executor.cost_model.attention(context, pairs))
        executor.log.append(Pass(len(self._runs), decoding, self._drafting, verified - decoding, tokens))
        starts = row_starts(self._runs)
        return torch.zeros(starts[-1], 1), starts

    def accept(
        self,
        logits: Tensor,
        row_start: Sequence[int],
        block: DraftBlock | None,
        rows: Sequence[int],
        sampling: SamplingBatch,
    ) -> Accepted:
        raise AssertionError("the step loop takes `SimulatedExecutor.accept`")

    def finite_rows(self) -> list[int]:
        """All tokens of each run."""
        return [len(run.tokens) for run in self._runs]
