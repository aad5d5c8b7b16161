"""Shared by the speculation tests: noise from tables, a small world to decode in, slow and obvious references."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dspark_server.speculation.noise import Purpose
from dspark_server.speculation.sampling import SamplingBatch

State = tuple[int, int]  # the last two tokens
Law = dict[tuple[int, ...], float]
Joint = dict[tuple[State, int], Law]  # by the context and the number of tokens
INF = math.inf


class TableStreams:
    """Noise looked up: uniforms by (purpose, key, position), exponentials by (key, position). Keys are row numbers."""

    def __init__(self, uniforms: dict[Purpose, Tensor] | None = None, exponentials: Tensor | None = None) -> None:
        self.uniforms = uniforms or {}
        self.exponentials = exponentials

    def uniform(self, purpose: Purpose, sampling: SamplingBatch, offsets: Tensor) -> Tensor:
        return self.uniforms[purpose][sampling.key[:, None], sampling.position[:, None] + offsets]

    def exponential(self, sampling: SamplingBatch, vocabulary: int, dtype: torch.dtype) -> Tensor:
        assert self.exponentials is not None
        return self.exponentials[sampling.key, sampling.position].to(dtype)


def reference_law(
    logits: Sequence[float], *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> list[float]:
    """One row, one filter after the other, in plain Python."""
    if temperature == 0:
        best = max(logits)
        return [1.0 if v == list(logits).index(best) else 0.0 for v in range(len(logits))]
    scaled = [x / temperature for x in logits]

    def softmax(values: list[float]) -> list[float]:
        weights = [math.exp(x - max(values)) for x in values]
        return [w / math.fsum(weights) for w in weights]

    probs = softmax(scaled)
    scaled = [x if p >= min_p * max(probs) else -INF for x, p in zip(scaled, probs, strict=True)]
    if top_k > 0:
        edge = sorted(scaled, reverse=True)[min(top_k, len(scaled)) - 1]
        scaled = [x if x >= edge else -INF for x in scaled]
    probs = softmax(scaled)
    kept = [p if math.fsum(other for other in probs if other > p) < top_p or p == max(probs) else 0.0 for p in probs]
    return [p / math.fsum(kept) for p in kept]


@dataclass(frozen=True)
class World:
    """A target that sees two tokens back, a drafter that sees one. target [V, V, V], draft [V, V]: logits, float64."""

    target: Tensor
    draft: Tensor
    gamma: int
    settings: dict[str, Any] = field(default_factory=dict)
    draft_greedy: bool = False
    _batches: dict[tuple[int, bool, bool], SamplingBatch] = field(default_factory=dict, init=False, repr=False)

    @property
    def vocabulary(self) -> int:
        return self.draft.shape[0]

    def is_broken(self, state: State) -> bool:
        """The target's row in this context is NaN."""
        return bool(self.target[state].isnan().any())

    @property
    def states(self) -> list[State]:
        return list(itertools.product(range(self.vocabulary), repeat=2))

    def p(self, state: State) -> list[float]:
        return reference_law(self.target[state].tolist(), **self.settings)

    def q(self, previous: int) -> list[float]:
        settings = {"temperature": 0.0} if self.draft_greedy else self.settings
        return reference_law(self.draft[previous].tolist(), **settings)

    def sampling(self, rows: int, *, coupled: bool = False, drafting: bool = False) -> SamplingBatch:
        """Every row a request of its own, its key its row number, its first token at position 0."""
        name = (rows, coupled, drafting and self.draft_greedy)
        if name not in self._batches:
            settings = {"temperature": 0.0} if name[2] else self.settings
            columns = {column: [value] * rows for column, value in settings.items()}
            self._batches[name] = SamplingBatch.of(
                position=[0] * rows, key=range(rows), coupled=[coupled] * rows, **columns
            )
        return self._batches[name]

    def verify_logits(self, states: Tensor, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, list[int]]:
        """The target's rows along each draft: states [n, 2], tokens [n, gamma], lengths [n] -> logits, row_start."""
        seen = torch.cat([states, tokens], dim=1)
        rows = torch.stack([self.target[seen[:, k], seen[:, k + 1]] for k in range(self.gamma + 1)], dim=1)
        wanted = torch.arange(self.gamma + 1) <= lengths[:, None]
        return rows[wanted], [0, *(lengths + 1).cumsum(0).tolist()]


def after(state: State, committed: Sequence[int]) -> State:
    first, second = (*state, *committed)[-2:]
    return first, second


def joint(step: Callable[[State], Law], state: State, length: int, known: Joint | None = None) -> Law:
    """The law of the next `length` tokens, if `step` gives the law of what each cycle commits.

    known: laws already found for the same `step`; new ones are added.
    """
    known = {} if known is None else known
    if (state, length) in known:
        return known[state, length]
    law: Law = {}
    for committed, weight in step(state).items():
        if len(committed) >= length:
            tails: Law = {(): 1.0}
        else:
            tails = joint(step, after(state, committed), length - len(committed), known)
        for tail, share in tails.items():
            tokens = (*committed, *tail)[:length]
            law[tokens] = law.get(tokens, 0.0) + weight * share
    known[state, length] = law
    return law


def distance(one: Law, other: Law) -> float:
    """Total variation."""
    return 0.5 * math.fsum(abs(one.get(key, 0.0) - other.get(key, 0.0)) for key in one.keys() | other.keys())


def worst_distance(world: World, cycles: dict[State, Law]) -> float:
    """The largest distance, over all contexts, between gamma + 1 tokens of these cycles and of the target alone."""

    def plain(state: State) -> Law:
        return {(token,): share for token, share in enumerate(world.p(state)) if share > 0}

    length, ours, its = world.gamma + 1, Joint(), Joint()
    return max(distance(joint(cycles.__getitem__, s, length, ours), joint(plain, s, length, its)) for s in cycles)


def worlds() -> dict[str, World]:
    """Contexts matter in all of them; names say what is special."""
    result: dict[str, World] = {}

    def add(name: str, v: int, gamma: int, spread: float = 1.5, **settings: Any) -> World:
        generator = torch.Generator().manual_seed(1000 * v + 10 * gamma + len(result))
        target = torch.randn(v, v, v, generator=generator, dtype=torch.float64) * spread
        draft = torch.randn(v, v, generator=generator, dtype=torch.float64) * spread
        result[name] = World(target, draft, gamma, settings)
        return result[name]

    def swap(name: str, **changes: Any) -> None:
        result[name] = replace(result[name], **changes)

    for v, gamma in ((2, 1), (2, 3), (3, 2), (4, 1), (4, 3)):
        add(f"V{v}-gamma{gamma}", v, gamma)
    add("temperature", 3, 2, temperature=0.5)
    add("hot", 3, 2, temperature=2.0)
    add("top-k", 4, 2, top_k=2)
    add("top-p", 4, 2, top_p=0.75)
    add("min-p", 4, 2, min_p=0.3)
    add("all-filters", 4, 2, temperature=1.5, top_k=3, top_p=0.875, min_p=0.0625)
    opposed = add("opposed", 3, 2, spread=3.0)
    swap("opposed", draft=-opposed.target[0])
    same = add("drafter-is-target", 3, 2)
    swap("drafter-is-target", target=same.draft.expand(3, 3, 3).clone())
    holes = add("zeros-and-one-hots", 3, 3)
    holes.target[0, :, 1], holes.target[1, 2, :2], holes.draft[0, 0], holes.draft[1, 1:] = -INF, -INF, -INF, -INF
    add("disjoint-supports", 4, 2)
    result["disjoint-supports"].target[..., :2] = -INF
    result["disjoint-supports"].draft[0, 2:] = -INF
    add("greedy-drafter", 3, 2)
    swap("greedy-drafter", draft_greedy=True)
    return result
