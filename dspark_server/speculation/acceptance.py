"""Lossless acceptance: the number of accepted draft tokens, and the token that ends the cycle (DSpark §3.2.2, §2.1).

Shapes: R requests in the pass, Rd requests that drafted, γ slots of a draft, V vocabulary, N rows of logits. Request r
brings ℓ_r draft tokens, 0 <= ℓ_r <= γ, and owns ℓ_r + 1 rows: the row of its anchor verifies draft token 1, the row of
draft token k verifies token k + 1, and the last one gives the bonus token.

All rules give the target's distribution exactly; they may not be mixed, nor share noise (DSPARK.md, "Losslessness"):

- ratio: accept x with probability min(1, p(x)/q(x)); after the first rejection draw from norm(max(p - q, 0)).
- block, for the same requests, accepts no fewer (Sun et al., arXiv 2403.10444): with P_0 = 1 and P_i = min(P_{i-1}
  p(x_i)/q(x_i), 1), a coin at every i <= l falls below h_l = P_l, or below h_i = Z_i / (Z_i + 1 - P_i) where Z_i is
  sum_v max(P_i p(v | x_<=i) - q(v | x_<=i), 0); the greatest i whose coin falls below is accepted, else 0. Then the
  token comes from p if i = l, else from norm(max(P_i p - q, 0)).
- coupled (and greedy): the target draws its own token y from p with the noise of the draft; accept x iff x = y.

Why block is lossless, also where l differs from prefix to prefix, as long as a block goes on from x_<=i by x_<=i and
other requests alone (l is a stopping time): let A_i be the probability that at least i tokens are accepted, given
x_<=i and that the block has them. By induction from the end A_i = P_i. At i = l it is h_l. At i < l at least i are
accepted if a later node is, of expectation sum_v q(v) P_{i+1}(v) = sum_v min(P_i p(v), q(v)) = P_i - Z_i, or else by
the coin at i: P_i - Z_i + (1 - P_i + Z_i) h_i = P_i. So x_<=i is committed with q(x_<=i) P_i, and v after exactly i of
them with q(x_<=i) (1 - P_i + Z_i) h_i max(P_i p(v) - q(v), 0) / Z_i = q(x_<=i) max(P_i p(v) - q(v), 0). With v as the
draft's own token, q(x_<=i) min(P_i p(v), q(v)), that makes q(x_<=i) P_i p(v): p's share.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from dspark_kernels import Filters, Kernels
from torch import Tensor

from dspark_server.speculation.draft_block import DraftBlock
from dspark_server.speculation.law import distribution, draw, draw_coupled, permitted, top
from dspark_server.speculation.noise import Purpose, Streams
from dspark_server.speculation.sampling import Rule, SamplingBatch


@dataclass(frozen=True)
class Accepted:
    """count [R] i64: accepted draft tokens; token [R] i64: the token after them; failed [R] bool.

    A row is broken if it holds NaN or +inf, or permits no token at all. A request fails if its anchor's row is broken,
    as it would have without a draft; its token is then -1. If the row of an accepted draft token is broken, that draft
    token is `token` and ends the cycle: the rows before it accepted it, and it is the anchor of the next cycle.
    """

    count: Tensor
    token: Tensor
    failed: Tensor


@dataclass(frozen=True)
class _Pass:
    """The requests of one rule. start [n]: first row of each; lengths [n]; tokens [n, L]: drafts, L the longest."""

    logits: Tensor
    start: Tensor
    lengths: Tensor
    tokens: Tensor
    row: Tensor
    sampling: SamplingBatch

    def prefixes(self) -> list[list[int]]:
        """The draft tokens before rows 0 .. L of every request, request by request; after its last row, all its draft
        tokens.
        """
        slots, rows = range(self.tokens.shape[1] + 1), zip(self.tokens.tolist(), self.lengths.tolist(), strict=True)
        return [row[: min(slot, length)] for row, length in rows for slot in slots]

    def select(self, indices: Tensor, sampling: SamplingBatch) -> "_Pass":
        lengths = self.lengths[indices]
        width = int(lengths.max())
        return _Pass(
            self.logits, self.start[indices], lengths, self.tokens[indices, :width], self.row[indices], sampling
        )


def accept(
    logits: Tensor,
    row_start: Sequence[int],
    draft: DraftBlock | None,
    rows: Sequence[int] | Tensor,
    sampling: SamplingBatch,
    streams: Streams,
    kernels: Kernels | None = None,
    *,
    jointly: bool = False,
) -> Accepted:
    """Accept or reject the drafts of a pass, and draw the token that ends each request's cycle.

    logits [N, V], float32 (float64 is computed in float64); row_start, R + 1 numbers: rows row_start[r] up to
    row_start[r + 1] belong to request r, ℓ_r + 1 of them; rows [R]: its row of `draft`, -1 if it did not draft;
    sampling: R rows. ℓ_r = 0 is plain sampling, and `draft` may be None if all are 0. `kernels`, if given, compute
    maxima, and the ratio and block rules except for rows with grammars; they edit the rows of requests with rules in
    place. `jointly`: the block rule takes the ratio rule's place.
    """
    device = logits.device
    row = torch.as_tensor(rows, dtype=torch.int64).to(device)
    bounds = torch.tensor(row_start, dtype=torch.int64).to(device)
    lengths = bounds.diff() - 1
    assert bool(((lengths == 0) | ((lengths > 0) & (row >= 0))).all()), "a row of logits without a draft token"
    if draft is None:
        draft = DraftBlock.of(lengths.new_zeros((1, 0)))
    width = int(lengths.max())
    # A request that did not draft reads row 0, and the result is not used.
    row = row.clamp(min=0)
    whole = _Pass(logits, bounds[:-1], lengths, draft.tokens[:, :width][row], row, sampling)
    if kernels is not None and kernels.ruled and logits.dtype == torch.float32 and (ruled := sampling.ruled()):
        # All rows of a block at once: which of them count is not known yet, and no row's edits read another's token.
        kernels.apply_rules(logits, whole.start, lengths, whole.tokens, ruled)
        sampling = sampling.without_rules()
        whole = replace(whole, sampling=sampling)
    result = Accepted(torch.empty_like(lengths), torch.empty_like(lengths), torch.empty_like(lengths, dtype=torch.bool))
    for rule, indices, part in sampling.parts:
        mine = whole if indices is None else whole.select(indices, part)
        if rule is Rule.GREEDY:
            done = _accept_greedy(mine, kernels)
        elif rule is Rule.COUPLED:
            done = _accept_coupled(mine, streams)
        else:
            done = _accept_sampled(mine, draft, streams, kernels, jointly)
        if indices is None:
            return done
        result.count[indices], result.token[indices], result.failed[indices] = done.count, done.token, done.failed
    return result


def _accept_greedy(mine: _Pass, kernels: Kernels | None) -> Accepted:
    """Accept draft tokens up to the first that is not the target's argmax. Each row is read once, without a walk."""
    requests, width = mine.tokens.shape
    slots = torch.arange(width + 1, device=mine.start.device)
    within = slots <= mine.lengths.unsqueeze(1)
    index = mine.start.unsqueeze(1) + slots.minimum(mine.lengths.unsqueeze(1))  # [n, L + 1], padded with the last row
    if not mine.sampling.controls and int(within.sum()) == len(mine.logits):
        best, token = top(permitted(mine.logits, mine.sampling), kernels)
        best, token = best[index], token[index]
    else:
        rows = index.reshape(-1)
        request = torch.arange(requests, device=rows.device).repeat_interleave(width + 1)
        here = mine.sampling.select(request, slots.repeat(requests), mine.prefixes)
        best, token = top(permitted(mine.logits[rows], here), kernels)
        best, token = best.view(requests, -1), token.view(requests, -1)
    return _stood_greedily(best, token, mine.tokens, mine.lengths)


def _stood_greedily(best: Tensor, token: Tensor, drafted: Tensor, lengths: Tensor) -> Accepted:
    """Greedy acceptance from each row's maximum and its token [n, L + 1], draft tokens [n, L] and their number [n]."""
    slots = torch.arange(drafted.shape[1], device=lengths.device)
    # A broken row agrees with no token, so the walk ends there and that row decides.
    agrees = (token[:, :-1] == drafted) & best[:, :-1].isfinite() & (slots < lengths.unsqueeze(1))
    count = agrees.long().cumprod(1).sum(1)
    broken = ~best.gather(1, count.unsqueeze(1)).squeeze(1).isfinite()
    return _outcome(count, token.gather(1, count.unsqueeze(1)).squeeze(1), broken, drafted)


def _outcome(count: Tensor, token: Tensor, broken: Tensor, drafted: Tensor) -> Accepted:
    """The result of walks that ended after `count` [n] of the draft tokens [n, L], with `token` [n] or at a broken row,
    which gives no token.
    """
    failed = broken & (count == 0)
    before = (count - 1).clamp(min=0)
    if drafted.shape[1]:
        token = torch.where(broken, drafted.gather(1, before.unsqueeze(1)).squeeze(1), token)
    return Accepted(torch.where(broken, before, count), token.masked_fill(failed, -1), failed)


@dataclass(frozen=True)
class Noise:
    """Noise and parameters of `accept_at_once`: greedy [R] bool; inverse_temperature [R] f32, 1 for greedy rows; coins
    [R, L] and last [R, L + 1] f64. A field is None where it is not needed: greedy if no row is greedy, the others if
    all are, filters if no row may have any.
    """

    greedy: Tensor | None
    inverse_temperature: Tensor | None = None
    coins: Tensor | None = None
    last: Tensor | None = None
    filters: Filters | None = None

    @classmethod
    def of(cls, sampling: SamplingBatch, streams: Streams, width: int) -> "Noise":
        """For drafts of at most `width` = L tokens."""
        greedy = sampling.greedy if Rule.GREEDY in sampling.traits.rules else None
        if sampling.all_greedy:
            return cls(greedy)
        slots = torch.arange(width + 1)
        return cls(
            greedy,
            1 / sampling.temperature.masked_fill(sampling.greedy, 1.0),
            streams.uniform(Purpose.COIN, sampling, slots[:-1]),
            streams.uniform(Purpose.RESIDUAL, sampling, slots),
            sampling.filters(torch.arange(len(sampling))) if sampling.filtered else None,
        )


def accept_at_once(
    logits: Tensor,
    start: Tensor,
    lengths: Tensor,
    draft: DraftBlock,
    row: Tensor,
    noise: Noise,
    kernels: Kernels,
    *,
    jointly: bool,
) -> Accepted:
    """`accept` for batches that are `SamplingBatch.at_once`, without reading anything on the host.

    logits [N, V] float32: request r owns rows start[r] .. start[r] + lengths[r], both [R] i64, start rising; the
    contents of other rows do not matter. row [R] i64: its row of `draft`, -1 if it did not draft.
    """
    drafted = draft.tokens[row.clamp(min=0)]
    greedy = None
    if noise.greedy is not None:
        slots = torch.arange(drafted.shape[1] + 1, device=lengths.device)
        index = start.unsqueeze(1) + slots.minimum(lengths.unsqueeze(1))
        best, token = top(logits)
        greedy = _stood_greedily(best[index], token[index], drafted, lengths)
    if noise.inverse_temperature is None or noise.last is None:
        assert greedy is not None, "a batch has rows of some rule"
        return greedy
    if noise.filters is not None:
        logits = _filtered_everywhere(logits, start, noise.inverse_temperature, noise.filters, kernels)
    # The kernel runs over all requests, and its results for greedy ones are not used: they bring no draft to it, and
    # theirs may have rows and slots beyond the end of q (`DraftBlock`).
    row = row.clamp(min=0) if draft.q is None else row.clamp(0, len(draft.q) - 1)
    count, drawn, failed = kernels.accept_drafts(
        logits,
        start,
        lengths if noise.greedy is None else lengths.masked_fill(noise.greedy, 0),
        drafted,
        noise.inverse_temperature,
        draft.q,
        row,
        draft.columns,
        noise.coins,
        noise.last,
        jointly=jointly,
    )
    if noise.greedy is None or greedy is None:
        return Accepted(count, drawn, failed)
    return Accepted(
        torch.where(noise.greedy, greedy.count, count),
        torch.where(noise.greedy, greedy.token, drawn),
        torch.where(noise.greedy, greedy.failed, failed),
    )


def _accept_coupled(mine: _Pass, streams: Streams) -> Accepted:
    """The target draws with the draft's own noise; draft tokens are accepted up to the first that differs."""

    def judge(slot: int, active: Tensor, p: Tensor, here: SamplingBatch) -> tuple[Tensor, Tensor]:
        token = draw_coupled(p, streams.exponential(here, p.shape[1], p.dtype))
        if slot == mine.tokens.shape[1]:
            return torch.zeros_like(active, dtype=torch.bool), token
        return token == mine.tokens[active, slot], token

    return _walk(mine, judge)


def _accept_sampled(
    mine: _Pass, draft: DraftBlock, streams: Streams, kernels: Kernels | None, jointly: bool
) -> Accepted:
    """The ratio rule, or the block rule if `jointly`."""
    width = mine.tokens.shape[1]
    offsets = torch.arange(width + 1, device=mine.start.device)
    coins = streams.uniform(Purpose.COIN, mine.sampling, offsets[:-1]) if width else None
    last = streams.uniform(Purpose.RESIDUAL, mine.sampling, offsets)
    if kernels is not None and not mine.sampling.controls and mine.logits.dtype == torch.float32:
        scale, logits, start = 1 / mine.sampling.temperature, mine.logits, mine.start
        if mine.sampling.filtered:
            logits, start = _filtered(mine, scale, kernels)
        drafts = mine.lengths, mine.tokens, scale, draft.q, mine.row, draft.columns
        return Accepted(*kernels.accept_drafts(logits, start, *drafts, coins, last, jointly=jointly))
    return (_accept_by_block if jointly else _accept_by_ratio)(mine, draft, coins, last)


def _accept_by_block(mine: _Pass, draft: DraftBlock, coins: Tensor | None, last: Tensor) -> Accepted:
    """The block rule. Every row of a block is read: a later node may be accepted where an earlier one is not.

    A row that is broken ends its block: the nodes before it are judged as if it had no more draft tokens.
    """
    joint = torch.ones_like(last[:, 0])  # P_i of the node reached
    accepted = joint.clone()  # and of the one accepted
    count, ends = torch.zeros_like(mine.lengths), mine.lengths.clone()
    broken = torch.zeros_like(mine.lengths, dtype=torch.bool)
    for slot in range(mine.tokens.shape[1] + 1):
        rows = (slot <= ends).nonzero().squeeze(1)
        p = distribution(
            mine.logits[mine.start[rows] + slot], mine.sampling.select(rows, slot, _before(mine, rows, slot))
        )
        broken[rows] = p[:, 0].isnan()  # `distribution` turns a broken row into NaN throughout
        ends[rows[broken[rows]]] = slot
        further = (slot < ends[rows]).nonzero().squeeze(1)
        chance = joint[rows]  # h_i: at the end P_i
        more, p = rows[further], p[further]
        if slot and len(more):
            left = (joint[more] - _overlap(draft, mine, more, slot, p, joint[more])).clamp(min=0)
            rest = left + (1 - joint[more])
            chance[further] = torch.where(rest > 0, left / rest, 1.0)
        if slot and coins is not None:
            stood = rows[coins[rows, slot - 1] < chance]
            count[stood], accepted[stood] = slot, joint[stood]
        if len(more):
            x = mine.tokens[more, slot]
            gained = p.gather(1, x.unsqueeze(1)).squeeze(1).double() / draft.q_of(mine.row[more], slot, x)
            joint[more] = (joint[more] * gained).clamp(max=1).nan_to_num(nan=0.0)
    token = torch.full_like(count, -1)
    broken &= count == ends
    drawing = (~broken).nonzero().squeeze(1)
    if len(drawing):
        slots = count[drawing]
        here = mine.sampling.select(drawing, slots, _before(mine, drawing, slots))
        weights = distribution(mine.logits[mine.start[drawing] + slots], here)
        short = (slots < ends[drawing]).nonzero().squeeze(1)
        if len(short):
            which, at = mine.row[drawing[short]], slots[short]
            q = None if draft.q is None else draft.q[which, at]
            columns = None if draft.columns is None else draft.columns[which, at]
            p = weights[short]
            scaled = p * accepted[drawing[short]].to(p.dtype).unsqueeze(1)
            weights[short] = residual(scaled, q, draft.tokens[which, at], columns)
        token[drawing] = draw(weights, last[drawing, slots])
    return _outcome(count, token, broken, mine.tokens)


def _before(mine: _Pass, rows: Tensor, slots: Tensor | int) -> Callable[[], list[list[int]]]:
    """Function that gives the first slots[i] draft tokens of each of `rows` [n]."""

    def prefixes() -> list[list[int]]:
        each = torch.as_tensor(slots).expand(len(rows)).tolist()
        return [tokens[:slot] for tokens, slot in zip(mine.tokens[rows].tolist(), each, strict=True)]

    return prefixes


def _overlap(draft: DraftBlock, mine: _Pass, rows: Tensor, slot: int, p: Tensor, joint: Tensor) -> Tensor:
    """sum_v min(P p(v), q(v)) [n] float64, of q [C] at a slot of `rows` [n], p [n, V] and P [n]."""
    scaled = p.double() * joint.unsqueeze(1)
    which = mine.row[rows]
    if draft.q is None:
        return scaled.gather(1, draft.tokens[which, slot].unsqueeze(1)).squeeze(1).clamp(max=1)
    if draft.columns is not None:
        scaled = scaled.gather(1, draft.columns[which, slot])
    return scaled.minimum(draft.q[which, slot].double()).sum(1)


def _accept_by_ratio(mine: _Pass, draft: DraftBlock, coins: Tensor | None, last: Tensor) -> Accepted:
    """Accept x with probability min(1, p(x)/q(x)), else draw from the residual; after the last draft token, from p."""
    width = mine.tokens.shape[1]

    def judge(slot: int, active: Tensor, p: Tensor, here: SamplingBatch) -> tuple[Tensor, Tensor]:
        accepted = torch.zeros_like(active, dtype=torch.bool)
        drafted = slot < mine.lengths[active]
        if coins is not None and slot < width:
            x = mine.tokens[active, slot]
            q_x = draft.q_of(mine.row[active], slot, x)
            # u q < p, not u < p / q: right at q = 0, and u = 0 does not let a token of probability 0 through.
            accepted = drafted & (coins[active, slot] * q_x < p.gather(1, x.unsqueeze(1)).squeeze(1))
        ends = (~accepted).nonzero().squeeze(1)
        token = torch.zeros_like(active)
        if len(ends):
            rejected = drafted[ends].nonzero().squeeze(1)
            weights = p[ends]
            if len(rejected):
                which = mine.row[active[ends[rejected]]]
                q = None if draft.q is None else draft.q[which, slot]
                columns = None if draft.columns is None else draft.columns[which, slot]
                weights[rejected] = residual(weights[rejected], q, draft.tokens[which, slot], columns)
            token[ends] = draw(weights, last[active[ends], slot])
        return accepted, token

    return _walk(mine, judge)


def _filtered(mine: _Pass, scale: Tensor, kernels: Kernels) -> tuple[Tensor, Tensor]:
    """Rows of these requests alone, -inf where a filter removes a token, and each request's first row among them."""
    ends = (mine.lengths + 1).cumsum(0)
    start = ends - mine.lengths - 1
    rows = torch.arange(int(ends[-1]), device=start.device)
    request = torch.searchsorted(ends, rows, right=True)
    rows += (mine.start - start)[request]
    return kernels.filter_logits(mine.logits, rows, scale[request], mine.sampling.filters(request)), start


def _filtered_everywhere(
    logits: Tensor, start: Tensor, inverse_temperature: Tensor, filters: Filters, kernels: Kernels
) -> Tensor:
    """The same rows [N, V], each after the filters of the last request that starts at or before it."""
    row = torch.arange(len(logits), device=start.device)
    owner = (torch.searchsorted(start, row, right=True) - 1).clamp(min=0)
    theirs = Filters(filters.top_k[owner], filters.top_p[owner], filters.min_p[owner])
    return kernels.filter_logits(logits, row, inverse_temperature[owner], theirs)


def residual(p: Tensor, q: Tensor | None, drafted: Tensor, columns: Tensor | None = None) -> Tensor:
    """max(p - q, 0) [n, V], not normalised (`draw` does not need it); q None: one-hot at `drafted` [n].

    q [n, C] belongs to tokens `columns` [n, C], or to all if that is None. If no mass is left, the result is p: p and q
    are then equal up to rounding.
    """
    if q is None:
        left = p.scatter(1, drafted.unsqueeze(1), 0.0)
    elif columns is None:
        left = (p - q).clamp_(min=0)
    else:
        left = p.scatter_add(1, columns, -q.to(p.dtype)).clamp_(min=0)
    return torch.where(left.sum(-1, keepdim=True) > 0, left, p)


def _walk(mine: _Pass, judge: Callable[[int, Tensor, Tensor, SamplingBatch], tuple[Tensor, Tensor]]) -> Accepted:
    """Slot by slot, over the requests whose drafts are accepted so far: rows after the first rejection cost nothing.

    `judge(slot, active [a], p [a, V], sampling)` gives (accepted [a], the token that ends the cycle if not [a]).
    """
    count, token = torch.zeros_like(mine.lengths), torch.full_like(mine.lengths, -1)
    broken = torch.zeros_like(mine.lengths, dtype=torch.bool)
    active = torch.arange(len(mine.lengths), device=mine.lengths.device)
    for slot in range(mine.tokens.shape[1] + 1):
        here = mine.sampling.select(active, slot, mine.tokens[active, :slot].tolist)
        p = distribution(mine.logits[mine.start[active] + slot], here)
        ends = p[:, 0].isnan()  # `distribution` turns a broken row into NaN throughout
        accepted, drawn = judge(slot, active, p, here)
        accepted &= ~ends & (slot < mine.lengths[active])
        broken[active], count[active], token[active] = ends, slot, drawn
        active = active[accepted]
        if not len(active):
            break
    return _outcome(count, token, broken, mine.tokens)
