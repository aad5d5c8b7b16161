"""Sampling: from logits to the law a request asked for, from that law to a token, and where the noise comes from.

Shapes: R requests, N rows of logits (one row predicts one token), V vocabulary, F forbidden tokens, K offsets.
Three rules (DSPARK.md, "Losslessness"), chosen per request:

- greedy: temperature below `GREEDY_BELOW`; the law is one-hot.
- ratio: sampled, unseeded; tokens are drawn by inverse CDF, drafts are tested with min(1, p/q).
- coupled: sampled, seeded; a token is argmax(log p + Gumbel noise), the noise shared by draft and target.

Filters follow vLLM (v1/sample): forbidden tokens out, temperature, min-p, top-k, top-p, each on what the ones before
it left. Where vLLM breaks a tie at the edge of top-p by sort order, we keep both tokens, as it and we do for top-k:
the law of a row then depends on nothing but the row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, IntEnum
from functools import cached_property, lru_cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GREEDY_BELOW = 1e-5  # vLLM's _SAMPLING_EPS: below it, dividing by the temperature only overflows
NUCLEUS_WIDTHS = (256, 4096)  # top-p first looks among this many best tokens; only then at the whole vocabulary


class Rule(Enum):
    """How a request's tokens are drawn and its drafts accepted."""

    GREEDY = "greedy"
    RATIO = "ratio"
    COUPLED = "coupled"


class Purpose(IntEnum):
    """What a piece of noise is for. Streams of different purposes are independent (a word of the Philox counter)."""

    DRAFT = 1
    COIN = 2
    RESIDUAL = 3  # the token that ends a cycle: residual, bonus, or plain sampling
    GUMBEL = 4


@dataclass(frozen=True)
class Forbidden:
    """`tokens` (ids) may not appear before absolute position `until` (min_tokens, for end-of-sequence ids)."""

    tokens: tuple[int, ...]
    until: int


@dataclass(frozen=True)
class Traits:
    """What some row of a batch may ask for: decided once, in Python, so that steps take fast paths without syncs.

    A subset of a batch inherits the traits, so True means "perhaps", False means "certainly not".
    """

    rules: frozenset[Rule]
    tempered: bool  # a sampled row whose temperature is not 1
    top_k: bool
    top_p: bool
    min_p: bool


@dataclass(frozen=True, eq=False)
class SamplingBatch:
    """How to sample, a struct of arrays, one row per request (or per row of logits, after `select`).

    temperature [R] f32 (0 = greedy), top_k [R] i64 (0 = off), top_p [R] f32 (1 = off), min_p [R] f32 (0 = off),
    coupled [R] bool, key [R] i64 (the user's seed if coupled, else a private random nonce of this choice),
    choice [R] i64 (index among n), position [R] i64 (absolute position of the first token this step may produce: the
    anchor's + 1), draft_number [R] i64 (counts every draft of the request, discarded ones too), forbidden: one entry
    per row, or empty if no row forbids anything.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    coupled: Tensor
    key: Tensor
    choice: Tensor
    position: Tensor
    draft_number: Tensor
    traits: Traits
    forbidden: tuple[Forbidden | None, ...] = field(default=())

    @classmethod
    def of(
        cls,
        *,
        position: Sequence[int],
        key: Sequence[int],
        temperature: Sequence[float] | None = None,
        top_k: Sequence[int] | None = None,
        top_p: Sequence[float] | None = None,
        min_p: Sequence[float] | None = None,
        coupled: Sequence[bool] | None = None,
        choice: Sequence[int] | None = None,
        draft_number: Sequence[int] | None = None,
        forbidden: Sequence[Forbidden | None] | None = None,
        device: torch.device | str = "cpu",
    ) -> "SamplingBatch":
        """Build from one Python number per request; what is left out is off (temperature 1, choice 0, draft 0)."""
        size = len(position)
        temperature = temperature or [1.0] * size
        coupled = coupled or [False] * size
        top_k, top_p, min_p = top_k or [0] * size, top_p or [1.0] * size, min_p or [0.0] * size
        rules = [_rule(t, c) for t, c in zip(temperature, coupled, strict=True)]
        traits = Traits(
            rules=frozenset(rules),
            tempered=any(t != 1.0 and rule is not Rule.GREEDY for t, rule in zip(temperature, rules, strict=True)),
            top_k=any(k > 0 for k in top_k),
            top_p=any(p < 1 for p in top_p),
            min_p=any(p > 0 for p in min_p),
        )

        def column(values: Sequence[float], dtype: torch.dtype) -> Tensor:
            assert len(values) == size, f"{len(values)} values for {size} requests"
            return torch.tensor(values, dtype=dtype, device=device)

        return cls(
            # Exactly 0, so that the tensor and the traits cannot disagree about a row at the edge.
            temperature=column([0.0 if t < GREEDY_BELOW else t for t in temperature], torch.float32),
            top_k=column(top_k, torch.int64),
            top_p=column(top_p, torch.float32),
            min_p=column(min_p, torch.float32),
            coupled=column(coupled, torch.bool),
            key=column([_signed(k) for k in key], torch.int64),
            choice=column(choice or [0] * size, torch.int64),
            position=column(position, torch.int64),
            draft_number=column(draft_number or [0] * size, torch.int64),
            traits=traits,
            forbidden=tuple(forbidden) if forbidden and any(forbidden) else (),
        )

    def __len__(self) -> int:
        return self.temperature.shape[0]

    @property
    def all_greedy(self) -> bool:
        return self.traits.rules == {Rule.GREEDY}

    @cached_property
    def greedy(self) -> Tensor:
        """[R] bool."""
        return self.temperature == 0

    def select(self, indices: Tensor, offset: int | Tensor = 0) -> "SamplingBatch":
        """Rows `indices` [N] i64, `offset` (scalar or [N]) positions further on."""
        forbidden = tuple(self.forbidden[i] for i in indices.tolist()) if self.forbidden else ()
        return SamplingBatch(
            temperature=self.temperature[indices],
            top_k=self.top_k[indices],
            top_p=self.top_p[indices],
            min_p=self.min_p[indices],
            coupled=self.coupled[indices],
            key=self.key[indices],
            choice=self.choice[indices],
            position=self.position[indices] + offset,
            draft_number=self.draft_number[indices],
            traits=self.traits,
            forbidden=forbidden,
        )

    def ahead(self, offset: int) -> "SamplingBatch":
        """The same requests, `offset` positions further on: what slot `offset` of a draft is sampled with."""
        return self if offset == 0 else replace(self, position=self.position + offset)

    @cached_property
    def by_rule(self) -> "dict[Rule, tuple[Tensor | None, SamplingBatch]]":
        """The batch cut by rule: indices [n] (None: all rows) and the rows themselves. Rules nobody uses are absent."""
        if len(self.traits.rules) == 1:
            return dict.fromkeys(self.traits.rules, (None, self))
        masks = {
            Rule.GREEDY: self.greedy,
            Rule.RATIO: ~self.greedy & ~self.coupled,
            Rule.COUPLED: ~self.greedy & self.coupled,
        }
        cut: dict[Rule, tuple[Tensor | None, SamplingBatch]] = {}
        for rule in Rule:
            indices = masks[rule].nonzero().squeeze(1)
            if len(indices):
                part = self.select(indices)
                cut[rule] = (indices, replace(part, traits=replace(self.traits, rules=frozenset({rule}))))
        return cut


def _rule(temperature: float, coupled: bool) -> Rule:
    if temperature < GREEDY_BELOW:
        return Rule.GREEDY
    return Rule.COUPLED if coupled else Rule.RATIO


def _signed(key: int) -> int:
    """The low 64 bits of `key` as int64 carries them."""
    return ((key + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63)


# ---- the law of a row -------------------------------------------------------------------------------------------


def distribution(logits: Tensor, sampling: SamplingBatch) -> Tensor:
    """The law each row of `logits` [N, V] is sampled from, after its request's own filters (DSpark §3.2.2).

    `sampling` has N rows. Returns probabilities [N, V], float32 (float64 for float64 logits). Greedy rows are one-hot
    at the lowest index of the maximum. A row with NaN, +inf, or nothing but -inf is NaN throughout.
    """
    logits = permitted(logits, sampling)
    if sampling.all_greedy:
        return _one_hot(logits)
    traits, scaled = sampling.traits, logits
    if traits.tempered:
        scaled = logits / sampling.temperature.masked_fill(sampling.greedy, 1.0).to(logits.dtype).unsqueeze(1)
    if traits.min_p or traits.top_k:
        floor = torch.full((len(scaled), 1), -torch.inf, dtype=scaled.dtype, device=scaled.device)
        if traits.min_p:
            # p >= min_p * max(p), said in logits: no softmax is needed for it.
            floor = scaled.amax(-1, keepdim=True) + sampling.min_p.to(scaled.dtype).log().unsqueeze(1)
        if traits.top_k:
            floor = torch.maximum(floor, _top_k_floor(scaled, sampling.top_k))
        scaled = scaled.masked_fill(scaled < floor, -torch.inf)
    probs = torch.softmax(scaled, dim=-1)
    if traits.top_p:
        probs = probs.masked_fill_(probs < _nucleus_floor(probs, sampling.top_p), 0.0)
        probs /= probs.sum(-1, keepdim=True)
    if Rule.GREEDY in traits.rules:
        probs[sampling.greedy] = _one_hot(logits[sampling.greedy])
    return probs


def permitted(logits: Tensor, sampling: SamplingBatch) -> Tensor:
    """`logits` [N, V] as float32 (float64 stays), forbidden tokens at -inf. The argument itself is never written."""
    result = logits if logits.dtype == torch.float64 else logits.float()
    if sampling.forbidden:
        rows = [
            (row, rule.tokens)
            for row, (rule, position) in enumerate(zip(sampling.forbidden, sampling.position.tolist(), strict=True))
            if rule is not None and position < rule.until
        ]
        if rows and result is logits:
            result = logits.clone()
        for row, tokens in rows:
            result[row, list(tokens)] = -torch.inf
    return result


def _one_hot(logits: Tensor) -> Tensor:
    """[N, V] -> [N, V], 1 at the first maximum; NaN where there is no finite maximum."""
    best, token = top(logits)
    probs = torch.zeros_like(logits).scatter_(1, token.unsqueeze(1), 1.0)
    return probs.masked_fill_(~best.isfinite().unsqueeze(1), torch.nan)


def _top_k_floor(scaled: Tensor, top_k: Tensor) -> Tensor:
    """The k-th largest value of each row of `scaled` [N, V], as [N, 1]; -inf where top-k is off."""
    vocabulary = scaled.shape[1]
    floor = torch.full((len(scaled), 1), -torch.inf, dtype=scaled.dtype, device=scaled.device)
    rows = ((top_k > 0) & (top_k < vocabulary)).nonzero().squeeze(1)
    if len(rows):
        k = top_k[rows]
        best = scaled[rows].topk(int(k.max())).values
        floor[rows] = best.gather(1, (k - 1).unsqueeze(1))
    return floor


def _nucleus_floor(probs: Tensor, top_p: Tensor) -> Tensor:
    """The smallest probability inside each row's nucleus, [N, 1]; 0 where top-p is off.

    The nucleus: tokens in falling order, as long as those before them hold less than top_p; never empty.
    """
    vocabulary = probs.shape[1]
    floor = torch.zeros((len(probs), 1), dtype=probs.dtype, device=probs.device)
    rows = (top_p < 1).nonzero().squeeze(1)
    for width in (*NUCLEUS_WIDTHS, vocabulary):
        if not len(rows):
            break
        best = probs[rows].topk(min(width, vocabulary)).values
        mass = best.cumsum(-1, dtype=torch.float64)
        wanted = top_p[rows].double().unsqueeze(1)
        last = (mass[:, :-1] < wanted).sum(1, keepdim=True)
        floor[rows] = best.gather(1, last)
        rows = rows[mass[:, -1] < wanted.squeeze(1)]
    return floor


# ---- from the law to a token ------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _block(vocabulary: int) -> int:
    """The width rows are scanned in: the largest divisor of V up to 512, or V where none is worth it."""
    width = max(d for d in range(1, 513) if vocabulary % d == 0)
    return width if width >= 32 else vocabulary


def top(values: Tensor) -> tuple[Tensor, Tensor]:
    """(maximum [N], its first index [N] i64) of each row of [N, V]; a NaN counts as the maximum.

    In two stages, blocks and then inside the best block: torch's amax is vectorised, its argmax is not.
    """
    rows, vocabulary = values.shape
    width = _block(vocabulary)
    blocks = values.reshape(rows, vocabulary // width, width)
    block = blocks.amax(-1).argmax(-1)
    best, inside = blocks[torch.arange(rows, device=values.device), block].max(-1)
    return best, block * width + inside


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """Inverse CDF: the token [N] whose cell of `probs` [N, V] contains `uniform` [N] f64 in [0, 1).

    Rows need not be normalised, only have some mass. A token of probability 0 is never returned. Cells lie in index
    order; sums across blocks are float64, so that 1e5 small terms do not eat each other's cells.
    """
    rows, vocabulary = probs.shape
    width = _block(vocabulary)
    blocks = probs.reshape(rows, vocabulary // width, width)
    block, rest = _cell(blocks.sum(-1), uniform.double(), scale=True)
    inside, _ = _cell(blocks[torch.arange(rows, device=probs.device), block], rest, scale=False)
    return block * width + inside


def _cell(weights: Tensor, at: Tensor, *, scale: bool) -> tuple[Tensor, Tensor]:
    """(index [N] of the cell of `weights` [N, n] that contains `at` [N], what is left of `at` inside it)."""
    edges = weights.cumsum(-1, dtype=torch.float64)
    total = edges[:, -1]
    # Just below the total at most: rounding can then never step past the last cell that has mass.
    point = torch.minimum(at * total if scale else at, torch.nextafter(total, torch.zeros_like(total))).unsqueeze(1)
    # The first edge strictly above the point: an empty cell shares its edge with the one before and is passed over.
    index = torch.searchsorted(edges, point, right=True).clamp_(max=weights.shape[1] - 1)
    before = edges.gather(1, (index - 1).clamp_(min=0)).masked_fill_(index == 0, 0.0)
    return index.squeeze(1), (point - before).squeeze(1)


def draw_coupled(probs: Tensor, exponential: Tensor) -> Tensor:
    """argmin_v E_v / p_v, which is argmax_v(log p_v + g_v) with Gumbel noise g = -log E. [N, V], [N, V] -> [N].

    Computed as argmax p/E: E > 0 always, so nothing is infinite and a token of probability 0 cannot win.
    """
    return top(probs / exponential)[1]


def sample(
    logits: Tensor, sampling: SamplingBatch, uniform: Tensor, streams: "Streams"
) -> tuple[Tensor, Tensor | None]:
    """Draw one token per row of `logits` [N, V], each by its own rule: what a draft slot does.

    `uniform` [N] f64 serves the ratio rows (take a whole block's at once from `Streams.uniform`), `streams` the coupled
    ones. Returns tokens [N] and the law they were drawn from, [N, V], where acceptance will need it: zero in the rows
    of other rules, None without ratio rows.
    """
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    law: Tensor | None = None
    for rule, (indices, part) in sampling.by_rule.items():
        rows = logits if indices is None else logits[indices]
        if rule is Rule.GREEDY:
            drawn = top(permitted(rows, part))[1]
        else:
            probs = distribution(rows, part)
            if rule is Rule.COUPLED:
                drawn = draw_coupled(probs, streams.exponential(part, probs.shape[1], probs.dtype))
            else:
                drawn = draw(probs, uniform if indices is None else uniform[indices])
                law = probs if indices is None else probs.new_zeros(logits.shape).index_copy_(0, indices, probs)
        if indices is None:
            return drawn, law
        tokens[indices] = drawn
    return tokens, law


# ---- noise ------------------------------------------------------------------------------------------------------


class Streams(Protocol):
    """Where noise comes from. Production: `CounterStreams`; tests substitute tables."""

    def uniform(self, purpose: Purpose, sampling: SamplingBatch, offsets: Tensor) -> Tensor:
        """[R, K] f64 in [0, 1), independent over purpose, key, choice, draft number and position[r] + offsets[k]."""

    def exponential(self, sampling: SamplingBatch, vocabulary: int, dtype: torch.dtype) -> Tensor:
        """[N, V], positive: standard exponentials that depend on (key, choice, position, token) and nothing else."""


def philox4x32(counter: Sequence[NDArray[np.uint64]], key: Sequence[NDArray[np.uint64]]) -> list[NDArray[np.uint64]]:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).

    Four counter words and two key words, uint64 arrays that hold 32 bits and broadcast; gives four such arrays.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (b >> shift) ^ c1 ^ k0, b & low, (a >> shift) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return [c0, c1, c2, c3]


class CounterStreams:
    """Noise as a pure function of who asks for what, where: nothing advances, so batching cannot reorder it.

    Rows of exponentials are kept up to `cache_bytes`, as the target asks for the row its draft has just used, and a
    rejected position is drafted again. That changes time, never values.
    """

    def __init__(self, cache_bytes: int = 128 << 20) -> None:
        self._cache_bytes = cache_bytes
        self._rows: dict[tuple[int, int, int, int, torch.dtype], Tensor] = {}

    def uniform(self, purpose: Purpose, sampling: SamplingBatch, offsets: Tensor) -> Tensor:
        """See `Streams.uniform`. 52 bits and a half: strictly inside (0, 1), with extremes 2^-53 and 1 - 2^-53."""
        position = _words(sampling.position)[:, None] + _words(offsets)[None, :]
        draft, choice = _words(sampling.draft_number)[:, None], _words(sampling.choice)[:, None]
        high, low, _, _ = philox4x32([position, draft, choice, np.full_like(position, purpose)], _key(sampling.key))
        bits = ((high >> np.uint64(6)) << np.uint64(26)) + (low >> np.uint64(6))
        return torch.from_numpy((bits.astype(np.float64) + 0.5) * 2.0**-52).to(sampling.key.device)

    def exponential(self, sampling: SamplingBatch, vocabulary: int, dtype: torch.dtype) -> Tensor:
        """See `Streams.exponential`. Token v takes word v % 4 of block v // 4.

        E = -log1p(-w) with w = (bits + 1/2) / 2^32. The race is decided by the *small* E, so it is w near 0 that must
        keep its precision: log1p does so in float32 too, whereas g = -log(-log(u)) has u near 1 there, and float32
        rounds that to 1 and g to infinity. w stays below 1, so E is finite and positive.
        """
        where = zip(sampling.key.tolist(), sampling.choice.tolist(), sampling.position.tolist(), strict=True)
        rows = [self._row(key, choice, position, vocabulary, dtype) for key, choice, position in where]
        return torch.stack(rows).to(sampling.key.device)

    def _row(self, key: int, choice: int, position: int, vocabulary: int, dtype: torch.dtype) -> Tensor:
        name = (key, choice, position, vocabulary, dtype)
        row = self._rows.pop(name, None)
        if row is None:
            row = _exponential_row(key, choice, position, vocabulary, dtype)
        self._rows[name] = row  # last used, last out
        while len(self._rows) * row.nbytes > self._cache_bytes:
            del self._rows[next(iter(self._rows))]
        return row


def _exponential_row(key: int, choice: int, position: int, vocabulary: int, dtype: torch.dtype) -> Tensor:
    # One row at a time: its arrays stay in the second-level cache, which halves the time against all rows together.
    block = np.arange((vocabulary + 3) // 4, dtype=np.uint64)
    rest = [np.array([word & 0xFFFFFFFF], dtype=np.uint64) for word in (position, choice, Purpose.GUMBEL)]
    key_words = [np.array([word & 0xFFFFFFFF], dtype=np.uint64) for word in (key, key >> 32)]
    words = np.stack(philox4x32([block, *rest], key_words), axis=-1).reshape(-1)[:vocabulary]
    w = torch.from_numpy((words.astype(np.float64) + 0.5) * 2.0**-32).to(dtype)
    return torch.log1p(w.clamp_(max=1 - torch.finfo(dtype).eps / 2).neg_()).neg_()


def _words(values: Tensor) -> NDArray[np.uint64]:
    """The low 32 bits of each of [n] int64, as uint64."""
    words: NDArray[np.uint64] = values.cpu().numpy().astype(np.uint64) & np.uint64(0xFFFFFFFF)
    return words


def _key(key: Tensor) -> list[NDArray[np.uint64]]:
    """[R] int64 -> the two 32-bit Philox key words, [R, 1] each."""
    bits = key.cpu().numpy().astype(np.uint64)[:, None]
    return [bits & np.uint64(0xFFFFFFFF), bits >> np.uint64(32)]
