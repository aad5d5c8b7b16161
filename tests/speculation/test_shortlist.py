"""The short list: what the dense head would say of the candidates, K = V being the dense drafter; exact whatever K."""

import torch
from dspark_kernels import load
from torch import Tensor

from dspark_server.speculation.acceptance import accept, residual
from dspark_server.speculation.controls import Forbidden
from dspark_server.speculation.draft_block import DraftBlock
from dspark_server.speculation.heads import VanillaHead
from dspark_server.speculation.law import sample
from dspark_server.speculation.noise import CounterStreams, Purpose
from dspark_server.speculation.sampling import SamplingBatch
from dspark_server.speculation.shortlist import Shortlist, Successors
from tests.speculation.support import TableStreams

V, RANK = 40, 4


def head() -> VanillaHead:
    noise = torch.Generator().manual_seed(2)
    w1, w2 = (torch.randn(V, RANK, generator=noise) for _ in range(2))
    return VanillaHead(w1, w2, load())


def test_successors_are_the_best_of_the_whole_product() -> None:
    markov, previous = head(), torch.tensor([3, 7, 3])
    table = Successors(markov, 5)
    whole = markov.bias(markov.embedding(previous))
    for _ in range(2):  # computed, then read
        assert torch.equal(table.of(previous).sort().values, whole.topk(5).indices.sort().values)


def test_candidates_have_the_dense_logits_and_none_counts_twice() -> None:
    markov, previous = head(), torch.tensor([3, 7, 11])
    base = torch.randn(3, 6, V, generator=torch.Generator().manual_seed(3))
    short = Shortlist(markov, 12)
    best = short.best(base)
    latent = markov.embedding(previous)
    columns, logits = short.logits(base[:, 2], best[:, 2], previous, latent)
    dense = base[:, 2] + markov.bias(latent)
    kept = logits.isfinite()
    torch.testing.assert_close(logits[kept], dense.gather(1, columns)[kept])
    for row in range(3):
        tokens = columns[row, kept[row]].tolist()
        assert len(tokens) == len(set(tokens))
        assert set(tokens) == set(columns[row].tolist())
        assert set(base[row, 2].topk(12).indices.tolist()) <= set(tokens)
        assert set(markov.bias(latent)[row].topk(6).indices.tolist()) <= set(tokens)


def test_residual_of_a_short_list_is_that_of_the_dense_law() -> None:
    noise = torch.Generator().manual_seed(4)
    p = torch.rand(5, V, generator=noise).softmax(-1)
    columns = torch.stack([torch.randperm(V, generator=noise)[:6] for _ in range(5)])
    columns[:, 5] = columns[:, 0]  # twice, its mass once
    q = torch.rand(5, 6, generator=noise)
    q[:, 5] = 0
    q /= q.sum(1, keepdim=True)
    dense = torch.zeros(5, V).scatter_add(1, columns, q)
    drafted = columns[:, 1]
    torch.testing.assert_close(residual(p, q, drafted, columns), residual(p, dense, drafted))


def both_ways(logits: Tensor, columns: Tensor, sampling: SamplingBatch) -> None:
    """A draft over columns is the dense draft whose other tokens have no chance, token by token, coin by coin."""
    n, streams = len(logits), CounterStreams()
    dense = torch.full((n, V), -torch.inf).scatter(1, columns, logits)
    # A uniform picks by place in the list, so both lists must be in the same order.
    order = columns.argsort(1)
    columns, logits = columns.gather(1, order), logits.gather(1, order)
    uniform = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    short, short_law = sample(logits, sampling, uniform, streams, columns, V)
    full, full_law = sample(dense, sampling, uniform, streams)
    assert torch.equal(short, full)
    assert (short_law is None) == (full_law is None)
    target = torch.randn(2 * n, V, generator=torch.Generator().manual_seed(10)) * 2
    outcomes = []
    for law, names in ((short_law, columns[:, None]), (full_law, None)):
        draft = DraftBlock.of(short[:, None], None if law is None else law[:, None], names)
        outcomes.append(accept(target, list(range(0, 2 * n + 1, 2)), draft, range(n), sampling, streams))
    assert torch.equal(outcomes[0].count, outcomes[1].count)
    assert torch.equal(outcomes[0].token, outcomes[1].token)
    assert 0 < int(outcomes[0].count.sum()) < n


def test_every_rule_and_filter_over_a_short_list_is_the_dense_one() -> None:
    n = 60
    noise = torch.Generator().manual_seed(5)
    columns = torch.stack([torch.randperm(V, generator=noise)[:12] for _ in range(n)])
    logits = torch.randn(n, 12, generator=noise) * 3
    logits[::7, 3] = -torch.inf
    sampling = SamplingBatch.of(
        position=list(range(5, 5 + n)),
        key=list(range(n)),
        temperature=[(0.0, 0.7, 1.0)[i % 3] for i in range(n)],
        coupled=[i % 2 == 1 for i in range(n)],
        top_k=[(0, 4)[i % 4 == 0] for i in range(n)],
        top_p=[(1.0, 0.8)[i % 5 == 0] for i in range(n)],
        min_p=[(0.0, 0.05)[i % 6 == 0] for i in range(n)],
        controls=[Forbidden((int(columns[i, 0]), 39), 1000) if i % 2 else None for i in range(n)],
    )
    both_ways(logits, columns, sampling)


def test_the_law_is_the_targets_whatever_the_list() -> None:
    """Exactly, for one position: sum over drafts of q(x) times what acceptance does with x is p."""
    p = torch.tensor([0.4, 0.1, 0.3, 0.2], dtype=torch.float64)
    columns, q = torch.tensor([[2, 1]]), torch.tensor([[0.3, 0.7]], dtype=torch.float64)
    grid = 2100  # a multiple of 7 and of 3, so that every threshold falls between points: the sums are exact
    coins = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    total = torch.zeros(4, dtype=torch.float64)
    for token, mass in zip([2, 1], [0.3, 0.7], strict=True):
        n = grid
        draft = DraftBlock.of(torch.full((n, 1), token), q.expand(n, 1, 2), columns.expand(n, 1, 2))
        logits = p.log().expand(2 * n, 4)
        sampling = SamplingBatch.of(position=[1] * n, key=list(range(n)))
        for last in ((torch.arange(60, dtype=torch.float64) + 0.5) / 60).tolist():
            ends = torch.full((n, 3), last, dtype=torch.float64)
            streams = TableStreams({Purpose.COIN: coins[:, None].expand(n, 3), Purpose.RESIDUAL: ends})
            done = accept(logits, list(range(0, 2 * n + 1, 2)), draft, range(n), sampling, streams)
            first = torch.where(done.count == 1, token, done.token)
            total += mass * torch.bincount(first, minlength=4).double() / n / 60
    torch.testing.assert_close(total, p, atol=1e-9, rtol=0)
