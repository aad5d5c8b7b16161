"""Only rows that are known to be finite are published: a NaN in one request's prompt does not reach another."""

import pytest
import torch
from torch import Tensor

from dspark_server.engine.core import EngineCore
from dspark_server.engine.executor import are_finite, leading
from dspark_server.engine.request import Request
from dspark_server.runtime.batch import Run
from tests.engine.support import greedy, prompts, tiny_core


def added(core: EngineCore, prompt: list[int]) -> Request:
    request = core.new_request(prompt, greedy(8), nonce=0)
    core.batcher.add(request)
    return request


def break_a_row(core: EngineCore, row: int) -> None:
    """The next pass holds a NaN in one token's hidden state, from the first layer on; later ones do not."""
    target = core.loop.executor.target
    embed = target.embed

    def broken(tokens: Tensor) -> Tensor:
        target.embed = embed
        hidden = embed(tokens)
        hidden[row, 3] = torch.nan
        return hidden

    target.embed = broken


@pytest.mark.parametrize("row", [0, 5, 15])
@pytest.mark.parametrize("drafter", [True, False])
def test_a_chunk_with_a_broken_row_is_published_up_to_it(row: int, drafter: bool) -> None:
    """The chunk gives no logits, and the next request finds the prefix before its owner fails."""
    prompt = prompts(1, shortest=40, longest=40)[0]
    innocent = [*prompt[:20], 7, 8, 9]
    expected = tiny_core(drafter=False).generate([innocent], greedy(8))[0]
    core = tiny_core(drafter=drafter, max_num_batched_tokens=16, max_num_seqs=4)
    break_a_row(core, row)
    victim = added(core, prompt)
    core.loop.step()
    assert (victim.computed, victim.finite, victim.published) == (16, row, row // 4)
    other = added(core, innocent)
    while core.loop.has_work:
        core.loop.step()
    assert victim.error is not None
    assert "NaN" in victim.error
    assert other.error is None
    assert other.output == expected
    assert other.cached_tokens == row // 4 * 4


def test_whole_chunks_are_published_at_once() -> None:
    prompt = prompts(1, shortest=40, longest=40)[0]
    core = tiny_core(max_num_batched_tokens=16, max_num_seqs=4)
    request = added(core, prompt)
    core.loop.step()
    assert (request.computed, request.finite, request.published) == (16, 16, 4)


def test_leading_rows() -> None:
    hidden, runs = torch.zeros(9, 3), [Run([5] * length, 0, (), 1) for length in (4, 2, 2)]
    assert leading(are_finite(hidden), runs) == [4, 2, 2]
    hidden[2, 1], hidden[6, 0], hidden[8] = torch.nan, torch.inf, torch.nan  # the last is padding
    assert leading(are_finite(hidden), runs) == [2, 2, 0]
