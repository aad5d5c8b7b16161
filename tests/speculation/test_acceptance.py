"""`accept` beyond its law: batches of all rules equal lone calls, broken rows, corners of the coin and the residual."""

import math
from typing import Any

import pytest
import torch
from dspark_kernels import Kernels, load
from torch import Tensor

from dspark_server.speculation.acceptance import Accepted, accept, residual
from dspark_server.speculation.controls import Forbidden
from dspark_server.speculation.draft_block import DraftBlock
from dspark_server.speculation.law import sample
from dspark_server.speculation.noise import CounterStreams, Purpose
from dspark_server.speculation.sampling import SamplingBatch
from tests.speculation.support import TableStreams

GAMMA, VOCABULARY = 3, 96


def mixed(count: int, seed: int) -> tuple[Tensor, Tensor, list[dict[str, Any]], list[int], list[int]]:
    """target [R, gamma + 1, V], draft [R, gamma, V], settings, lengths, draft rows: a bit of everything."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(count, GAMMA + 1, VOCABULARY, generator=generator) * 2
    draft = target[:, :GAMMA] + 0.7 * torch.randn(count, GAMMA, VOCABULARY, generator=generator)
    styles: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {},
        {"coupled": True},
        {"temperature": 0.7, "top_p": 0.9},
        {"coupled": True, "top_k": 10},
        {"min_p": 0.05, "controls": Forbidden((0, 1, 2, 3), 22)},
        {"temperature": 0.0, "controls": Forbidden(tuple(range(40)), 21)},
    ]
    options = [styles[i % len(styles)] for i in range(count)]
    lengths = [(i * 5 + i // 4) % (GAMMA + 1) for i in range(count)]
    drafting = [i for i in range(count) if lengths[i] > 0]
    return target, draft, options, lengths, [drafting.index(i) if i in drafting else -1 for i in range(count)]


def batch_of(options: list[dict[str, Any]], keys: list[int]) -> SamplingBatch:
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "coupled": False, "controls": None}
    columns = {name: [option.get(name, value) for option in options] for name, value in defaults.items()}
    return SamplingBatch.of(position=[20] * len(options), key=keys, draft_number=[2] * len(options), **columns)


def run(
    target: Tensor,
    draft: Tensor,
    options: list[dict[str, Any]],
    lengths: list[int],
    rows: list[int],
    keys: list[int],
    kernels: Kernels | None = None,
) -> tuple[Accepted, Tensor]:
    """Draft with production, judge with production."""
    streams = CounterStreams()
    drafting = [i for i, row in enumerate(rows) if row >= 0]
    tokens, laws = torch.zeros(len(drafting), GAMMA, dtype=torch.int64), []
    if drafting:
        sampling = batch_of([options[i] for i in drafting], [keys[i] for i in drafting])
        uniform = streams.uniform(Purpose.DRAFT, sampling, torch.arange(GAMMA))
        for k in range(GAMMA):
            tokens[:, k], law = sample(draft[drafting][:, k], sampling.ahead(k), uniform[:, k], streams)
            laws.append(law)
    q = torch.stack([law for law in laws if law is not None], 1) if laws and laws[0] is not None else None
    drafts = DraftBlock.of(tokens, q) if drafting else None
    logits = torch.cat([target[i, : length + 1] for i, length in enumerate(lengths)])
    row_start = [0, *torch.tensor([length + 1 for length in lengths]).cumsum(0).tolist()]
    return accept(logits, row_start, drafts, rows, batch_of(options, keys), streams, kernels), tokens


@pytest.mark.parametrize("seed", range(4))
def test_mixed_batches_equal_lone_calls(seed: int) -> None:
    """Rules, filters, prefix lengths and drafting itself all differ; nobody's tokens depend on the company."""
    count = 29
    target, draft, options, lengths, rows = mixed(count, seed)
    together, _ = run(target, draft, options, lengths, rows, list(range(count)))
    assert together.count.sum() > 0
    assert any(0 < kept < length for kept, length in zip(together.count.tolist(), lengths, strict=True))
    for i in range(count):
        row = [0] if rows[i] >= 0 else [-1]
        alone, _ = run(target[i : i + 1], draft[i : i + 1], [options[i]], [lengths[i]], row, [i])
        assert (alone.count.item(), alone.token.item()) == (together.count[i].item(), together.token[i].item())
    assert not together.failed.any()
    for name in ("native", "reference"):
        in_kernels, _ = run(target, draft, options, lengths, rows, list(range(count)), load(name))
        assert torch.equal(in_kernels.count, together.count)
        assert torch.equal(in_kernels.token, together.token)


@pytest.mark.parametrize("kernels", [None, "native", "reference"])
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {}, {"coupled": True}])
def test_a_broken_row_ends_the_cycle_before_it(options: dict[str, Any], kernels: str | None) -> None:
    """Tokens before row k are accepted as ever; only the anchor's own row can fail a request."""
    count = 24
    target, draft, _, _, _ = mixed(count, seed=9)
    lengths, rows, keys = [GAMMA] * count, list(range(count)), list(range(count))
    loaded = None if kernels is None else load(kernels)
    whole, tokens = run(target, draft, [options] * count, lengths, rows, keys, loaded)
    for k in range(GAMMA + 1):
        broken = target.clone()
        broken[::2, k, 5], broken[::4, k] = math.nan, -math.inf
        done, _ = run(broken, draft, [options] * count, lengths, rows, keys, loaded)
        hit = (whole.count >= k) & (torch.arange(count) % 2 == 0)
        assert hit.any()
        assert torch.equal(done.failed, hit & (k == 0))
        assert torch.equal(done.count, torch.where(hit, max(k - 1, 0), whole.count))
        assert torch.equal(done.token, torch.where(hit, tokens[:, k - 1] if k else -1, whole.token))


def test_greedy_rows_forbid_inside_the_block() -> None:
    """min_tokens ends in mid-block: slot 0 may not stop, slot 1 may."""
    logits = torch.tensor([[5.0, 1.0, 0.0], [5.0, 1.0, 0.0]])
    sampling = SamplingBatch.of(position=[3], key=[0], temperature=[0.0], controls=[Forbidden((0,), 4)])
    for drafted, expected in ((1, (1, 0)), (0, (0, 1))):
        draft = DraftBlock.of(torch.tensor([[drafted]]))
        done = accept(logits, [0, 2], draft, [0], sampling, CounterStreams())
        assert (done.count.item(), done.token.item()) == expected


def judged(p: list[float], q: list[float], drafted: int, coin: float, last: float) -> tuple[int, int]:
    """One ratio request with one draft token; the bonus row permits token 0 only."""
    logits = torch.tensor([p, [1.0] + [0.0] * (len(p) - 1)], dtype=torch.float64).log()
    draft = DraftBlock.of(torch.tensor([[drafted]]), torch.tensor([[q]], dtype=torch.float64))
    tables = {
        Purpose.COIN: torch.tensor([[coin]], dtype=torch.float64),
        Purpose.RESIDUAL: torch.full((1, 2), last, dtype=torch.float64),
    }
    done = accept(logits, [0, 2], draft, [0], SamplingBatch.of(position=[0], key=[0]), TableStreams(tables))
    return int(done.count), int(done.token)


def test_a_coin_of_zero_does_not_accept_the_impossible() -> None:
    assert judged([0.5, 0.5, 0.0], [0.2, 0.2, 0.6], drafted=2, coin=0.0, last=0.6) == (0, 1)
    assert judged([0.5, 0.5, 0.0], [0.2, 0.2, 0.6], drafted=1, coin=0.0, last=0.6) == (1, 0)


def test_the_coin_is_compared_strictly() -> None:
    p, q = [0.25, 0.75], [0.5, 0.5]
    exact = float(torch.tensor(p, dtype=torch.float64).log().softmax(-1)[0]) / 0.5
    assert judged(p, q, drafted=0, coin=exact * (1 - 1e-15), last=0.5) == (1, 0)
    assert judged(p, q, drafted=0, coin=exact * (1 + 1e-15), last=0.5) == (0, 1)
    assert judged(p, p, drafted=0, coin=1 - 2.0**-52, last=0.5)[0] == 1


def test_residual_is_what_p_has_left_and_falls_back_to_p() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [1.0, 0.0, 0.0]])
    q = torch.tensor([[0.2, 0.6, 0.2], [0.5, 0.3, 0.2], [0.0, 1.0, 0.0]])
    drafted = torch.tensor([1, 0, 1])
    torch.testing.assert_close(
        residual(p, q, drafted), torch.tensor([[0.3, 0.0, 0.0], [0.5, 0.3, 0.2], [1.0, 0.0, 0.0]])
    )
    # One-hot q: the drafted token goes, the rest stays; if there is no rest, p.
    torch.testing.assert_close(
        residual(p, None, torch.tensor([1, 0, 0])), torch.tensor([[0.5, 0.0, 0.2], [0.0, 0.3, 0.2], [1.0, 0.0, 0.0]])
    )


def test_no_draft_is_plain_sampling() -> None:
    """All lengths 0: no draft tensors at all, and the same tokens as a request that sat out among drafting ones."""
    target, _, options, _, _ = mixed(14, seed=2)
    sampling = batch_of(options, list(range(14)))
    plain = accept(target[:, 0], range(15), None, [-1] * 14, sampling, CounterStreams())
    unused = DraftBlock.of(torch.zeros(2, GAMMA, dtype=torch.int64))
    again = accept(target[:, 0], range(15), unused, torch.full((14,), -1), sampling, CounterStreams())
    assert plain.count.tolist() == [0] * 14
    assert plain.token.tolist() == again.token.tolist()
