"""Exact enumeration of the acceptance rules (DSPARK.md, "Losslessness"): the production code, every draw, float64.

Every number of noise is used through thresholds, so its range falls into cells with exact weights; production is run
at a representative of each cell. The law of what one cycle commits, continued by the target, must be the target's.
Each combination of cells is one request of a single large batch; its index travels as the sampling key.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from dspark_kernels import Kernels, load
from numpy.typing import NDArray
from torch import Tensor

from dspark_server.speculation.acceptance import accept
from dspark_server.speculation.controls import Control
from dspark_server.speculation.draft_block import DraftBlock
from dspark_server.speculation.law import distribution, sample
from dspark_server.speculation.noise import Purpose
from dspark_server.speculation.sampling import SamplingBatch

Law = NDArray[np.float64]
Context = tuple[int, ...]


@dataclass
class Tables:
    """Noise by (request, slot): the seam that production fills from counters."""

    coins: Tensor  # [R, gamma]
    last: Tensor  # [R, gamma + 1]
    exponentials: Tensor  # [R, gamma + 1, V]

    def uniform(self, purpose: Purpose, sampling: SamplingBatch, offsets: Tensor) -> Tensor:
        table = self.coins if purpose is Purpose.COIN else self.last
        return table[sampling.key][:, offsets]

    def exponential(self, sampling: SamplingBatch, vocabulary: int, dtype: torch.dtype) -> Tensor:
        return self.exponentials[sampling.key, sampling.position].to(dtype)


class Pair:
    """A target and a draft model: tables of laws that depend on all tokens of the block so far."""

    def __init__(self, vocabulary: int, gamma: int, seed: int, kind: str) -> None:
        source = np.random.default_rng(seed)
        self.vocabulary, self.gamma = vocabulary, gamma
        self.p: dict[Context, Law] = {}
        self.q: dict[Context, Law] = {}
        for length in range(gamma + 1):
            for context in itertools.product(range(vocabulary), repeat=length):
                p, q = source.dirichlet(np.ones(vocabulary)), source.dirichlet(np.ones(vocabulary))
                if kind == "zeros":
                    p[source.integers(vocabulary)] = 0.0
                    q[source.integers(vocabulary)] = 0.0
                if kind == "opposed":
                    p, q = np.sort(p) ** 2, np.sort(q)[::-1] ** 2
                if kind == "equal":
                    q = p
                if kind == "certain":
                    q = np.eye(vocabulary)[source.integers(vocabulary)]
                self.p[context], self.q[context] = p / p.sum(), q / q.sum()
        self.said = self.p  # the target's laws before the request's own rules, where it has any
        self.controls: Control | None = None
        self.filters: dict[str, float] = {}

    def target_law(self, context: Context) -> float:
        """Chance that the target says exactly this."""
        return float(np.prod([self.p[context[:k]][token] for k, token in enumerate(context)]))


def logits(laws: list[Law]) -> Tensor:
    with np.errstate(divide="ignore"):
        return torch.from_numpy(np.log(np.stack(laws)))


def batch(
    size: int, *, coupled: bool, controls: Control | None = None, filters: dict[str, float] | None = None
) -> SamplingBatch:
    return SamplingBatch.of(
        position=[0] * size,
        key=list(range(size)),
        coupled=[coupled] * size,
        temperature=[1.0] * size,
        controls=[controls] * size,
        **{name: [value] * size for name, value in (filters or {}).items()},
    )


def total_variation(pair: Pair, committed: dict[Context, float]) -> float:
    """Distance of the committed law, continued by the target to gamma + 1 tokens, from the target's."""
    length = pair.gamma + 1
    distance = 0.0
    for whole in itertools.product(range(pair.vocabulary), repeat=length):
        mass = 0.0
        for cut in range(1, length + 1):
            rest = [pair.p[whole[:k]][whole[k]] for k in range(cut, length)]
            mass += committed.get(whole[:cut], 0.0) * float(np.prod(rest))
        distance += abs(mass - pair.target_law(whole))
    return distance / 2


Lengths = Callable[[Context], int]


def judge(
    pair: Pair,
    drafts: list[Context],
    weights: list[float],
    tables: Tables,
    lengths: Lengths,
    *,
    coupled: bool,
    kernels: Kernels | None = None,
    jointly: bool = False,
) -> dict[Context, float]:
    """Run production acceptance over all combinations at once; the law of what it commits.

    With `kernels` in float32, as they have it: the weights stay exact, and no cell's representative is at its edge.
    """
    rows: list[Law] = []
    row_start, kept = [0], []
    length = {draft: lengths(draft) for draft in dict.fromkeys(drafts)}
    for draft in drafts:
        kept.append(length[draft])
        rows += [pair.said[draft[:k]] for k in range(kept[-1] + 1)]
        row_start.append(len(rows))
    q = torch.from_numpy(np.stack([[pair.q[d[:k]] for k in range(pair.gamma)] for d in drafts]))
    precision = torch.float64 if kernels is None else torch.float32
    block = DraftBlock.of(torch.tensor(drafts), q.to(precision))
    sampling = batch(len(drafts), coupled=coupled, controls=pair.controls, filters=pair.filters)
    said_by = logits(rows).to(precision)
    result = accept(said_by, row_start, block, range(len(drafts)), sampling, tables, kernels, jointly=jointly)
    assert not result.failed.any()
    committed: dict[Context, float] = {}
    for draft, weight, count, token in zip(drafts, weights, result.count.tolist(), result.token.tolist(), strict=True):
        said = (*draft[:count], token)
        committed[said] = committed.get(said, 0.0) + weight
    return committed


def ratio_law(pair: Pair, lengths: Lengths, kernels: Kernels | None = None) -> dict[Context, float]:
    """Every draft, every pattern of coins, every cell of the last draw."""
    drafts, weights, coins, last = [], [], [], []
    for draft in itertools.product(range(pair.vocabulary), repeat=pair.gamma):
        chance = float(np.prod([pair.q[draft[:k]][token] for k, token in enumerate(draft)]))
        length = lengths(draft)
        if chance == 0.0:
            continue
        accepts = [min(1.0, pair.p[draft[:k]][x] / pair.q[draft[:k]][x]) for k, x in enumerate(draft)]
        for kept in range(length + 1):  # the first rejection is at slot `kept`, or nowhere
            coin = [a / 2 for a in accepts]
            weight = chance * float(np.prod(accepts[:kept]))
            cells = pair.p[draft[:kept]]
            if kept < length:
                coin[kept] = (1 + accepts[kept]) / 2
                weight *= 1 - accepts[kept]
                cells = np.maximum(cells - pair.q[draft[:kept]], 0)
            if weight == 0.0:
                continue
            edges = np.concatenate([[0], np.cumsum(cells / cells.sum())])
            for low, high in itertools.pairwise(edges):
                drafts.append(draft)
                weights.append(weight * (high - low))
                coins.append(coin)
                last.append([(low + high) / 2] * (pair.gamma + 1))
    empty = torch.empty(0)
    tables = Tables(torch.tensor(coins, dtype=torch.float64), torch.tensor(last, dtype=torch.float64), empty)
    return judge(pair, drafts, weights, tables, lengths, coupled=False, kernels=kernels)


def block_law(pair: Pair, lengths: Lengths, kernels: Kernels | None = None) -> dict[Context, float]:
    """The same of the block rule: the last coin that falls below its bound decides."""
    drafts, weights, coins, last = [], [], [], []
    for draft in itertools.product(range(pair.vocabulary), repeat=pair.gamma):
        chance = float(np.prod([pair.q[draft[:k]][token] for k, token in enumerate(draft)]))
        length = lengths(draft)
        if chance == 0.0:
            continue
        joint, bounds = [1.0], [1.0]  # P_i, and h_i; of node 0, which needs no coin
        for node in range(1, length + 1):
            before, x = draft[: node - 1], draft[node - 1]
            joint.append(min(1.0, joint[-1] * pair.p[before][x] / pair.q[before][x]))
            left = (
                np.maximum(joint[-1] * pair.p[draft[:node]] - pair.q[draft[:node]], 0).sum() if node < length else 0.0
            )
            rest = left + 1 - joint[-1]
            bounds.append(joint[-1] if node == length else left / rest if rest > 0 else 1.0)
        for kept in range(length + 1):
            weight = chance * bounds[kept] * float(np.prod([1 - bound for bound in bounds[kept + 1 :]]))
            cells = pair.p[draft[:kept]]
            if kept < length:
                cells = np.maximum(joint[kept] * cells - pair.q[draft[:kept]], 0)
            if weight == 0.0 or cells.sum() == 0.0:
                continue
            coin = [0.5] * pair.gamma  # of nodes before the last, whatever they say
            coin[kept:length] = [(1 + bound) / 2 for bound in bounds[kept + 1 :]]
            if kept:
                coin[kept - 1] = bounds[kept] / 2
            edges = np.concatenate([[0], np.cumsum(cells / cells.sum())])
            for low, high in itertools.pairwise(edges):
                drafts.append(draft)
                weights.append(weight * (high - low))
                coins.append(coin)
                last.append([(low + high) / 2] * (pair.gamma + 1))
    tables = Tables(torch.tensor(coins, dtype=torch.float64), torch.tensor(last, dtype=torch.float64), torch.empty(0))
    return judge(pair, drafts, weights, tables, lengths, coupled=False, kernels=kernels, jointly=True)


def race_cells(p: Law, q: Law) -> list[tuple[int, int, float, Law]]:
    """Cells of exponential noise by (y = argmin E/p, x = argmin E/q): y, x, exact chance, a representative E.

    P(i, i) = 1 / sum_v max(p_v/p_i, q_v/q_i); for y = j and x = i the chance is the integral of
    (1 + r + sum_v max(p_v/p_j, r q_v/q_i))^-2 over r = E_i/E_j from p_i/p_j to q_i/q_j, rational between its kinks.
    """
    cells = []
    tokens = range(len(p))
    for j, i in itertools.product(tokens, tokens):
        if p[j] == 0 or q[i] == 0:
            continue
        others = [v for v in tokens if v not in (i, j)]
        a, b = p / p[j], q / q[i]
        if i == j:
            noise = 1.5 * np.maximum(a, b) + 1e-3
            noise[i] = 1.0
            cells.append((j, i, 1 / np.maximum(a, b).sum(), noise))
            continue
        low, high = a[i], np.inf if q[j] == 0 else q[i] / q[j]
        if high <= low:
            continue
        kinks = sorted(a[v] / b[v] for v in others if b[v] > 0 and low < a[v] / b[v] < high)
        chance = 0.0
        for left, right in itertools.pairwise([low, *kinks, high]):
            middle = left + 1 if right == np.inf else (left + right) / 2
            constant = 1 + sum(a[v] for v in others if a[v] >= middle * b[v])
            slope = 1 + sum(b[v] for v in others if a[v] < middle * b[v])
            chance += (1 / (constant + slope * left) - 1 / (constant + slope * right)) / slope
        r = low + 1 if high == np.inf else (low + high) / 2
        noise = 1.5 * np.maximum(a, r * b) + 1e-3
        noise[j], noise[i] = 1.0, r
        cells.append((j, i, chance, noise))
    return cells


def coupled_law(pair: Pair, lengths: Lengths) -> dict[Context, float]:
    """Every cell of the noise that draft and target share, slot by slot."""
    drafts, weights, noise = [], [], []

    def extend(draft: Context, weight: float, rows: list[Law]) -> None:
        slot = len(draft)
        if slot == pair.gamma:  # the bonus slot: the target's draw alone matters
            for y, _, chance, row in race_cells(pair.p[draft], pair.p[draft]):
                assert y == _
                drafts.append(draft)
                weights.append(weight * chance)
                noise.append([*rows, row])
            return
        for _, x, chance, row in race_cells(pair.p[draft], pair.q[draft]):
            extend((*draft, x), weight * chance, [*rows, row])

    extend((), 1.0, [])
    table = torch.from_numpy(np.stack([np.stack(rows) for rows in noise]))
    sampling = batch(len(drafts), coupled=True)
    tables = Tables(torch.empty(0), torch.empty(0), table)
    for slot in range(pair.gamma):  # the draft's own code draws what the cells say
        rows = logits([pair.q[draft[:slot]] for draft in drafts])
        drawn, _ = sample(rows, sampling.ahead(slot), torch.zeros(len(drafts)), tables)
        assert drawn.tolist() == [draft[slot] for draft in drafts]
    assert sum(weights) == pytest.approx(1, abs=1e-12)
    return judge(pair, drafts, weights, tables, lengths, coupled=True)


KINDS = ("random", "zeros", "opposed", "equal", "certain")
LAWS = {
    "ratio": ratio_law,
    "coupled": coupled_law,
    "ratio in native kernels": partial(ratio_law, kernels=load("native")),
    "ratio in reference kernels": partial(ratio_law, kernels=load("reference")),
    "block": block_law,
    "block in native kernels": partial(block_law, kernels=load("native")),
    "block in reference kernels": partial(block_law, kernels=load("reference")),
}


@pytest.mark.parametrize("rule", LAWS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("vocabulary", "gamma"), [(2, 1), (2, 2), (2, 3), (3, 1), (3, 2), (3, 3), (4, 1), (4, 2)])
def test_the_joint_law_is_the_targets(rule: str, kind: str, vocabulary: int, gamma: int) -> None:
    for seed in range(3):
        pair = Pair(vocabulary, gamma, seed, kind)
        committed = LAWS[rule](pair, lambda draft: gamma)
        assert sum(committed.values()) == pytest.approx(1, abs=1e-12)
        assert total_variation(pair, committed) <= 1e-12


@pytest.mark.parametrize("rule", LAWS)
def test_a_prefix_chosen_by_earlier_tokens_keeps_the_law(rule: str) -> None:
    """Non-anticipating: position k is kept or not by what stands before it."""

    def lengths(draft: Context) -> int:
        return 0 if pair.p[()][0] > 0.5 else 1 if draft[0] == 0 else 2 if draft[1] == 1 else 3

    for seed in range(4):
        pair = Pair(2, 3, seed, "opposed")
        assert total_variation(pair, LAWS[rule](pair, lengths)) <= 1e-12


FILTERS: dict[str, Callable[[Law], NDArray[np.bool_]]] = {
    "top_k": lambda p: p >= np.sort(p)[-2],
    "top_p": lambda p: np.array([p[p > one].sum() < np.float32(0.7) for one in p]),
    "min_p": lambda p: p >= np.float32(0.4) * p.max(),
}


@pytest.mark.parametrize("rule", LAWS)
@pytest.mark.parametrize("names", [("top_k",), ("top_p",), ("min_p",), ("min_p", "top_k", "top_p")])
def test_the_joint_law_is_the_filtered_targets(rule: str, names: tuple[str, ...]) -> None:
    """The target after its filters, however the draft was filtered."""
    values = {"top_k": 2, "top_p": 0.7, "min_p": 0.4}
    for seed in range(3):
        pair = Pair(4, 2, seed, "random")
        pair.filters = {name: values[name] for name in names}
        pair.said, pair.p = pair.p, dict(pair.p)
        for context, p in pair.said.items():
            for name in names:
                p = np.where(FILTERS[name](p), p, 0.0)
                p /= p.sum()
            pair.p[context] = p
            kept = pair.q[context] * (p > 0)
            if seed and kept.sum() > 0.5:
                pair.q[context] = kept / kept.sum()
        assert total_variation(pair, LAWS[rule](pair, lambda draft: 2)) <= 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_the_block_rule_accepts_no_less(kind: str) -> None:
    """In expectation, and more where a later token makes up for an earlier one."""
    gained = []
    for seed in range(4):
        pair = Pair(3, 3, seed, kind)
        kept = {}
        for name in ("ratio", "block"):
            committed = LAWS[name](pair, lambda draft: 3)
            kept[name] = sum(weight * len(said) for said, weight in committed.items())
        gained.append(kept["block"] - kept["ratio"])
    assert min(gained) >= -1e-12
    assert (max(gained) > 0.01) == (kind in ("random", "zeros", "opposed"))


def test_a_retrospective_prefix_breaks_the_ratio_rule() -> None:
    """Appendix A: p = (.7, .3), q = (.5, .5), x_1 decides whether x_1 is verified at all: A comes out with 17/20."""
    pair = Pair(2, 2, 0, "random")
    for context in pair.p:
        pair.p[context], pair.q[context] = np.array([0.7, 0.3]), np.array([0.5, 0.5])
    committed = ratio_law(pair, lambda draft: 2 if draft[0] == 0 else 0)
    first = sum(weight for said, weight in committed.items() if said[0] == 0)
    assert first == pytest.approx(17 / 20, abs=1e-12)
    honest = ratio_law(pair, lambda draft: 2)
    assert sum(w for said, w in honest.items() if said[0] == 0) == pytest.approx(7 / 10, abs=1e-12)


@pytest.mark.parametrize("options", [{"temperature": 0.6}, {"top_k": 2}, {"top_p": 0.7}, {"min_p": 0.4}])
def test_filters_give_the_obvious_law(options: dict[str, float]) -> None:
    p = np.array([0.1, 0.35, 0.3, 0.25])
    one = SamplingBatch.of(position=[0], key=[0], **{name: [value] for name, value in options.items()})
    ours = distribution(logits([p]), one)[0].numpy()
    wanted = {
        "temperature": p ** (1 / np.float64(np.float32(0.6))),
        "top_k": np.array([0, 0.35, 0.3, 0]),
        "top_p": np.array([0, 0.35, 0.3, 0.25]),
        "min_p": np.array([0, 0.35, 0.3, 0.25]),
    }[next(iter(options))]
    np.testing.assert_allclose(ours, wanted / wanted.sum(), atol=1e-9)
