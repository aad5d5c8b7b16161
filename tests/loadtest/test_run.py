"""The whole command: sweeps, Poisson, comparisons with servers of its own, and how it ends."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from loadtest.run import main

from .fake_server import FakeApp, serving

ROOT = Path(__file__).parents[2]
FAKE = f"{sys.executable} {Path(__file__).with_name('fake_server.py')}"


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"ok {i}", "domain": "test"}) + "\n" for i in range(40)))
    return str(path)


def results(directory):
    saved = json.loads((directory / "results.json").read_text())
    assert (directory / "throughput-per-user.png").exists()
    assert (directory / "throughput-and-budget.png").exists()
    with open(directory / "results.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(saved["runs"])
    return saved


def test_a_sweep(tmp_path, capsys, prompts):
    app = FakeApp()
    with serving(app) as url:
        arguments = ["--url", url + "/v1", "--concurrency", "1,3", "--requests-per-level", "6", "--max-tokens", "8"]
        arguments += ["--prompts", prompts, "--slo", "ttft=30", "--out", str(tmp_path), "--api-key", "secret"]
        assert main([*arguments, "--warmup", "1", "--save-detailed"]) == 0
    saved = results(tmp_path)
    one, three = saved["runs"]
    assert (one["max_concurrency"], three["max_concurrency"], one["request_rate"]) == (1, 3, "inf")
    for result in (one, three):
        assert result["model_id"] == "fake-model"
        assert (result["completed"], result["failed"], result["total_output_tokens"]) == (6, 0, 48)
        assert result["total_input_tokens"] == 42
        assert result["request_goodput"] == result["request_throughput"]
        # The warm-up is in no figure: not in the counters either.
        assert result["server_generation_tokens"] == 48
        assert result["spec_decode_num_drafts"] == 24
        assert result["verification_budget"] == 4.0
        assert len(result["ttfts"]) == 6
    assert app.most_running == 3
    assert len({body["prompt"] for body in app.bodies}) == 14  # none repeats
    assert "secret" not in (tmp_path / "results.json").read_text()
    assert "TTFT" in capsys.readouterr().out


def test_a_steady_window_counts_what_comes_in_it(tmp_path, prompts):
    app = FakeApp()
    with serving(app) as url:
        arguments = ["--url", url, "--concurrency", "3", "--steady", "0.5", "--max-tokens", "8", "--prompts", prompts]
        assert main([*arguments, "--out", str(tmp_path)]) == 0
    (run,) = results(tmp_path)["runs"]
    assert run["duration"] == pytest.approx(0.5, abs=0.2)
    assert run["total_output_tokens"] == pytest.approx(run["server_generation_tokens"], abs=12)
    assert run["output_throughput"] == pytest.approx(run["total_output_tokens"] / run["duration"])
    assert run["total_output_tokens"] < app.generated - 8  # neither the warm-up nor the ramp
    assert 0 < run["completed"] < len(app.bodies)
    assert run["failed"] == 0


def test_poisson(tmp_path, prompts):
    def bodies(directory, seed):
        app = FakeApp(metrics=False)
        with serving(app) as url:
            arguments = ["--url", f"here={url}", "--rate", "40,80", "--requests-per-level", "8", "--max-tokens", "4"]
            out = ["--prompts", prompts, "--out", str(directory), "--warmup", "0"]
            assert main([*arguments, *out, "--seed", seed]) == 0
        return sorted(body["prompt"] for body in app.bodies)

    assert bodies(tmp_path / "a", "1") == bodies(tmp_path / "b", "1")
    run = results(tmp_path / "a")["runs"][0]
    assert (run["label"], run["request_rate"], run["max_concurrency"]) == ("here", 40, None)
    assert run["mean_client_queue_ms"] >= 0
    assert "verification_budget" not in run


def test_errors_are_counted_and_all_of_them_is_a_failure(tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "busy"}\n')
    with serving(FakeApp()) as url:
        arguments = ["--url", url, "--concurrency", "2", "--requests-per-level", "4", "--prompts", str(path)]
        assert main([*arguments, "--out", str(tmp_path)]) == 1
    assert results(tmp_path)["runs"][0]["errors_by_class"] == {"http_503": 4}
    assert "4 x http_503" in capsys.readouterr().out


def compare(tmp_path, prompts, *more):
    arguments = ["--compare", "none,fixed", "--serve-command", FAKE, "--concurrency", "1,2", "--max-tokens", "8"]
    arguments += ["--requests-per-level", "4", "--prompts", prompts, "--out", str(tmp_path), "--warmup", "0"]
    return main([*arguments, *more])


def test_a_comparison_starts_interleaves_and_stops(tmp_path, prompts):
    assert compare(tmp_path, prompts, "--rounds", "2", "--speculative-config", '{"model": "drafter"}') == 0
    saved = results(tmp_path)
    order = [(run["round"], run["max_concurrency"], run["label"]) for run in saved["runs"]]
    assert order == [(r, c, policy) for r in (1, 2) for c in (1, 2) for policy in ("none", "fixed")]
    none, fixed = saved["medians"][:2]
    assert "verification_budget" not in none
    assert fixed["verification_budget"] == 4.0
    assert fixed["rounds"] == 2
    assert fixed["output_throughput_ratio"] > 0
    logs = [(tmp_path / "logs" / f"{policy}.log").read_text().splitlines()[0] for policy in ("none", "fixed")]
    assert list(map(json.loads, logs)) == [{"method": "none"}, {"model": "drafter", "selection": "fixed"}]


def test_a_server_that_does_not_start_is_told_with_its_log(tmp_path, prompts, capsys):
    assert compare(tmp_path, prompts, "--serve-args=--refuse") == 1
    message = capsys.readouterr().err
    assert "'none' ended while starting, status 1" in message
    assert "there is no such drafter" in message


def test_a_server_that_dies_is_told_and_what_was_measured_is_kept(tmp_path, prompts, capsys):
    assert compare(tmp_path, prompts, "--serve-args=--die-after 6 --dies fixed") == 1
    message = capsys.readouterr().err
    assert "'fixed' ended during fixed, c=2, round 1 of 1, status 3" in message
    assert "a fatal thing happened" in message
    runs = results(tmp_path)["runs"]
    assert [run["completed"] for run in runs[:3]] == [4, 4, 4]
    assert runs[3]["failed"] > 0


def test_no_server_at_the_url(tmp_path, capsys):
    with serving(FakeApp()) as url:
        pass
    assert main(["--url", url, "--out", str(tmp_path)]) == 1
    assert "no model list" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --url or --compare"),
        (["--url", "localhost:8000"], "is no http:// or https:// address"),
        (["--compare", "none,eager"], "'eager' is not one of"),
        (["--compare", "none,none"], "named twice"),
        (["--url", "http://a", "--url", "http://a"], "a name of its own"),
        (["--url", "http://a", "--concurrency", "0"], "at least 1"),
        (["--url", "http://a", "--concurrency", "8", "--requests-per-level", "4"], "never be reached"),
        (["--url", "http://a", "--duration", "1", "--steady", "1"], "give one of"),
        (["--url", "http://a", "--rate", "1", "--steady", "1"], "--steady is for"),
        (["--url", "http://a", "--rate", "-1"], "no positive number"),
        (["--url", "http://a", "--rate", "1", "--concurrency", "1"], "either --concurrency"),
        (["--url", "http://a", "--slo", "speed=1"], "is no SLO"),
        (["--url", "http://a", "--extra-body", "[1]"], "must be a JSON object"),
        (["--url", "http://a", "--max-in-flight", "4"], "is for --rate"),
    ],
)
def test_bad_options_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_help_from_the_checkout_teaches():
    answer = subprocess.run(
        [sys.executable, "loadtest/run.py", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert "--compare none,fixed,causal,lagged" in answer.stdout
