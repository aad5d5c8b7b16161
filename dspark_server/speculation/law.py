"""From logits to the distribution that a request asked for, and from that distribution to a token.

Shapes: N rows of logits (one row predicts one token), V vocabulary.

Filters follow vLLM (v1/sample): controls (`controls`), temperature, min-p, top-k, top-p, each on the tokens that the
ones before it left. Where vLLM breaks a tie at the edge of top-p by sort order, we keep both tokens, as it and we do
for top-k: the distribution of a row then depends on nothing but the row.
"""

from functools import lru_cache

import torch
from dspark_kernels import Kernels
from torch import Tensor

from dspark_server.speculation.noise import Streams
from dspark_server.speculation.sampling import Rule, SamplingBatch

NUCLEUS_WIDTHS = (256, 4096)  # top-p first looks among this many best tokens; only then at the whole vocabulary


def distribution(logits: Tensor, sampling: SamplingBatch, columns: Tensor | None = None) -> Tensor:
    """The distribution from which each row of `logits` [N, V] is sampled, after its request's filters (DSpark §3.2.2).

    `sampling` has N rows. Returns probabilities [N, V], float32 (float64 for float64 logits). Greedy rows are one-hot
    at the lowest index of the maximum. A row with NaN, +inf, or nothing but -inf is NaN throughout. `columns` [N, V]
    i64: the token of each column; None: column v is token v.
    """
    logits = permitted(logits, sampling, columns)
    if sampling.all_greedy:
        return _one_hot(logits)
    traits, scaled = sampling.traits, logits
    if traits.tempered:
        scaled = logits / sampling.temperature.masked_fill(sampling.greedy, 1.0).to(logits.dtype).unsqueeze(1)
    if traits.min_p or traits.top_k:
        floor = torch.full((len(scaled), 1), -torch.inf, dtype=scaled.dtype, device=scaled.device)
        if traits.min_p:
            # p >= min_p * max(p), written in logits: it needs no softmax.
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


def permitted(
    logits: Tensor, sampling: SamplingBatch, columns: Tensor | None = None, deadline: float | None = None
) -> Tensor:
    """`logits` [N, V] as float32 (float64 stays) after each row's controls. The argument itself is never written.

    `columns` as in `distribution`. deadline: only for drafts; a row whose controls are not ready then (a time
    of `time.monotonic`) is -inf throughout.
    """
    result = logits if logits.dtype == torch.float64 else logits.float()
    if not sampling.controls:
        return result
    if result is logits:
        result = logits.clone()
    for control, drafted in zip(sampling.controls, sampling.drafted, strict=True):
        if control is not None:
            control.prepare(drafted)  # all before any is waited for
    rows = zip(sampling.controls, sampling.drafted, sampling.position.tolist(), strict=True)
    for row, (control, drafted, position) in enumerate(rows):
        if control is not None and deadline is not None and not control.ready(drafted, deadline):
            result[row] = -torch.inf
        elif control is not None:
            control.apply(result[row], drafted, position, None if columns is None else columns[row])
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


# ---- from the distribution to a token -------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _block(vocabulary: int) -> int:
    """Width of the blocks that rows are scanned in: the largest divisor of V up to 512, or V if that is under 32."""
    width = max(d for d in range(1, 513) if vocabulary % d == 0)
    return width if width >= 32 else vocabulary


def top(values: Tensor, kernels: Kernels | None = None) -> tuple[Tensor, Tensor]:
    """(maximum [N], its first index [N] i64) of each row of [N, V]; a NaN counts as the maximum.

    Without `kernels` in two stages, blocks and then inside the best block: torch's amax is vectorised, its argmax is
    not.
    """
    if kernels is not None and values.dtype == torch.float32:
        index = kernels.argmax(values)
        return values.gather(1, index.unsqueeze(1)).squeeze(1), index
    rows, vocabulary = values.shape
    width = _block(vocabulary)
    blocks = values.reshape(rows, vocabulary // width, width)
    block = blocks.amax(-1).argmax(-1)
    best, inside = blocks[torch.arange(rows, device=values.device), block].max(-1)
    return best, block * width + inside


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """Inverse CDF: the token [N] whose cell of `probs` [N, V] contains `uniform` [N] f64 in [0, 1).

    Rows need not be normalised, but must have some mass. A token of probability 0 is never returned. Cells lie in index
    order; sums across blocks are float64, so that the rounding of 1e5 small terms does not shift each other's cells.
    """
    rows, vocabulary = probs.shape
    width = _block(vocabulary)
    blocks = probs.reshape(rows, vocabulary // width, width)
    edges = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
    block, point = _cell(edges, uniform.double().unsqueeze(1) * edges[:, -1:])
    before = edges.gather(1, (block - 1).clamp_(min=0)).masked_fill_(block == 0, 0.0)
    weights = blocks[torch.arange(rows, device=probs.device), block.squeeze(1)]
    inside, _ = _cell(weights.cumsum(-1, dtype=torch.float64), point - before)
    return (block * width + inside).squeeze(1)


def _cell(edges: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """(index of the cell that contains `at`, `at` itself if it is below the total) [N, 1] each; edges [N, n] f64 are
    the cells' upper ends, at [N, 1].
    """
    total = edges[:, -1:]
    # Just below the total at most, so that rounding never steps past the last cell with mass.
    point = torch.minimum(at, torch.nextafter(total, total.new_zeros(())))
    # The first edge strictly above the point: an empty cell shares its edge with the one before and is skipped.
    return torch.searchsorted(edges, point, right=True).clamp_(max=edges.shape[1] - 1), point


def draw_coupled(probs: Tensor, exponential: Tensor) -> Tensor:
    """argmin_v E_v / p_v, which is argmax_v(log p_v + g_v) with Gumbel noise g = -log E. [N, V], [N, V] -> [N].

    Computed as argmax p/E: E > 0 always, so nothing is infinite and a token of probability 0 cannot win.
    """
    return top(probs / exponential)[1]


def sample(
    logits: Tensor,
    sampling: SamplingBatch,
    uniform: Tensor,
    streams: Streams,
    columns: Tensor | None = None,
    vocabulary: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Draw one token per row of `logits` [N, C], each by its own rule, as a draft slot does.

    `uniform` [N] f64 serves the ratio rows (take a whole block's at once from `Streams.uniform`), `streams` the coupled
    ones. `columns` [N, C] i64: the token, of the target's `vocabulary`, of each column; None: column v is token v.
    Returns tokens [N] and the distributions they were drawn from, [N, C], for acceptance: zero in the rows of other
    rules, None without ratio rows.
    """
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    law: Tensor | None = None
    for rule, indices, part in sampling.parts:
        rows, names = (logits, columns) if indices is None else (logits[indices], None)
        if indices is not None and columns is not None:
            names = columns[indices]
        if rule is Rule.GREEDY:
            drawn = top(permitted(rows, part, names))[1]
        else:
            probs = distribution(rows, part, names)
            if rule is Rule.COUPLED:
                # The target draws with these very numbers, whatever tokens the draft could choose from.
                noise = streams.exponential(part, vocabulary or probs.shape[1], probs.dtype)
                drawn = draw_coupled(probs, noise if names is None else noise.gather(1, names))
            else:
                drawn = draw(probs, uniform if indices is None else uniform[indices])
                if indices is None:
                    law = probs
                else:
                    law = probs.new_zeros(logits.shape) if law is None else law
                    law.index_copy_(0, indices, probs)
        if names is not None:
            drawn = names.gather(1, drawn.unsqueeze(1)).squeeze(1)
        if indices is None:
            return drawn, law
        tokens[indices] = drawn
    return tokens, law
