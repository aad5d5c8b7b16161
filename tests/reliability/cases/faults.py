"""A fault that concerns one step, or one request in it."""

import time
from collections.abc import Callable

from tests.reliability.cases.bench import CASES, Bench, Case, case, fates, one_error_each
from tests.reliability.support import CANARY, bodies


def _step_fails(point: str, fault: str) -> Callable[[Bench], str]:
    def run(bench: Bench) -> str:
        server = bench.start(engine={"max_num_seqs": 6})
        asked = bodies(12, 80)
        expected = [answer.tokens for answer in server.ask_all(asked)]
        with bench.canaries(server) as canaries, server.asking(asked) as answers:
            server.wait(lambda: server.figures()["running"] >= 5, "busy")
            server.arm(**{point.replace(".", "__"): fault})
            time.sleep(0.3)
            server.arm()
            assert server.ready() and server.live()
        one_error_each(answers)
        failed = [answer for answer in answers if not answer.ok]
        assert len(failed) <= 6, fates(answers)
        assert len(failed) + canaries.refused >= 1, "the fault hit nobody"
        for answer, tokens in zip(answers, expected, strict=True):
            assert not answer.ok or answer.tokens == tokens, "tokens changed"
        return f"{fates(answers)}; {canaries.equal} canaries equal, {canaries.refused} failed; ready; no block lost"

    return run


_ONE = "those in the step get one error each, those waiting finish with the same tokens; ready; no block lost"
for _name, _point, _fault in (
    ("forward raises once", "step.verify", "raise:RuntimeError*1"),
    ("out of memory in the forward", "step.verify", "raise:MemoryError*1"),
    ("out of memory in the sampler", "step.sample", "raise:MemoryError*1"),
    ("out of memory in the block allocator", "blocks.allocate", "raise:MemoryError*1@2"),
    ("allocator exhausted", "blocks.allocate", "raise:CapacityError*1@1"),
    ("scheduler raises", "step.plan", "raise:RuntimeError*1"),
    ("commit fails before anyone", "step.commit", "raise:RuntimeError*1"),
    ("commit fails in the middle of a batch", "commit.request", "raise:RuntimeError*1@3"),
):
    CASES.append(Case(_name, _ONE, _step_fails(_point, _fault)))


def _one_fails(point: str, fault: str, most: int) -> Callable[[Bench], str]:
    def run(bench: Bench) -> str:
        server = bench.start()
        asked = bodies(8)
        expected = [answer.tokens for answer in server.ask_all(asked)]
        with bench.canaries(server) as canaries, server.asking(asked) as answers:
            server.wait(lambda: server.figures()["running"] >= 5, "busy")
            server.arm(**{point.replace(".", "__"): fault})
            time.sleep(0.3)
            server.arm()
        one_error_each(answers)
        failed = sum(not answer.ok for answer in answers) + canaries.refused
        assert failed <= most and (most == 0 or failed), f"{failed} failed"
        for answer, tokens in zip(answers, expected, strict=True):
            assert not answer.ok or answer.tokens == tokens, "tokens changed"
        drafts = server.figures()["failed_drafts"]
        without = f"; {drafts:.0f} steps without a draft" if drafts else ""
        return f"{failed} failed, {len(answers) + canaries.equal - failed} equal{without}"

    return run


_SOLE = "that request fails with one error, the others' tokens are the same"
_NOBODY = "nobody fails, tokens are the same"
for _name, _expected, _point, _fault, _most in (
    ("NaN in one row of the target", _SOLE, "target.logits", "nan:0*1", 1),
    ("infinity in one row of the target", _SOLE, "target.logits", "inf:0*1", 1),
    ("NaN in every confidence", _NOBODY, "draft.survival", "nan", 0),
    ("drafter raises", _NOBODY, "step.draft", "raise:RuntimeError*5", 0),
    ("out of memory in the drafter", _NOBODY, "step.draft", "raise:MemoryError*5", 0),
    ("detokenizer raises", _SOLE, "text.push", "raise:ValueError*1", 1),
):
    CASES.append(Case(_name, _expected, _one_fails(_point, _fault, _most)))


@case("tokenizer raises", "that request gets a 500 that says nothing; the next is served")
def _tokenizer(bench: Bench) -> str:
    server = bench.start()
    with bench.canaries(server):
        server.arm(tokenizer__encode="raise:ValueError*1")
        answer = server.ask(CANARY | {"prompt": "abc"})
        assert answer.status == 500 and answer.error == "Internal server error.", answer
        assert server.ask(CANARY | {"prompt": "abc"}).ok
    return f"{answer.status} {answer.error!r}, then 200"
