"""An executor without a model: a virtual clock that passes advance, and drafts that survive by chance.

The production batcher, step loop and selection run on it unchanged, at any concurrency, on any machine
(ARCHITECTURE.md, decision 7). Nothing of scheduling is written here a second time.

Shapes: R drafting requests, gamma draft tokens each, a_{r,k} the chance that request r's prefix up to k survives.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dspark_server.engine.executor import DraftRequest, Rest
from dspark_server.engine.trace import Drafted, Verification
from dspark_server.errors import ConfigError
from dspark_server.runtime.batch import Run
from dspark_server.speculation.acceptance import Accepted
from dspark_server.speculation.capacity import Capacity
from dspark_server.speculation.drafter import DraftBlock
from dspark_server.speculation.noise import Streams
from dspark_server.speculation.sampling import SamplingBatch

Floats = npt.NDArray[np.float64]

# Accepted length of blocks of 7 at T = 1, the token of the target included (DSpark, table 1, Qwen3-4B).
PAPER_BLOCK = 7
PAPER_TAU = {
    "dspark": {"math": 6.11, "code": 5.38, "chat": 3.64},
    "dflash": {"math": 5.40, "code": 4.74, "chat": 3.07},
    "eagle3": {"math": 5.14, "code": 4.16, "chat": 2.39},
}
DOMAINS = ("math", "code", "chat")  # GSM8K, HumanEval, MT-Bench


@dataclass
class VirtualClock:
    """Seconds that pass only when something is done."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class SurvivalModel:
    """Where a draft token's chance to stand, given that those before it do, comes from.

    c = sigmoid(level + request_spread u_r + token_spread e_{r,k}), u and e standard normal, u kept for the request's
    life, e new for every token. Chances are what the confidence head says, so it is calibrated; the spreads make it as
    telling as the paper's (AUC 0.81 to 0.90). `informed` is False for a drafter without such a head.
    """

    level: float
    request_spread: float = 0.7
    token_spread: float = 1.4
    informed: bool = True

    @classmethod
    def of(cls, domain: str, drafter: str = "dspark") -> "SurvivalModel":
        """Calibrated to the paper's tau. Raises ConfigError for names the table does not have."""
        if drafter not in PAPER_TAU or domain not in DOMAINS:
            raise ConfigError(
                f"No acceptance is known for drafter {drafter!r} and domain {domain!r}; "
                f"choose from {', '.join(PAPER_TAU)} and {', '.join(DOMAINS)}."
            )
        model = cls(level=0.0, informed=drafter == "dspark")
        return replace(model, level=_level(PAPER_TAU[drafter][domain], model.request_spread, model.token_spread))

    def chances(self, effects: Floats, noise: Floats) -> Floats:
        """[R, gamma] chances from request effects u [R] and token noise e [R, gamma]."""
        logits = self.level + self.request_spread * effects[:, None] + self.token_spread * noise
        return np.asarray(1 / (1 + np.exp(-logits)))

    def tau(self, block: int = PAPER_BLOCK) -> float:
        """Tokens a cycle commits on average when whole blocks are verified."""
        return float(1 + self.chances(*_sample(block)).cumprod(axis=1).sum(axis=1).mean())


@lru_cache
def _sample(block: int) -> tuple[Floats, Floats]:
    """Enough requests and blocks for averages."""
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
    """What one simulated target pass held: runs, those that decode, those of them that drafted, tokens."""

    runs: int
    decoding: int
    drafting: int
    drafts: int  # draft tokens verified
    tokens: int  # all, prefill included


@dataclass
class SimulatedExecutor:
    """Implements `Executor`: passes advance `clock` by what `capacity` says they cost.

    Which draft tokens would survive is drawn when they are drafted and written into the tokens themselves, 1 or 0;
    selection sees none of them. `log` has an entry for each pass.
    """

    clock: VirtualClock
    capacity: Capacity
    survival: SurvivalModel
    gamma: int
    overhead: float = 0.0  # seconds of a sampling step outside both models
    seed: int = 0
    log: list[Pass] = field(default_factory=list)
    _drafting: int = 0
    _lengths: list[int] = field(default_factory=list)

    @property
    def block(self) -> int:
        """All of a block is the drafter's."""
        return self.gamma

    def __post_init__(self) -> None:
        self._noise = np.random.default_rng((self.seed, 1))
        self._effects = np.zeros(0)

    def draft(
        self,
        requests: list[DraftRequest],
        sampling: SamplingBatch,
        streams: Streams,
        rest: Callable[[], Rest] | None = None,
    ) -> DraftBlock:
        """Blocks of ones and zeros; `sampling.key`, a request's number, says which request effect is its own."""
        chances = self.survival.chances(
            self._effect(sampling.key.numpy()), self._noise.standard_normal((len(requests), self.gamma))
        )
        stands = self._noise.random(chances.shape) < chances
        self._drafting = len(requests)
        self.clock.now += self.capacity.draft(len(requests))
        return DraftBlock(
            tokens=torch.from_numpy(stands.astype(np.int64)),
            q=None,
            columns=None,
            confidence=None,
            survival=torch.from_numpy(chances.cumprod(axis=1)).float() if self.survival.informed else None,
            usable=torch.full((len(requests),), self.gamma),
        )

    def verify(self, runs: list[Run]) -> tuple[Tensor, list[int]]:
        """Time passes; logits are of a vocabulary of one, since `accept` asks the drafts themselves."""
        row_start = np.concatenate([[0], np.cumsum([run.logits_rows for run in runs])])
        lengths = np.array([len(run.tokens) for run in runs])
        context = np.array([run.context_len for run in runs])
        decoding = lengths == np.diff(row_start)
        tokens = int(lengths.sum())
        # A draft token sees its request's context, a prefill chunk's tokens half of the chunk too (as `Load` counts).
        pairs = float((lengths * (context + np.where(decoding, 0, lengths / 2))).sum())
        self.clock.now += float(self.capacity.raw[min(tokens, len(self.capacity.raw) - 1)])
        self.clock.now += self.capacity.attention(float(context.sum()), pairs)
        count = int(decoding.sum())
        self.log.append(Pass(len(runs), count, self._drafting, int(lengths[decoding].sum()) - count, tokens))
        self._drafting = 0
        self._lengths = lengths.tolist()
        return torch.zeros(int(row_start[-1]), 1), row_start.tolist()

    def finite_rows(self) -> list[int]:
        """All of them."""
        return self._lengths

    def accept(self, verified: Verification, drafted: Drafted | None, sampling: SamplingBatch) -> Accepted:
        """The step loop's `acceptance`: a prefix stands as far as its tokens are ones."""
        self.clock.now += self.overhead
        count = torch.zeros(len(verified.requests), dtype=torch.int64)
        if drafted:
            stood = drafted.block.tokens.cumprod(1).sum(1).minimum(torch.tensor(drafted.lengths))
            row_of = {request: row for row, request in enumerate(verified.requests)}
            count[[row_of[request] for request in drafted.requests]] = stood
        return Accepted(count, torch.zeros_like(count), torch.zeros_like(count, dtype=torch.bool))

    def _effect(self, numbers: npt.NDArray[np.int64]) -> Floats:
        """What sets requests apart, the same for a request under every policy."""
        most = int(numbers.max()) + 1
        if most > len(self._effects):
            self._effects = np.random.default_rng((self.seed, 2)).standard_normal(2 * most)
        return self._effects[numbers]
