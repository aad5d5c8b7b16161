"""Forms are followed to the token, whatever was drafted across their end."""

from dataclasses import replace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dspark_server.engine.grammar import CompiledForm, FormError, GrammarCompiler
from dspark_server.engine.request import CompiledGrammar, FinishReason, SamplingParams

from .support import prompts, tiny_core

VOCABULARY = 512  # of the fixtures' targets; the tokenizer has fewer, as with padded embeddings


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, then the end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({text: number for number, text in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


@pytest.fixture(scope="module")
def compiler(tokenizer: PreTrainedTokenizerFast) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, VOCABULARY)


def permitted(form: CompiledForm, stops: frozenset[int], said: list[int], drafted: list[int]) -> list[int]:
    matcher = form.start(stops)
    for token in said:
        matcher.commit([token])
    return matcher.mask(drafted).nonzero().squeeze(1).tolist()


def test_drafted_and_committed_are_the_same(tokenizer: PreTrainedTokenizerFast, compiler: GrammarCompiler) -> None:
    """Also to one matcher that has been asked about everything before, and about what nobody could say."""
    stops = frozenset({tokenizer.eos_token_id})
    form = compiler.json_schema('{"type": "object", "properties": {"a": {"enum": ["b", "bc"]}}, "required": ["a"]}')
    answer = tokenizer.encode('{"a": "bc"}')
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
        assert not asked.over()
        asked.commit(answer[start : start + 2])
    assert asked.over()
    assert asked.mask(()).nonzero().squeeze(1).tolist() == [tokenizer.eos_token_id]


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
