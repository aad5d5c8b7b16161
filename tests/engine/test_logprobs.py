"""Log-probabilities are the target's: with a drafter or without, in chunks, over cached prefixes, after preemption."""

import math

import pytest
import torch

from dspark_server.engine.core import EngineCore
from dspark_server.engine.logprobs import TokenLogprob, token_logprobs
from dspark_server.engine.request import Request, SamplingParams
from dspark_server.runtime.batch import Batch, Run
from dspark_server.runtime.kv import KVPool
from dspark_server.runtime.paging import BlockTable, CacheLayout
from tests.engine.support import prompts, tiny_core


def run(
    core: EngineCore, asked: list[tuple[list[int], SamplingParams]]
) -> list[tuple[Request, list[TokenLogprob], list[TokenLogprob | None] | None]]:
    """Every request to its end, with all that was said of its tokens and its prompt."""
    requests = [core.new_request(prompt, params, nonce=n) for n, (prompt, params) in enumerate(asked)]
    said: dict[Request, list[TokenLogprob]] = {request: [] for request in requests}
    of_prompt: dict[Request, list[TokenLogprob | None] | None] = dict.fromkeys(requests)
    for request in requests:
        core.batcher.add(request)
    while core.loop.has_work:
        for output in core.loop.step():
            said[output.request] += output.logprobs or []
            if output.prompt_logprobs is not None:
                assert of_prompt[output.request] is None, "said twice"
                of_prompt[output.request] = output.prompt_logprobs
    return [(request, said[request], of_prompt[request]) for request in requests]


@torch.inference_mode()
def laws(core: EngineCore, tokens: list[int]) -> torch.Tensor:
    """What the target alone says of each next token: log-probabilities [n, V] from one pass over everything."""
    target = core.loop.executor.target  # type: ignore[attr-defined]
    dtype = target.embed.weight.dtype
    pool = KVPool(64, CacheLayout.of([target.caches], 16, dtype.itemsize), dtype)
    batch = Batch.of([Run(tokens, 0, [BlockTable(0, list(range(64)))], len(tokens))], pool.groups)
    return target.logits(target.forward(batch, pool.layers(0), ())[0]).log_softmax(-1)


def check(entry: TokenLogprob | None, token: int, law: torch.Tensor, count: int) -> None:
    assert entry is not None
    assert entry.token == token
    assert entry.logprob == pytest.approx(float(law[token]), abs=2e-4)
    assert len(entry.top) == count
    for (name, value), wanted in zip(entry.top, law.topk(count).values.tolist(), strict=True):
        assert value == pytest.approx(wanted, abs=2e-4)
        assert float(law[name]) == pytest.approx(value, abs=2e-4)
    if entry.rank == 1 and count:
        assert entry.logprob == entry.top[0][1]  # exactly: clients compare them
    assert int((law > law[token] + 1e-4).sum()) < entry.rank <= int((law >= law[token] - 1e-4).sum())


@pytest.mark.parametrize("drafter", [True, False])
@pytest.mark.parametrize("tight", [False, True])
def test_they_are_the_targets(drafter: bool, tight: bool) -> None:
    """`tight`: chunks of 20 tokens and a pool that preempts; prompts of later rounds lie in the prefix cache."""
    settings = {"num_blocks": 40, "max_num_batched_tokens": 24, "max_num_seqs": 6} if tight else {}
    core = tiny_core(drafter=drafter, **settings)
    kinds = [
        SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=3, prompt_logprobs=2),
        SamplingParams(max_tokens=12, temperature=1.0, ignore_eos=True, logprobs=0, repetition_penalty=1.3),
        SamplingParams(max_tokens=12, temperature=0.7, ignore_eos=True, seed=4, prompt_logprobs=0),
        SamplingParams(max_tokens=12, temperature=1.0, ignore_eos=True),
    ]
    asked = [(prompt, kinds[index % 4]) for index, prompt in enumerate(prompts(16))]
    for _ in range(2):
        for request, said, of_prompt in run(core, asked):
            law = laws(core, request.tokens)
            if request.params.logprobs is None:
                assert said == []
            else:
                assert [entry.token for entry in said] == request.output
                for place, entry in enumerate(said, start=request.prompt_length):
                    check(entry, request.tokens[place], law[place - 1], request.params.logprobs)
            if request.params.prompt_logprobs is None:
                assert of_prompt is None
            else:
                assert of_prompt is not None
                assert len(of_prompt) == request.prompt_length
                assert of_prompt[0] is None
                for place, prompt_entry in enumerate(of_prompt[1:], start=1):
                    check(prompt_entry, request.tokens[place], law[place - 1], request.params.prompt_logprobs)
    assert core.loop.stats.prefix_hits > 0
    if tight:
        assert core.loop.stats.preemptions > 0
    if drafter:
        assert core.loop.stats.accepted_tokens > 0


def test_ties_and_ranks() -> None:
    scores = torch.tensor([[0.0, 2.0, 2.0, -math.inf]])
    first, second, never = (token_logprobs(scores, [token], 2)[0] for token in (1, 0, 3))
    assert (first.rank, second.rank, never.rank) == (1, 3, 4)
    assert first.logprob == first.top[0][1]
    assert {name for name, _ in first.top} == {1, 2}
    assert never.logprob == -math.inf
