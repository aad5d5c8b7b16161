"""Exact laws of one decoding cycle, computed by driving the production functions over all noise there is.

Ratio rule: production uses each uniform through thresholds. They are found by bisection on production itself, so
nothing of the rule is assumed here except that outcomes are monotone in each uniform (checked on random ones). A guess
saves the bisection where production agrees with it just below and just above. Coupled rule: a cell of noise is a pair
(target's token, draft's token); its weight has a closed form, and one representative of the cell is fed to production.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from dspark_server.speculation.acceptance import accept
from dspark_server.speculation.draft_block import DraftBlock
from dspark_server.speculation.law import distribution, sample
from dspark_server.speculation.noise import Purpose
from tests.speculation.support import Law, State, TableStreams, World, after

NEGLIGIBLE = 1e-15  # bisection leaves cells of measure zero this wide
TINY = 2.0**-60  # a coin that accepts whatever can be accepted
NEAR = 2.0**-50  # how far a threshold may lie from its guess
Lengths = Callable[[tuple[int, ...]], int]
Admits = Callable[[tuple[int, ...]], bool]


def edges(outcome: Callable[[Tensor, Tensor], Tensor], thresholds: Tensor, guess: Tensor) -> Tensor:
    """sup{u : outcome(u, place) <= threshold of the place} for each place, for an `outcome` that never falls in u.

    thresholds, guess [m]; `outcome` takes uniforms and their places, both [n]. Within NEAR, to the last bit where the
    guess (which may be NaN) is wrong.
    """
    around = torch.cat([guess - NEAR, guess + NEAR])
    below, above = outcome(around.clamp(0, 1).nan_to_num(0.5), torch.arange(len(guess)).repeat(2)).chunk(2)
    fits = (guess - NEAR <= 0) | (below <= thresholds)
    fits &= (guess + NEAR >= 1) | (above > thresholds)
    fits &= ~guess.isnan()
    found, place = guess.clone(), (~fits).nonzero().squeeze(1)
    if len(place):
        low, high = torch.zeros(len(place), dtype=torch.float64), torch.ones(len(place), dtype=torch.float64)
        for _ in range(54):
            middle = (low + high) / 2
            above = outcome(middle, place) > thresholds[place]
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        found[place] = high
    return found


def cells(outcome: Callable[[Tensor, Tensor], Tensor], guess: Tensor) -> Tensor:
    """The law [problems, outcomes] of `outcome(u [m], problem [m])`, u uniform; `guess` is one for it."""
    problems, outcomes = guess.shape
    problem = torch.arange(problems).repeat_interleave(outcomes - 1)
    thresholds = torch.arange(outcomes - 1).repeat(problems)
    guessed = guess.cumsum(1)[:, :-1].clamp(max=1).reshape(-1)
    upper = edges(lambda u, place: outcome(u, problem[place]), thresholds, guessed).view(problems, -1)
    ends = torch.cat([torch.zeros(problems, 1), upper, torch.ones(problems, 1)], dim=1)
    probe = torch.rand(problems, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    assert torch.equal(outcome(probe, torch.arange(problems)), (upper < probe[:, None]).sum(1)), "not monotone"
    return ends.diff(dim=1)


def drafted_law(world: World) -> Tensor:
    """[V, V]: the law of a drafted token after each previous one, as production draws it."""

    def outcome(u: Tensor, previous: Tensor) -> Tensor:
        return sample(world.draft[previous], world.sampling(len(u), drafting=True), u, TableStreams())[0]

    return cells(outcome, claimed_law(world, torch.arange(world.vocabulary)))


def claimed_law(world: World, previous: Tensor) -> Tensor:
    """[n, V]: the q that production reports after each of `previous` [n]."""
    return distribution(world.draft[previous], world.sampling(len(previous), drafting=True))


@dataclass
class RatioProblems:
    """Every (context, draft block, prefix length) that can occur, one row each, ready for `accept`."""

    world: World
    states: Tensor  # [n, 2]
    tokens: Tensor  # [n, gamma]
    lengths: Tensor  # [n]
    weight: Tensor  # [n]: of the block, given the context
    q: Tensor | None  # [n, gamma, V]
    jointly: bool = False  # by the block rule

    @classmethod
    def of(
        cls, world: World, lengths: Lengths, claimed: Callable[[World, Tensor], Tensor], *, jointly: bool = False
    ) -> "RatioProblems":
        law, v = drafted_law(world), world.vocabulary
        blocks = torch.tensor(list(itertools.product(range(v), repeat=world.gamma)))
        states = torch.tensor([state for state in world.states if not world.is_broken(state)])
        n = len(blocks)
        tokens, states = blocks.repeat(len(states), 1), states.repeat_interleave(n, 0)
        previous = torch.cat([states[:, 1:], tokens[:, :-1]], dim=1)
        weight = law[previous, tokens].prod(1)
        can = weight > NEGLIGIBLE
        tokens, states, previous, weight = tokens[can], states[can], previous[can], weight[can]
        size = torch.tensor([lengths(tuple(block)) for block in tokens.tolist()])
        q = (
            None
            if world.draft_greedy and claimed is claimed_law
            else claimed(world, previous.reshape(-1)).view(*tokens.shape, v)
        )
        return cls(world, states, tokens, size, weight, q, jointly)

    def run(self, rows: Tensor, coins: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """(accepted drafts, token) of production for problems `rows` [m] under coins [m, gamma] and residual uniforms
        [m]. A draft token whose own row is broken counts as accepted where it is the last token of the cycle.
        """
        states, tokens, lengths = self.states[rows], self.tokens[rows], self.lengths[rows]
        logits, row_start = self.world.verify_logits(states, tokens, lengths)
        gamma = self.world.gamma
        streams = TableStreams({Purpose.COIN: coins, Purpose.RESIDUAL: last[:, None].expand(-1, gamma + 1)})
        draft = DraftBlock.of(self.tokens, self.q)
        sampling = self.world.sampling(len(rows))
        done = accept(logits, row_start, draft, rows, sampling, streams, jointly=self.jointly)
        assert not done.failed.any()
        drafted = tokens.gather(1, done.count.clamp(max=gamma - 1).unsqueeze(1)).squeeze(1)
        own_row = torch.tensor(row_start[:-1]) + (done.count + 1).clamp(max=lengths)
        broken = (done.count < lengths) & ~logits[own_row].max(-1).values.isfinite()
        return done.count + (broken & (done.token == drafted)), done.token

    def acceptance(self) -> Tensor:
        """[n, gamma]: the chance that token k + 1 stands, given that those before it do."""
        n, gamma = self.tokens.shape
        slot = torch.arange(gamma).repeat(n)
        rows = torch.arange(n).repeat_interleave(gamma)

        def rejected(u: Tensor, place: Tensor) -> Tensor:
            coins = torch.full((len(place), gamma), TINY, dtype=torch.float64)
            coins[torch.arange(len(place)), slot[place]] = u
            return (self.run(rows[place], coins, torch.full_like(u, 0.5))[0] <= slot[place]).long()

        p, q = (law.gather(2, self.tokens.unsqueeze(2)).squeeze(2) for law in (self.p[:, :gamma], self.drafted_from))
        guess = torch.where(torch.arange(gamma) < self.lengths.unsqueeze(1), (p / q).clamp(max=1), 0.0)
        # Behind a token that cannot stand, or a broken row (NaN), none stands.
        guess = torch.where((guess > 0).cummin(1).values, guess, 0.0)
        return edges(rejected, torch.zeros_like(slot), guess.reshape(-1)).view(n, gamma)

    @cached_property
    def joint(self) -> Tensor:
        """[n, gamma + 1]: P_i of the block rule, for guesses; NaN from a broken row on."""
        p, q = (law.gather(2, self.tokens.unsqueeze(2)).squeeze(2) for law in (self.p[:, :-1], self.drafted_from))
        found = [torch.ones(len(p), dtype=torch.float64)]
        for ratio in (p / q).unbind(1):
            found.append((found[-1] * ratio).clamp(max=1))
        return torch.stack(found, 1)

    def bounds(self) -> Tensor:
        """[n, gamma]: h_i of the block rule, below which the coin of node i + 1 accepts it."""
        n, gamma = self.tokens.shape
        node = torch.arange(gamma).repeat(n)
        rows = torch.arange(n).repeat_interleave(gamma)

        def rejected(u: Tensor, place: Tensor) -> Tensor:
            coins = torch.full((len(place), gamma), 1 - 2.0**-53, dtype=torch.float64)
            coins[torch.arange(len(place)), node[place]] = u
            return (self.run(rows[place], coins, torch.full_like(u, 0.5))[0] <= node[place]).long()

        p, joint = self.p[:, 1:], self.joint[:, 1:]
        ends = (torch.arange(1, gamma + 1) >= self.lengths.unsqueeze(1)) | p[:, :, 0].isnan()
        following = torch.cat([self.drafted_from[:, 1:], torch.zeros(n, 1, p.shape[2])], 1)
        left = (joint.unsqueeze(2) * p - following).clamp(min=0).sum(2)
        chance = torch.where(ends, joint, torch.where(left + 1 - joint > 0, left / (left + 1 - joint), 1.0))
        within = torch.arange(1, gamma + 1) <= self.lengths.unsqueeze(1)
        return edges(rejected, torch.zeros_like(node), torch.where(within, chance, 0.0).reshape(-1)).view(n, gamma)

    @cached_property
    def p(self) -> Tensor:
        """[n, gamma + 1, V]: the target's law along the block, for guesses."""
        whole = torch.full_like(self.lengths, self.world.gamma)
        logits, _ = self.world.verify_logits(self.states, self.tokens, whole)
        return distribution(logits, self.world.sampling(len(logits))).view(len(whole), -1, self.world.vocabulary)

    @cached_property
    def drafted_from(self) -> Tensor:
        """[n, gamma, V]: q, for guesses."""
        return one_hot(self.tokens, self.world.vocabulary).double() if self.q is None else self.q

    def guess(self, rows: Tensor, count: Tensor) -> Tensor:
        """[m, V]: a guess of the law of the token after `count` [m] draft tokens of `rows` [m] that stand.

        After one whose own row is broken, it is that draft token.
        """
        p, slot = self.p[rows, count], count.clamp(max=self.world.gamma - 1)
        share = self.joint[rows, count].unsqueeze(1) if self.jointly else 1.0
        rest = (share * p - self.drafted_from[rows, slot]).clamp(min=0)
        law = torch.where((count == self.lengths[rows]).unsqueeze(1), p, rest / rest.sum(1, keepdim=True))
        last = one_hot(self.tokens[rows, (count - 1).clamp(min=0)], self.world.vocabulary).double()
        return torch.where(p.isnan(), last, law)


def ratio_cycles(
    world: World, lengths: Lengths | None = None, claimed: Callable[[World, Tensor], Tensor] = claimed_law
) -> dict[State, Law]:
    """The law of what one cycle of the ratio rule commits, in every context."""
    problems = RatioProblems.of(world, lengths or (lambda block: world.gamma), claimed)
    chance = problems.acceptance()
    rows, counts, weights, coins = [], [], [], []
    for count in range(world.gamma + 1):
        weight = problems.weight * chance[:, :count].prod(1)
        ends_here = problems.lengths == count
        if count < world.gamma:
            weight = torch.where(ends_here, weight, weight * (1 - chance[:, count]))
        which = ((weight > NEGLIGIBLE) & (count <= problems.lengths)).nonzero().squeeze(1)
        coin = torch.cat([chance[which, :count] / 2, (1 + chance[which, count:]) / 2], dim=1)
        rows.append(which), counts.append(torch.full_like(which, count))
        weights.append(weight[which]), coins.append(coin)
    return _cycles(problems, torch.cat(rows), torch.cat(counts), torch.cat(coins), torch.cat(weights))


def block_cycles(
    world: World, lengths: Lengths | None = None, claimed: Callable[[World, Tensor], Tensor] = claimed_law
) -> dict[State, Law]:
    """The same of the block rule: the last node whose coin falls below its bound decides."""
    problems = RatioProblems.of(world, lengths or (lambda block: world.gamma), claimed, jointly=True)
    bounds = problems.bounds()
    rows, counts, weights, coins = [], [], [], []
    for count in range(world.gamma + 1):
        weight = problems.weight * (1 - bounds[:, count:]).prod(1)  # a bound of 0 behind the end of a block
        if count:
            weight = weight * bounds[:, count - 1]
        which = ((weight > NEGLIGIBLE) & (count <= problems.lengths)).nonzero().squeeze(1)
        coin = torch.full((len(which), world.gamma), 0.5, dtype=torch.float64)  # of earlier nodes: whatever they say
        coin[:, count:] = (1 + bounds[which, count:]) / 2
        if count:
            coin[:, count - 1] = bounds[which, count - 1] / 2
        rows.append(which), counts.append(torch.full_like(which, count))
        weights.append(weight[which]), coins.append(coin)
    return _cycles(problems, torch.cat(rows), torch.cat(counts), torch.cat(coins), torch.cat(weights))


def _cycles(problems: RatioProblems, row: Tensor, count: Tensor, coin: Tensor, weight: Tensor) -> dict[State, Law]:
    """What is committed after `count` tokens of problems `row`, under coins that give it, with its weights."""
    world = problems.world

    def outcome(u: Tensor, end: Tensor) -> Tensor:
        got, token = problems.run(row[end], coin[end], u)
        assert torch.equal(got, count[end]), "a coin inside its cell gave another count"
        return token

    law = cells(outcome, problems.guess(row, count)) * weight[:, None]
    cycles: dict[State, Law] = {state: {} for state in world.states if not world.is_broken(state)}
    for end, (problem, kept) in enumerate(zip(row.tolist(), count.tolist(), strict=True)):
        first, second = problems.states[problem].tolist()
        for token in range(world.vocabulary):
            committed = (*problems.tokens[problem, :kept].tolist(), token)
            if world.is_broken(after((first, second), committed[:-1])):  # nothing could be drawn there
                committed = committed[:-1]
            here = cycles[first, second]
            here[committed] = here.get(committed, 0.0) + float(law[end, token])
    return cycles


# ---- coupled ----------------------------------------------------------------------------------------------------


def pair_cells(p: list[float], q: list[float]) -> list[tuple[float, int, int, list[float]]]:
    """Every cell of exponential noise: (weight, y = argmin E/p, x = argmin E/q, an E inside it).

    For i != j, with r = E_i / E_j: P(y=j, x=i) = integral over r in [p_i/p_j, q_i/q_j] of dr / S(r)^2, where
    S(r) = 1 + r + sum over the others of max(p_v/p_j, r q_v/q_i); P(i, i) = 1 / sum of max(p_v/p_i, q_v/q_i).
    """
    found = []
    for j, i in itertools.product(range(len(p)), repeat=2):
        if p[j] <= 0 or q[i] <= 0:
            continue
        if i == j:
            bound = [max(a / p[i], b / q[i]) for a, b in zip(p, q, strict=True)]
            noise = [b + 1 for b in bound]
            noise[i] = 1.0
            found.append((1 / sum(bound), i, i, noise))
            continue
        low, high = p[i] / p[j], q[i] / q[j] if q[j] > 0 else float("inf")
        if low >= high:
            continue
        others = [v for v in range(len(p)) if v not in (i, j)]
        ratio = (low + high) / 2 if high < float("inf") else low + 1
        noise = [1 + max(p[v] / p[j], ratio * q[v] / q[i]) for v in range(len(p))]
        noise[j], noise[i] = 1.0, ratio
        turns = [p[v] / p[j] * q[i] / q[v] for v in others if q[v] > 0]
        marks = [low, *sorted(t for t in turns if low < t < high), high]
        weight = 0.0
        for start, end in itertools.pairwise(marks):
            # On this stretch S = constant + slope r.
            rising = [v for v in others if q[v] > 0 and p[v] / p[j] * q[i] / q[v] <= start]
            constant = 1 + sum(p[v] / p[j] for v in others if v not in rising)
            slope = 1 + sum(q[v] / q[i] for v in rising)
            at_end = 0.0 if end == float("inf") else 1 / (constant + slope * end)
            weight += (1 / (constant + slope * start) - at_end) / slope
        found.append((weight, j, i, noise))
    return found


@dataclass
class CoupledPath:
    weight: float
    state: State
    noise: list[list[float]]
    drafted: tuple[int, ...]  # what production must draft under this noise, as far as the path goes
    length: int


def coupled_paths(world: World, state: State, admits: Admits, prefix: tuple[int, ...] = ()) -> list[CoupledPath]:
    """All ways a cycle can go from here: slot by slot, a cell of noise each, until draft and target part."""
    p = world.p(after(state, prefix))
    slot, blank = len(prefix), [1.0] * world.vocabulary
    if slot == world.gamma or not admits(prefix):
        paths = []
        for token, weight in enumerate(p):
            if weight > 0:
                noise = [1 + share / weight for share in p]
                noise[token] = 1.0
                rest = [blank] * (world.gamma - slot)
                paths.append(CoupledPath(weight, state, [noise, *rest], (), slot))
        return paths
    paths = []
    for weight, y, x, noise in pair_cells(p, world.q(after(state, prefix)[1])):
        if x == y:
            tails = coupled_paths(world, state, admits, (*prefix, x))
        else:
            # Whether later slots are in the pass no longer matters; let them be.
            tails = [CoupledPath(1.0, state, [blank] * (world.gamma - slot), (), world.gamma)]
        for tail in tails:
            drafted = (x, *tail.drafted)
            paths.append(CoupledPath(weight * tail.weight, state, [noise, *tail.noise], drafted, tail.length))
    return paths


def coupled_cycles(world: World, admits: Admits | None = None) -> dict[State, Law]:
    """The law of what one cycle of the coupled rule commits, in every context."""
    paths = [path for s in world.states for path in coupled_paths(world, s, admits or (lambda prefix: True))]
    n = len(paths)
    streams = TableStreams(exponentials=torch.tensor([path.noise for path in paths], dtype=torch.float64))
    sampling = world.sampling(n, coupled=True)
    states = torch.tensor([path.state for path in paths])
    previous, drafted = states[:, 1], []
    for slot in range(world.gamma):
        previous, _ = sample(world.draft[previous], sampling.ahead(slot), torch.zeros(n), streams)
        drafted.append(previous)
    tokens = torch.stack(drafted, dim=1)
    for path, block in zip(paths, tokens.tolist(), strict=True):
        assert tuple(block[: len(path.drafted)]) == path.drafted, "production drafted another token in this cell"
    lengths = torch.tensor([path.length for path in paths])
    logits, row_start = world.verify_logits(states, tokens, lengths)
    done = accept(logits, row_start, DraftBlock.of(tokens), range(n), sampling, streams)
    cycles: dict[State, Law] = {state: {} for state in world.states}
    for path, block, count, token in zip(paths, tokens.tolist(), done.count.tolist(), done.token.tolist(), strict=True):
        committed = (*block[:count], token)
        here = cycles[path.state]
        here[committed] = here.get(committed, 0.0) + path.weight
    return cycles
