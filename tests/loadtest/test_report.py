"""Figures from known outcomes, counters from known pages, files and plots."""

import csv
import json
import random

import numpy as np
import pytest
from rich.console import Console
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from loadtest.client import LoadTestError, Outcome
from loadtest.counters import Counters
from loadtest.plots import plot
from loadtest.report import Level, Report, Slo, detailed, percentile, spread, summarize
from loadtest.workload import Prompts, chat_template

from .fake_server import FakeApp


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101])
def test_percentiles_are_numpys(count):
    values = [random.Random(count).expovariate(1.0) for _ in range(count)]
    for q in (0, 1, 50, 90, 99, 99.9, 100):
        assert percentile(values, q) == pytest.approx(np.percentile(values, q))


def test_percentiles_known_by_heart():
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile([0.0, 10.0], 90) == 9.0
    assert percentile(list(range(101)), 99) == 99.0
    with pytest.raises(ValueError, match="percentiles"):
        percentile([], 50)


def test_spread_is_in_milliseconds():
    assert spread("ttft", [0.1, 0.3])["mean_ttft_ms"] == pytest.approx(200.0)
    assert spread("ttft", [0.1, 0.3])["std_ttft_ms"] == pytest.approx(100.0)
    assert set(spread("itl", []).values()) == {None}


def outcome(ttft=0.1, e2e=1.1, tokens=11, error=None, **more):
    return Outcome(0.0, ttft=ttft, e2e=e2e, output_tokens=tokens, prompt_tokens=5, counted=True, error=error, **more)


LOAD_KEYS = "date endpoint_type label model_id num_prompts request_rate max_concurrency duration completed failed"
TOKEN_KEYS = "total_input_tokens total_output_tokens output_throughput total_token_throughput"
VLLM_KEYS = f"{LOAD_KEYS} {TOKEN_KEYS} request_throughput request_goodput"
LATENCY_KEYS = {
    f"{kind}_{name}_ms"
    for name in ("ttft", "tpot", "itl", "e2el")
    for kind in ("mean", "median", "std", "p50", "p90", "p99")
}


def a_report(rounds=3, targets=("none", "causal")):
    report = Report({"seed": 0})
    for number in range(1, rounds + 1):
        for users in (1, 4):
            for target in targets:
                result = summarize([outcome(e2e=1 + number / 10, gaps=[0.1] * 10)] * users, float(number), Slo(ttft=1))
                result["model_id"] = "fake"
                if target != "none":
                    result["output_throughput"] *= 2
                    result["verification_budget"] = 2.0 + number
                report.add(target, Level(concurrency=users), number, result)
    return report


def test_the_keys_are_vllms():
    assert LATENCY_KEYS | set(VLLM_KEYS.split()) <= a_report().runs[0].keys()
    assert detailed([outcome(error="timeout")])["errors"] == ["timeout"]


def test_latencies_and_throughput_of_known_outcomes():
    result = summarize([outcome(), outcome(ttft=0.3, e2e=0.3, tokens=1), outcome(error="timeout")], 4.0)
    assert result["mean_ttft_ms"] == pytest.approx(200.0)
    assert result["mean_tpot_ms"] == pytest.approx(100.0)  # the single token has none
    assert result["mean_user_throughput"] == pytest.approx(10.0)
    assert result["output_throughput"] == 3.0
    assert result["total_token_throughput"] == 5.5
    assert result["request_throughput"] == 0.5
    assert result["request_goodput"] is None


def test_goodput_counts_requests_within_every_bound():
    outcomes = [outcome(), outcome(ttft=2.0, e2e=3.0), outcome(e2e=5.1), outcome(tokens=1), outcome(error="timeout")]
    assert summarize(outcomes, 1.0, Slo.parse("ttft=1,tpot=0.1"))["request_goodput"] == 2.0
    assert summarize(outcomes, 1.0, Slo.parse("e2e=4"))["request_goodput"] == 3.0


@pytest.mark.parametrize("text", ["", "ttft", "ttft=fast", "speed=1", "ttft=1,,"])
def test_a_bad_slo_is_refused(text):
    with pytest.raises(LoadTestError, match="is no SLO"):
        Slo.parse(text)


def test_nothing_completed_is_no_crash(tmp_path):
    report = Report({})
    report.add("a", Level(rate=2.0), 1, summarize([outcome(error="connect", detail="[refused]")], 1.0))
    report.save(tmp_path)
    plot(report.medians(), tmp_path)
    with open(tmp_path / "out.txt", "w") as file:
        report.show(Console(file=file, width=150))
    assert "1 x connect  [refused]" in (tmp_path / "out.txt").read_text()


def test_medians_over_rounds_and_paired_ratios():
    none, causal = a_report().medians()[:2]
    assert (none["label"], none["max_concurrency"], none["rounds"]) == ("none", 1, 3)
    assert none["output_throughput"] == pytest.approx(11 / 2)
    assert none["completed"] == 3  # a sum
    assert "round" not in none
    assert none["output_throughput_ratio"] == 1.0
    assert causal["output_throughput_ratio"] == 2.0
    assert causal["verification_budget"] == 4.0
    assert "verification_budget" not in none


def test_files(tmp_path):
    report = a_report()
    report.save(tmp_path)
    report.save(tmp_path)
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["settings"] == {"seed": 0}
    assert (len(saved["runs"]), len(saved["medians"])) == (12, 4)
    with open(tmp_path / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert float(rows[1]["output_throughput"]) == saved["runs"][1]["output_throughput"]
    assert rows[0]["verification_budget"] == ""
    assert not any("{" in value for value in rows[0].values())
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("targets", [("none", "causal"), ("none",)])
def test_plots(tmp_path, targets):
    paths = plot(a_report(targets=targets).medians(), tmp_path / "new")
    assert [path.name for path in paths] == ["throughput-per-user.png", "throughput-and-budget.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000 for path in paths)


def test_tables_name_what_they_show(tmp_path):
    with open(tmp_path / "out.txt", "w") as file:
        a_report().show(Console(file=file, width=160))
    text = (tmp_path / "out.txt").read_text()
    for word in ("causal", "c=4", "TTFT", "TPOT", "ITL", "E2E", "p99", "budget", "goodput", "ratio"):
        assert word in text


def test_counters_are_a_difference():
    app = FakeApp()
    app.generated, app.drafts = 1000, 300
    before = Counters.parse(app.page())
    app.generated, app.drafts = 1101, 340
    figures = Counters.parse(app.page()).since(before).figures()
    assert figures["server_generation_tokens"] == 101
    assert figures["spec_decode_num_drafts"] == 40
    assert figures["spec_decode_draft_tokens"] == 120
    assert figures["spec_decode_accepted_tokens"] == 40
    assert figures["spec_decode_acceptance_rate"] == pytest.approx(100 / 3)
    assert figures["spec_decode_acceptance_length"] == 2.0
    assert figures["spec_decode_per_position_acceptance_rates"] == [1.0, 0.0, 0.0]
    assert figures["request_steps"] == 61
    assert figures["verification_budget"] == pytest.approx(1 + 120 / 61)
    assert figures["tokens_per_request_step"] == pytest.approx(101 / 61)


def test_a_server_that_never_drafts_has_budget_one():
    app = FakeApp()
    before = Counters.parse(app.page())
    app.generated = 10
    figures = Counters.parse(app.page()).since(before).figures()
    assert figures["verification_budget"] == 1.0
    assert figures["spec_decode_acceptance_length"] is None


def test_counters_absent_stay_absent():
    plain = Counters.parse(FakeApp(speculative=False).page())
    assert plain.since(plain).figures() == {}
    assert Counters.parse("<html>not metrics</html>").figures() == {}
    app = FakeApp()
    app.generated = 5
    assert Counters.parse(FakeApp().page()).since(Counters.parse(app.page())).figures() == {}  # it restarted


def write(path, *rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return path


def test_prompts_of_files_come_domain_by_domain(tmp_path):
    files = [
        write(tmp_path / "math.jsonl", *[{"prompt": f"sum {i}", "domain": "math"} for i in range(4)]),
        write(tmp_path / "chat.jsonl", *[{"prompt": f"hello {i}"} for i in range(4)]),
    ]
    prompts = Prompts.read(files, seed=3, template=lambda text: f"<{text}>")
    texts = [prompts(index) for index in range(8)]
    assert prompts.distinct == len(set(texts)) == 8
    assert [text[1] for text in texts] == ["h", "s"] * 4
    assert prompts(8) == texts[0]
    again = Prompts.read(files, seed=3, template=lambda text: f"<{text}>")
    assert [again(index) for index in range(8)] == texts
    other = Prompts.read(files, seed=4, template=lambda text: f"<{text}>")
    assert [other(index) for index in range(8)] != texts


@pytest.mark.parametrize("row", ['{"text": 1}', "[]", "no json", '{"prompt": ""}', '{"prompt": ["a"]}'])
def test_a_line_that_is_no_prompt_is_named(tmp_path, row):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "fine"}\n' + row + "\n")
    with pytest.raises(LoadTestError, match=r"bad.jsonl, line 2"):
        Prompts.read([path], seed=0)


def test_made_up_prompts_repeat_with_the_seed_only():
    prompts = Prompts(None, seed=1, words=12)
    assert prompts.distinct is None
    assert len(prompts(0).split()) == 12
    assert prompts(5) == Prompts(None, seed=1, words=12)(5)
    assert len({prompts(index) for index in range(200)}) == 200
    assert prompts(5) != Prompts(None, seed=2, words=12)(5)


def test_the_chat_template_is_the_tokenizers(tmp_path):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    tokenizer.save_pretrained(tmp_path / "plain")
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<reply>"
    tokenizer.save_pretrained(tmp_path / "chat")
    assert chat_template(str(tmp_path / "chat"))("Hello") == "<user>Hello<reply>"
    with pytest.raises(LoadTestError, match="no chat template"):
        chat_template(str(tmp_path / "plain"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(LoadTestError, match="no tokenizer in"):
        chat_template(str(tmp_path / "empty"))
