"""metrics.speculative_decoding of an answer: one request's share of the speculation counters."""

from collections.abc import Iterator

import pytest

from dspark_server.api import ServerSettings
from dspark_server.api.drafts import MAX_STEPS, DraftRecord

from .conftest import tiny_engine
from .support import Running, start
from .test_completions import stream

THREE_A_STEP = {"per_step": 3}


def test_figures_of_a_record() -> None:
    record = DraftRecord(4, detailed=True)
    for drafted, accepted in ((2, 0), (4, 4), (4, 1), (2, 2), (1, 1)):
        record.add(drafted, accepted)
    assert record.figures() == {
        "mean_acceptance_length": 1 + 8 / 5,
        "draft_acceptance_rate": 8 / 13,
        "acceptance_histogram": [1, 2, 1, 0, 1],
        "acceptance_histogram_by_draft_length": {"1": [0, 1], "2": [1, 0, 1], "4": [0, 1, 0, 0, 1]},
        "num_spec_steps": 5,
        "num_accepted_draft_tokens": 8,
        "num_draft_tokens": 13,
        "num_spec_tokens": 4,
        "per_step_accepted": [0, 4, 1, 2, 1],
        "per_step_drafted": [2, 4, 4, 2, 1],
    }


def test_a_request_that_drafted_nothing() -> None:
    figures = DraftRecord(2).figures()
    assert figures["acceptance_histogram"] == [0, 0, 0]
    assert (figures["mean_acceptance_length"], figures["draft_acceptance_rate"]) == (1.0, 0.0)
    assert "per_step_drafted" not in figures


def test_detail_is_bounded_and_the_counts_are_not() -> None:
    record = DraftRecord(1, detailed=True)
    for _ in range(MAX_STEPS + 10):
        record.add(1, 1)
    figures = record.figures()
    assert len(figures["per_step_drafted"]) == len(figures["per_step_accepted"]) == MAX_STEPS
    assert figures["num_spec_steps"] == MAX_STEPS + 10


def test_nothing_is_said_unless_asked(server: Running) -> None:
    assert "metrics" not in server.complete("say hello").json()
    assert all("metrics" not in chunk for chunk in stream(server, "say x", stream_options={"include_usage": True}))


SUMMARY = {**THREE_A_STEP, "settings": {"per_request_spec_decode_metrics": "summary"}}
DETAILED = {**THREE_A_STEP, "settings": {"per_request_spec_decode_metrics": "detailed"}}


@pytest.mark.parametrize("own_server", [SUMMARY], indirect=True)
def test_summary(own_server: Running) -> None:
    answer = own_server.complete("forever", max_tokens=8).json()  # steps of 3, 3 and 2 tokens; the first has no draft
    figures = answer["metrics"]["speculative_decoding"]
    assert figures["acceptance_histogram"] == [0, 1, 1]
    assert figures["num_draft_tokens"] == 4
    assert "per_step_drafted" not in figures
    # A stop string ends the choice before the engine does.
    stopped = own_server.complete("say abcdefghijkl", stop="f").json()
    assert stopped["choices"][0]["text"] == "abcde"
    assert stopped["metrics"]["speculative_decoding"]["num_spec_steps"] == 1
    for several in ({"n": 2}, {"prompt": ["say x", "say y"]}):
        answer = own_server.complete(**{"prompt": "say x", **several}).json()
        assert answer["metrics"] == {"speculative_decoding": None}


@pytest.mark.parametrize("own_server", [DETAILED], indirect=True)
def test_a_stream_says_it_with_its_usage(own_server: Running) -> None:
    chunks = stream(own_server, "forever", max_tokens=8, stream_options={"include_usage": True})
    assert [("metrics" in chunk) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1]["choices"] == []
    figures = chunks[-1]["metrics"]["speculative_decoding"]
    assert (figures["per_step_drafted"], figures["per_step_accepted"]) == ([2, 2], [2, 1])
    assert all("metrics" not in chunk for chunk in stream(own_server, "forever", max_tokens=8))
    # The openai package keeps fields it does not know.
    answer = own_server.openai.completions.create(model="fake", prompt="forever", max_tokens=4)
    assert answer.metrics["speculative_decoding"]["num_spec_steps"] == 1


@pytest.fixture(scope="module")
def detailed_server() -> Iterator[Running]:
    engine = tiny_engine("fixed")
    engine.tokenizer.chat_template = "{{ messages[0].content }}"
    yield from start(ServerSettings(port=0, per_request_spec_decode_metrics="detailed"), engine)


@pytest.mark.parametrize("endpoint", ["complete", "chat"])
@pytest.mark.parametrize(
    ("asked", "longest"), [(None, 2), ({"enabled": False}, 0), ({"max_draft_tokens": 1}, 1), ({"enabled": True}, 2)]
)
def test_a_request_says_how_it_is_drafted_for(
    detailed_server: Running, endpoint: str, asked: dict | None, longest: int
) -> None:
    fields = {"speculation": asked, "max_tokens": 24, "ignore_eos": True, "temperature": 1}
    answer = getattr(detailed_server, endpoint)("abcabd", **fields).json()
    drafted = answer["metrics"]["speculative_decoding"]["per_step_drafted"]
    assert answer["usage"]["completion_tokens"] == 24
    assert min(max(drafted, default=0), 2) == longest  # the fixture's blocks have more than two


def test_requests_add_up_to_the_counters(detailed_server: Running) -> None:
    def counted(counter: str) -> float:
        samples = detailed_server.samples()
        return sum(v for name, v in samples.items() if name.startswith(f"vllm:spec_decode_{counter}_total{{"))

    counters = {
        "num_spec_steps": "num_drafts",
        "num_draft_tokens": "num_draft_tokens",
        "num_accepted_draft_tokens": "num_accepted_tokens",
    }
    before = {field: counted(counter) for field, counter in counters.items()}
    figures = []
    for number in range(6):
        body = {"temperature": number % 2, "max_tokens": 30, "ignore_eos": True}
        answer = detailed_server.complete([5 + number, 9, 11], **body).json()
        figures.append(answer["metrics"]["speculative_decoding"])
    for field, counter in counters.items():
        assert sum(each[field] for each in figures) == counted(counter) - before[field]
    assert figures[0]["num_spec_steps"] > 5
    assert sum(figures[0]["per_step_drafted"]) == figures[0]["num_draft_tokens"]


def test_without_a_drafter_there_is_nothing_to_say() -> None:
    server = start(ServerSettings(port=0, per_request_spec_decode_metrics="summary"), tiny_engine("none"))
    for running in server:
        assert running.complete([5, 9], max_tokens=4).json()["metrics"] == {"speculative_decoding": None}
