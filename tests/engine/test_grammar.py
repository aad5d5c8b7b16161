"""Forms are followed to the token, whatever was drafted across their end."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from time import monotonic
from typing import Any

import pytest
import torch
from llguidance import LLParserLimits
from transformers import PreTrainedTokenizerFast

from dspark_server.engine import grammar
from dspark_server.engine.grammar import SLOW_MASKS, CompiledForm, FormError, FormMatcher, GrammarCompiler
from dspark_server.engine.request import CompiledGrammar, FinishReason, SamplingParams
from dspark_server.engine.trace import StepTrace
from dspark_server.speculation import law
from dspark_server.speculation.controls import Controls
from dspark_server.speculation.draft_block import DraftBlock
from dspark_server.speculation.sampling import SamplingBatch

from .conftest import VOCABULARY
from .forms import TOKENIZER, admits
from .support import on_cycles, prompts, tiny_core


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return TOKENIZER


def permitted(form: CompiledForm, stops: frozenset[int], said: list[int], drafted: list[int]) -> list[int]:
    matcher = form.start(stops)
    for token in said:
        matcher.commit([token])
    return matcher.mask(drafted).nonzero().squeeze(1).tolist()


FOLLOWED = {
    "schema": (
        "json",
        '{"type": "object", "properties": {"a": {"enum": ["b", "bc"]}}, "required": ["a"]}',
        '{"a":"bc"}',
    ),
    "regex": ("regex", r"\d{2}(x|\w)*", "12xy"),
    "gbnf": ("grammar", 'root ::= "(" root ")" | [a-c]+', "((ab))"),
    "lark": ("grammar", 'start: "(" start ")" | WORD ("," WORD)*\nWORD: /[a-c]+/', "(ab,c)"),
}


def compiled(compiler: GrammarCompiler, kind: str, text: str) -> CompiledForm:
    return {"json": compiler.json_schema, "regex": compiler.regex, "grammar": compiler.grammar}[kind](text)


@pytest.mark.parametrize("case", FOLLOWED)
def test_drafted_and_committed_are_the_same(
    case: str, tokenizer: PreTrainedTokenizerFast, compiler: GrammarCompiler
) -> None:
    """Also to one matcher that has been asked about everything before, and about what cannot follow."""
    stops = frozenset({tokenizer.eos_token_id})
    kind, text, said_text = FOLLOWED[case]
    form = compiled(compiler, kind, text)
    answer = tokenizer.encode(said_text)
    asked = form.start(stops)
    for place in range(len(answer) + 1):
        wanted = permitted(form, stops, answer[:place], [])
        assert place == len(answer) or answer[place] in wanted
        assert permitted(form, stops, [], answer[:place]) == wanted
        for said in range(place):
            assert permitted(form, stops, answer[:said], answer[said:place]) == wanted
    for start in range(0, len(answer), 2):
        for nonsense in ([300], [answer[0], 511], [tokenizer.eos_token_id], [7, 7]):
            asked.mask(nonsense)
        for length in range(len(answer)):
            asked.mask(answer[:length])
        asked.commit(answer[start : start + 2])
    assert asked.mask(()).nonzero().squeeze(1).tolist() == permitted(form, stops, answer, [])
    assert asked.mask(())[tokenizer.eos_token_id]


GRAMMARS = {
    "lark": ('start: "a" /[0-9]+/ | start "+" start', "a1+a22", "a"),
    "lark with a schema": ('start: "x" %json {"type": "integer"}', "x-5", "x"),
    "a recursive rule": ('root ::= "(" root ")" | ""', "(())", "(()"),
    "names with hyphens": ('root ::= one-two+\none-two ::= "1" | "2" # | "3"', "121", "3"),
    "code points": (r'root ::= "\u00e9" [\u0000-\u0009\U0001F600-\U0001F602] "\x41"', "é😁A", "é😀"),
    "escapes": (r'root ::= "\u0022\\" [\]\-\\a-c\u005e]+ "/" [/]', '"\\]-\\b^//', '"\\d//'),
    "alternatives on lines": ('root ::= a\n  # the other\n  | b\na ::= "|\\n|"\nb ::= "y"\n', "|\n|", "|\n"),
    "counts": ('root ::= ("a" | "b"){2,3} "c"?', "abac", "abab"),
    "not in a class": (r'root ::= [^"\\\x7F\x00-\x1F]{2}', "é]", 'a"'),
}


@pytest.mark.parametrize("case", GRAMMARS)
def test_grammars_in_both_notations(case: str, compiler: GrammarCompiler) -> None:
    text, fits, does_not = GRAMMARS[case]
    form = compiler.grammar(text)
    assert admits(form, fits)
    assert not admits(form, does_not)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("root ::= missing", "missing"),
        ('rule ::= "a"', "root"),
        ('root ::= "a', "line 1"),
        (r'root ::= "\uD800"', "no character"),
        ("root ::= " + "(" * 3000 + '"a"' + ")" * 3000, "nested too deeply"),
        ("start: missing", "missing"),
        ("start: a\na[max_tokens=2]: /[a-c]+/", "max_tokens"),
        ("neither of them", "Expected"),
        ("start: /(?=a)/", "look-ahead"),
        ("\n".join(f"r{n} ::= r{n + 1} r{n + 1}" for n in range(60)) + '\nr60 ::= "a"\nroot ::= r0', "too big"),
    ],
)
def test_grammars_that_cannot_be_compiled(text: str, why: str, compiler: GrammarCompiler) -> None:
    with pytest.raises(FormError, match=why):
        compiler.grammar(text)


def test_a_mask_that_needs_too_many_operations_fails_its_form(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it is compiled if that is the first one, else in the answer; what was known before stays so."""
    monkeypatch.setattr(grammar, "LIMITS", LLParserLimits(step_max_items=1))
    with pytest.raises(FormError, match="too complex"):
        compiler.grammar('start: start start | "a" | "(" start ")" | /[a-c]+/')
    monkeypatch.setattr(grammar, "LIMITS", LLParserLimits(step_lexer_fuel=500))
    matcher = compiler.regex("([ab]{1,200}c?){50}").start(frozenset({256}))
    first, answer = matcher.mask(()), TOKENIZER.encode("abcabcabc")
    assert first.any()
    assert matcher.failure is None
    assert [bool(matcher.mask(answer[:length]).any()) for length in range(8)][-1] is False
    assert matcher.failure is not None
    assert "cannot be followed further: lexer error: too many" in matcher.failure
    assert not matcher.over()
    assert matcher.mask(()) is first


def test_slow_masks_are_counted_by_the_processor_s_clock(compiler: GrammarCompiler) -> None:
    form = compiler.regex("[ab]*")
    ticks = iter(range(1000))
    matcher = form.start(frozenset({256}), lambda: next(ticks))
    for number in range(SLOW_MASKS):
        assert matcher.failure is None
        assert matcher.mask(TOKENIZER.encode("ab" * number)).any()
    assert f"{SLOW_MASKS} masks" in str(matcher.failure)
    assert not matcher.mask(TOKENIZER.encode("b")).any()
    assert next(ticks) == 2 * SLOW_MASKS


def test_masks_begun_before_a_commit_are_right_after_it(compiler: GrammarCompiler) -> None:
    """Nothing waits for them: a commit finds some done, some being computed, some not begun."""
    stops = frozenset({TOKENIZER.eos_token_id})
    for case in FOLLOWED:
        kind, text, said = FOLLOWED[case]
        form, answer = compiled(compiler, kind, text), TOKENIZER.encode(said)
        wanted = [permitted(form, stops, answer[:place], []) for place in range(len(answer) + 1)]
        for count in (1, 2, 3):
            matcher = form.start(stops)
            for place in range(0, len(answer), count):
                for length in range(1, 6):
                    matcher.prepare(answer[place : place + length])
                    matcher.prepare([*answer[place : place + length], 511])
                matcher.commit(answer[place : place + count])
                after = min(place + count, len(answer))
                assert matcher.mask(()).nonzero().squeeze(1).tolist() == wanted[after]
                assert matcher.mask(answer[after : after + 1]).nonzero().squeeze(1).tolist() == wanted[after:][:2][-1]


def test_masks_of_all_rows_are_computed_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = GrammarCompiler(TOKENIZER, VOCABULARY, threads=3)
    matchers = [compiler.regex(f"[ab]{{{least},}}").start(frozenset({256})) for least in range(1, 4)]
    for matcher in matchers:
        matcher.mask(())
    together, compute = threading.Barrier(3, timeout=60), FormMatcher._permitted

    def at_once(self: FormMatcher, prefix: tuple[int, ...]) -> Any:
        together.wait()
        return compute(self, prefix)

    monkeypatch.setattr(FormMatcher, "_permitted", at_once)
    controls = [Controls(VOCABULARY, [0], grammar=matcher) for matcher in matchers]
    sampling = SamplingBatch.of(position=[2] * 3, key=[0] * 3, controls=controls)
    letter = TOKENIZER.encode("a")
    logits = law.permitted(torch.zeros(3, VOCABULARY), replace(sampling, drafted=(tuple(letter),) * 3))
    assert logits.isfinite()[:, 256].tolist() == [True, False, False]
    assert logits.isfinite()[:, letter[0]].all()


def test_a_mask_that_is_late_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = GrammarCompiler(TOKENIZER, VOCABULARY, threads=1)
    matcher = compiler.regex("[ab]{3,}").start(frozenset({256}))
    matcher.mask(())
    allowed, compute, letter = threading.Event(), FormMatcher._permitted, tuple(TOKENIZER.encode("a"))

    def late(self: FormMatcher, prefix: tuple[int, ...]) -> Any:
        assert allowed.wait(60)
        return compute(self, prefix)

    monkeypatch.setattr(FormMatcher, "_permitted", late)
    sampling = SamplingBatch.of(position=[2], key=[0], controls=[Controls(VOCABULARY, [0], grammar=matcher)])
    sampling = replace(sampling, drafted=(letter,))
    logits = torch.zeros(1, VOCABULARY)
    assert law.permitted(logits, sampling, deadline=monotonic() + 0.001).isneginf().all()
    threading.Timer(0.05, allowed.set).start()
    in_time = law.permitted(logits, sampling, deadline=monotonic() + 60)
    assert in_time.isfinite().any()
    assert torch.equal(in_time, law.permitted(logits, sampling))


@pytest.mark.parametrize("texts", [["😀", 'a"b\\c'], ["é\n", "e"], ["", "a"]])
def test_choices_are_taken_literally(
    texts: list[str], tokenizer: PreTrainedTokenizerFast, compiler: GrammarCompiler
) -> None:
    stops = frozenset({tokenizer.eos_token_id})
    for text in texts:
        assert tokenizer.eos_token_id in permitted(compiler.choice(texts), stops, tokenizer.encode(text), [])


@pytest.mark.parametrize("schema", ["no json", "[1]", '{"type": "bogus"}', '{"$ref": "#/x"}'])
def test_a_form_that_cannot_be_compiled(schema: str, compiler: GrammarCompiler) -> None:
    with pytest.raises(FormError):
        compiler.json_schema(schema)


def test_a_failed_matcher_permits_nothing_and_is_not_complete(compiler: GrammarCompiler) -> None:
    """Its answer must end in an error, not in a stop."""
    matcher = compiler.regex("[a-d]{9}").start(frozenset({256}))
    matcher.commit([1])  # no such letter
    assert not matcher.mask(()).any()
    assert matcher.failure is not None
    assert not matcher.over()


# ---- in the engine -----------------------------------------------------------------------------------------------

SAMPLED = {
    "greedy": SamplingParams(max_tokens=24, temperature=0.0),
    "seeded": SamplingParams(max_tokens=24, temperature=1.0, seed=3),
    "free": SamplingParams(max_tokens=24, temperature=1.0),
}
ENDS = {
    "stopped": {"stop_token_ids": frozenset({256})},
    "no end token": {},
    "end token not allowed": {"stop_token_ids": frozenset({256}), "allowed_token_ids": tuple(range(256))},
    "end token too early": {"stop_token_ids": frozenset({256}), "min_tokens": 20},
}


@pytest.mark.parametrize("kind", SAMPLED)
@pytest.mark.parametrize("end", ENDS)
def test_an_answer_ends_where_its_form_is_complete(kind: str, end: str, compiler: GrammarCompiler) -> None:
    """Drafts go across that place; the answer does not, nor does it fail there."""
    form: CompiledGrammar = compiler.regex("([a-d]{3}x){2}y?")
    own = replace(SAMPLED[kind], grammar=form, ignore_eos=True, **ENDS[end])  # type: ignore[arg-type]
    answers = []
    for drafter in (True, False):
        core = tiny_core(drafter=drafter)
        core.eos_token_ids = frozenset()  # that of the fixture is a letter here
        requests = [core.new_request(prompt, own, nonce=n) for n, prompt in enumerate(prompts(6))]
        for request in requests:
            core.batcher.add(request)
        while core.loop.has_work:
            core.loop.step()
        for request in requests:
            assert request.finish_reason is FinishReason.STOP, request.error
            text = [token for token in request.output if token != 256]
            assert len(text) in (8, 9)
        answers.append([request.output for request in requests])
        if drafter:
            assert core.loop.stats.accepted_tokens > 0
    if kind != "free":
        assert answers[0] == answers[1]


def test_an_answer_that_is_complete_with_its_last_token_was_not_cut_short(compiler: GrammarCompiler) -> None:
    core = tiny_core()
    own = SamplingParams(max_tokens=8, temperature=0.0, grammar=compiler.regex("[a-d]{8}"))
    cut = replace(own, grammar=compiler.regex("[a-d]{9}"))
    requests = [core.new_request(prompts(1)[0], params, nonce=0) for params in (own, cut)]
    for request in requests:
        core.batcher.add(request)
    while core.loop.has_work:
        core.loop.step()
    assert [request.finish_reason for request in requests] == [FinishReason.STOP, FinishReason.LENGTH]


@pytest.mark.parametrize("drafter", [True, False])
def test_a_form_that_costs_too_much_ends_its_own_request(
    drafter: bool, compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar, "MASK_SECONDS", -1.0)  # every mask is slow
    core = tiny_core(drafter=drafter)
    core.eos_token_ids = frozenset()
    plain = SamplingParams(max_tokens=SLOW_MASKS + 8, temperature=0.0)
    params = [plain, replace(plain, grammar=compiler.regex("[a-z]*x")), plain]
    requests = [core.new_request(prompt, own, nonce=0) for prompt, own in zip(prompts(3), params, strict=True)]
    for request in requests:
        core.batcher.add(request)
    while core.loop.has_work:
        core.loop.step()
    assert [request.finish_reason for request in requests] == [
        FinishReason.LENGTH,
        FinishReason.ERROR,
        FinishReason.LENGTH,
    ]
    assert requests[1].impossible
    assert "masks took over" in str(requests[1].error)
    assert 0 < len(requests[1].output) <= SLOW_MASKS


@pytest.mark.parametrize("kind", SAMPLED)
@pytest.mark.parametrize("drafter", [True, False])
def test_the_step_thread_computes_no_mask(
    drafter: bool, kind: str, compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that acceptance needs have begun before the pass; those of a draft begin with its slot."""
    computed_by: list[str] = []
    begun, compute, prepare = 0, FormMatcher._permitted, FormMatcher.prepare

    def recorded(self: FormMatcher, prefix: tuple[int, ...]) -> Any:
        computed_by.append(threading.current_thread().name)
        return compute(self, prefix)

    def counted(self: FormMatcher, drafted: Sequence[int]) -> None:
        nonlocal begun
        before = len(self._masks)
        prepare(self, drafted)
        begun += len(self._masks) - before

    monkeypatch.setattr(FormMatcher, "_permitted", recorded)
    monkeypatch.setattr(FormMatcher, "prepare", counted)
    core = tiny_core(drafter=drafter)
    core.eos_token_ids = frozenset()
    at_pass = passes = 0

    def watched(cycle: Any) -> None:
        verify = cycle.verify

        def verified(block: DraftBlock | None) -> tuple[torch.Tensor, list[int]]:
            nonlocal at_pass
            at_pass = begun
            return verify(block)

        cycle.verify = verified

    def judged(step: StepTrace) -> None:
        nonlocal passes
        passes += 1
        assert begun == at_pass

    on_cycles(core.loop.executor, watched)
    core.loop.watch(judged)
    core.generate(prompts(4), replace(SAMPLED[kind], grammar=compiler.regex("[a-z]*x")))
    assert passes > 5
    assert len(computed_by) > 4 * 5
    assert all(name.startswith("mask") for name in computed_by)
