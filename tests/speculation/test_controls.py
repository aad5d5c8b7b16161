"""Rules on logits: against a slow and obvious reference, and lossless when they change inside a block."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from dspark_kernels import Ruled, load
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dspark_server.speculation.acceptance import accept
from dspark_server.speculation.controls import Controls, Forbidden, Penalties
from dspark_server.speculation.draft_block import DraftBlock
from dspark_server.speculation.law import distribution
from dspark_server.speculation.noise import CounterStreams
from dspark_server.speculation.sampling import SamplingBatch
from tests.speculation.test_exact import LAWS, Context, Pair, batch, logits, total_variation


def reference(
    scores: Sequence[float],
    prompt: Sequence[int],
    output: Sequence[int],
    *,
    repetition: float = 1.0,
    frequency: float = 0.0,
    presence: float = 0.0,
    bias: Sequence[tuple[int, float]] = (),
    allowed: Sequence[int] | None = None,
    bad_words: Sequence[tuple[int, ...]] = (),
    stops: Sequence[int] = (),
    min_tokens: int = 0,
    alternating: bool = False,
) -> list[float]:
    """One row after everything a request asked for, token by token, in vLLM's order."""
    result = []
    everything = [*prompt, *output]
    for token, score in enumerate(scores):
        value = float(score)
        if alternating and output and token == output[-1]:
            value = -math.inf
        if allowed is not None and token not in allowed:
            value = -math.inf
        if any([*output, token][-len(word) :] == list(word) for word in bad_words):
            value = -math.inf
        if token in stops and len(output) < min_tokens:
            value = -math.inf
        value += sum(added for biased, added in bias if biased == token)
        if token in everything:
            value = value / repetition if value > 0 else value * repetition
        value -= frequency * list(output).count(token) + presence * (token in output)
        result.append(value)
    return result


@dataclass
class Alternating:
    """A grammar in which no token follows itself."""

    vocabulary: int
    said: list[int] = field(default_factory=list)
    complete: bool = False

    def prepare(self, drafted: Sequence[int]) -> None:
        pass

    def ready(self, drafted: Sequence[int], deadline: float) -> bool:
        return True

    def mask(self, drafted: Sequence[int]) -> Tensor:
        mask = torch.ones(self.vocabulary, dtype=torch.bool)
        mask[[*self.said, *drafted][-1:]] = False
        return mask

    def commit(self, tokens: Sequence[int]) -> None:
        self.said += tokens

    def over(self, drafted: Sequence[int] = ()) -> bool:
        return False


def controls_of(vocabulary: int, prompt: Sequence[int], options: dict[str, Any], start: int) -> Controls:
    """`start` is the position of the answer's first token."""
    given = dict(options)
    penalties = Penalties(*(given.pop(name, off) for name, off in
                            (("repetition", 1.0), ("frequency", 0.0), ("presence", 0.0))))  # fmt: skip
    least, stops = given.pop("min_tokens", 0), given.pop("stops", ())
    early = Forbidden(tuple(stops), start + least) if least else None
    grammar = Alternating(vocabulary) if given.pop("alternating", False) else None
    return Controls(vocabulary, prompt, penalties=penalties, early=early, grammar=grammar, **given)


TOKENS = st.integers(0, 8)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "repetition": st.sampled_from([0.5, 1.3, 2.0]),
        "frequency": st.sampled_from([-1.5, 0.7]),
        "presence": st.sampled_from([-0.5, 1.25]),
        "bias": st.lists(st.tuples(TOKENS, st.floats(-5, 5)), max_size=3, unique_by=lambda pair: pair[0]),
        "allowed": st.lists(TOKENS, min_size=1, max_size=5),
        "bad_words": st.lists(st.lists(TOKENS, min_size=1, max_size=3).map(tuple), min_size=1, max_size=3),
        "alternating": st.booleans(),
    },
)


@settings(max_examples=300, deadline=None)
@given(
    options=OPTIONS,
    prompt=st.lists(TOKENS, min_size=1, max_size=6),
    committed=st.lists(st.lists(TOKENS, min_size=1, max_size=3), max_size=4),
    drafted=st.lists(TOKENS, max_size=3),
    columns=st.none() | st.permutations(range(9)).map(lambda order: order[:5]),
    seed=st.integers(0, 99),
)
def test_rules_are_the_reference(
    options: dict[str, Any],
    prompt: list[int],
    committed: list[list[int]],
    drafted: list[int],
    columns: list[int] | None,
    seed: int,
) -> None:
    scores = torch.randn(9, generator=torch.Generator().manual_seed(seed))
    controls = controls_of(9, prompt, options, len(prompt))
    for step in committed:
        controls.commit(step)
    output = [*itertools.chain(*committed), *drafted]
    wanted = torch.tensor(reference(scores.tolist(), prompt, output, **options))
    names = None if columns is None else torch.tensor(columns)
    row = scores.clone() if names is None else scores[names]
    controls.apply(row, drafted, len(prompt) + len(output), names)
    torch.testing.assert_close(row, wanted if names is None else wanted[names])
    if controls.rules is None:
        assert "alternating" in options
        return
    for kernels in (load("native"), load("reference")):  # the same as data, for every row of a block
        rows = scores.float().repeat(len(drafted) + 1, 1)
        ruled = Ruled(
            [controls.rules], torch.tensor([len(prompt) + len(output) - len(drafted)]), torch.zeros(1, 0).long()
        )
        kernels.apply_rules(
            rows, torch.zeros(1).long(), torch.tensor([len(drafted)]), torch.tensor([drafted]).long(), ruled
        )
        for k, got in enumerate(rows):
            before = output[: len(output) - len(drafted) + k]
            row_wanted = torch.tensor(reference(scores.tolist(), prompt, before, **options))
            torch.testing.assert_close(got, row_wanted.float())


def test_a_bad_word_does_not_begin_in_the_prompt() -> None:
    """Neither the answer's first token, nor one behind drafts, completes a word whose beginning the prompt has."""
    controls = Controls(4, [2, 0, 1], bad_words=[(1, 3), (0, 1, 3), (0, 1, 2)])

    def banned(drafted: Sequence[int]) -> list[int]:
        row = torch.zeros(4)
        controls.apply(row, drafted, 3 + len(drafted), None)
        return torch.nonzero(row == -torch.inf).flatten().tolist()

    assert banned([]) == banned([2]) == banned([0]) == []
    assert banned([1]) == banned([0, 2, 1]) == [3]
    assert banned([0, 1]) == [2, 3]
    controls.commit([0])
    assert banned([]) == []
    assert banned([1]) == [2, 3]


@pytest.mark.parametrize("rule", [{"early": Forbidden((2,), 100)}, {"allowed": [1]}, {"bad_words": [(2,)]}])
def test_a_grammar_that_can_only_end_outweighs_other_masks(rule: dict[str, Any]) -> None:
    class Over(Alternating):
        def mask(self, drafted: Sequence[int]) -> Tensor:
            return torch.arange(4) == 2

        def over(self, drafted: Sequence[int] = ()) -> bool:
            return True

    controls = Controls(4, [0], grammar=Over(4), **rule)
    row = torch.zeros(4)
    controls.apply(row, (), 1, None)
    assert row.isfinite().tolist() == [False, False, True, False]


# ---- inside a block ----------------------------------------------------------------------------------------------

PROMPT = [0, 1]
RULES: dict[str, dict[str, Any]] = {
    "repetition": {"repetition": 1.7},
    "frequency and presence": {"frequency": 0.9, "presence": -0.4},
    "bias": {"bias": ((1, 2.0),)},
    "bad words": {"bad_words": ((0, 1), (2,))},
    "a word of three": {"bad_words": ((1, 0, 0),)},
    "words that the prompt begins": {"bad_words": ((1, 0), (0, 1, 2), (1, 2, 2))},
    "grammar": {"alternating": True},
    "minimum length": {"stops": (1,), "min_tokens": 2, "bias": ((0, 0.5),)},
    "everything": {"repetition": 0.6, "frequency": 0.5, "bias": ((0, -1.0),), "bad_words": ((1, 1),),
                   "alternating": True},
}  # fmt: skip


def ruled(pair: Pair, options: dict[str, Any]) -> Pair:
    """The same pair for a request with rules: its laws by the reference, what production is shown left as it was."""

    def under(law: np.ndarray, context: Context) -> np.ndarray:
        scores = reference(logits([law])[0].tolist(), PROMPT, list(context), **options)
        weights = np.exp(np.array(scores) - max(scores))
        return np.asarray(weights / weights.sum())

    pair.controls = controls_of(pair.vocabulary, PROMPT, options, 0)
    pair.said, drafts = pair.p, pair.q
    pair.p = {context: under(law, context) for context, law in pair.said.items()}
    pair.q = {context: under(law, context) for context, law in drafts.items()}
    one = batch(1, coupled=False, controls=pair.controls)
    for context, law in drafts.items():  # what production drafts from
        before = [torch.tensor([token]) for token in context]
        drawn = distribution(logits([law]), one.ahead(len(context), before))
        np.testing.assert_allclose(drawn[0].numpy(), pair.q[context], atol=1e-7)
        pair.q[context] = drawn[0].numpy()
        shown = distribution(logits([pair.said[context]]), one.ahead(len(context), before))
        np.testing.assert_allclose(shown[0].numpy(), pair.p[context], atol=1e-7)
        pair.p[context] = shown[0].numpy()
    return pair


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    """Rules are kept in the precision of the logits; here these are float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("rule", LAWS)
@pytest.mark.parametrize("name", RULES)
def test_the_joint_law_is_the_ruled_targets(rule: str, name: str) -> None:
    """Positions later in a block see the draft tokens before them, as the target alone would see its own."""
    for seed, gamma in ((0, 2), (1, 3)):
        pair = ruled(Pair(3, gamma, seed, "random"), RULES[name])
        committed = LAWS[rule](pair, lambda draft, gamma=gamma: gamma)
        assert sum(committed.values()) == pytest.approx(1, abs=1e-12)
        assert total_variation(pair, committed) <= 1e-12


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_request_is_asked_about_its_own_draft_only(temperature: float) -> None:
    """Another's tokens, or its own that are not verified, could be ones that its grammar does not know."""

    class Recording:
        def __init__(self) -> None:
            self.asked: set[tuple[int, ...]] = set()

        def prepare(self, drafted: Sequence[int]) -> None:
            self.asked.add(tuple(drafted))

        def ready(self, drafted: Sequence[int], deadline: float) -> bool:
            return True

        def apply(self, logits: Tensor, drafted: Sequence[int], position: int, columns: Tensor | None) -> None:
            self.asked.add(tuple(drafted))

    rules = [Recording(), Recording(), Recording()]
    sampling = SamplingBatch.of(position=[0] * 3, key=[0, 1, 2], temperature=[temperature] * 3, controls=rules)
    draft = DraftBlock.of(torch.tensor([[3, 4, 5], [6, 7, 8]]))
    scores = torch.full((7, 9), -9.0)
    scores[[0, 1, 2, 5], [3, 4, 5, 6]] = 9.0
    accept(scores, [0, 4, 5, 7], draft, [0, -1, 1], sampling, CounterStreams())
    own: list[set[tuple[int, ...]]] = [{(), (3,), (3, 4), (3, 4, 5)}, {()}, {(), (6,)}]
    assert [rule.asked for rule in rules] == own
