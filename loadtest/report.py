"""From outcomes to figures: a flat result per run under `vllm bench serve`'s names, medians over rounds, files, tables.

A run is one level (a concurrency or a rate) of one target in one round. Keys that end in _ms are milliseconds.
"""

import csv
import json
import os
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from loadtest.client import LoadTestError, Outcome

Result = dict[str, Any]
PERCENTILES = (50, 90, 99)
LATENCIES = ("ttft", "tpot", "itl", "e2el")
SUMS = ("num_prompts", "completed", "failed", "total_input_tokens", "total_output_tokens")


@dataclass(frozen=True)
class Level:
    """One load: `concurrency` users in a closed loop, or `rate` requests a second at random times."""

    concurrency: int | None = None
    rate: float | None = None

    def __str__(self) -> str:
        return f"c={self.concurrency}" if self.rate is None else f"{self.rate:g} req/s"


@dataclass(frozen=True)
class Slo:
    """The latency bounds of a good request, in seconds; None: no bound."""

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    @classmethod
    def parse(cls, text: str) -> "Slo":
        """Read `ttft=1,tpot=0.1,e2e=20`, any of the three."""
        try:
            pairs = [part.split("=") for part in text.split(",")]
            return cls(**{name.strip(): float(value) for name, value in pairs})
        except (ValueError, TypeError):
            raise LoadTestError(f"{text!r} is no SLO such as ttft=1,tpot=0.1,e2e=20 (seconds).") from None

    def met_by(self, outcome: Outcome) -> bool:
        """Whether a request completed within every bound. A single token has no TPOT."""
        return (
            outcome.error is None
            and (self.ttft is None or outcome.ttft <= self.ttft)
            and (self.tpot is None or (outcome.tpot or 0.0) <= self.tpot)
            and (self.e2e is None or outcome.e2e <= self.e2e)
        )


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0 to 100), linear between the two nearest values, as numpy's default."""
    if not values or not 0 <= q <= 100:
        raise ValueError("percentiles need values and 0 <= q <= 100")
    ordered = sorted(values)
    place = (len(ordered) - 1) * q / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def spread(name: str, seconds: Sequence[float]) -> Result:
    """mean, median, std and percentiles in milliseconds, named as in vLLM; None without values."""
    values = [1e3 * value for value in seconds]
    result: Result = {
        f"mean_{name}_ms": statistics.fmean(values) if values else None,
        f"median_{name}_ms": percentile(values, 50) if values else None,
        f"std_{name}_ms": statistics.pstdev(values) if values else None,
    }
    return result | {f"p{q}_{name}_ms": percentile(values, q) if values else None for q in PERCENTILES}


def summarize(
    outcomes: Sequence[Outcome], duration: float, slo: Slo | None = None, *, output_tokens: int | None = None
) -> Result:
    """The figures of one run that took `duration` seconds. Tokens and latencies are those of completed requests.

    `output_tokens` is for a run that is a window of a longer load: the tokens that came in it, of any request.
    """
    done = [outcome for outcome in outcomes if outcome.error is None]
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    inputs = sum(outcome.prompt_tokens for outcome in done)
    outputs = sum(outcome.output_tokens for outcome in done) if output_tokens is None else output_tokens
    rates = [rate for outcome in done if (rate := outcome.user_rate) is not None]
    samples = {str(outcome.error): outcome.detail for outcome in reversed(failed)}
    return {
        "num_prompts": len(outcomes),
        "duration": duration,
        "completed": len(done),
        "failed": len(failed),
        "errors_by_class": dict(Counter(str(outcome.error) for outcome in failed).most_common()),
        "error_samples": samples,
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "tokens_counted_by": "usage" if all(outcome.counted for outcome in done) else "chunks",
        "request_throughput": len(done) / duration,
        "request_goodput": None if slo is None else sum(map(slo.met_by, outcomes)) / duration,
        "output_throughput": outputs / duration,
        "total_token_throughput": (inputs + outputs) / duration,
        "mean_user_throughput": statistics.fmean(rates) if rates else None,
        **spread("ttft", [outcome.ttft for outcome in done]),
        **spread("tpot", [tpot for outcome in done if (tpot := outcome.tpot) is not None]),
        **spread("itl", [gap for outcome in done for gap in outcome.gaps]),
        **spread("e2el", [outcome.e2e for outcome in done]),
        **spread("client_queue", [outcome.queued for outcome in outcomes]),
    }


def detailed(outcomes: Sequence[Outcome]) -> Result:
    """Per-request lists, as `vllm bench serve --save-detailed` writes them; times in seconds."""
    return {
        "input_lens": [outcome.prompt_tokens for outcome in outcomes],
        "output_lens": [outcome.output_tokens for outcome in outcomes],
        "ttfts": [outcome.ttft for outcome in outcomes],
        "itls": [outcome.gaps for outcome in outcomes],
        "errors": [outcome.error or "" for outcome in outcomes],
    }


@dataclass
class Report:
    """All runs so far. `settings` describes how they were made; it must hold no secrets."""

    settings: dict[str, Any]
    runs: list[Result] = field(default_factory=list)

    def add(self, target: str, level: Level, round_number: int, result: Result) -> Result:
        """Keep the result of a run, with its place and vLLM's keys for the load."""
        place: Result = {
            "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
            "endpoint_type": "openai",
            "label": target,
            "round": round_number,
            "max_concurrency": level.concurrency,
            "request_rate": "inf" if level.rate is None else level.rate,
        }
        self.runs.append(place | result)
        return self.runs[-1]

    def medians(self) -> list[Result]:
        """One result per target and level, in the order first seen: medians over rounds, sums of counts and errors.

        `output_throughput_ratio` is to the first target, the median of ratios taken within a round.
        """
        groups: dict[tuple[Any, ...], list[Result]] = {}
        for run in self.runs:
            groups.setdefault((run["label"], run["max_concurrency"], run["request_rate"]), []).append(run)
        results = []
        for (label, concurrency, rate), runs in groups.items():
            result: Result = {"label": label, "max_concurrency": concurrency, "request_rate": rate, "rounds": len(runs)}
            for key in dict.fromkeys(key for run in runs for key in run):
                values = [run[key] for run in runs if type(run.get(key)) in (int, float)]
                if key not in result and key != "round" and values:
                    result[key] = sum(values) if key in SUMS else statistics.median(values)
            errors = sum((Counter(run["errors_by_class"]) for run in runs), Counter[str]())
            result["errors_by_class"] = dict(errors.most_common())
            result["error_samples"] = {name: text for run in runs for name, text in run["error_samples"].items()}
            base = {run["round"]: run for run in groups[(self.runs[0]["label"], concurrency, rate)]}
            ratios = [
                run["output_throughput"] / base[run["round"]]["output_throughput"]
                for run in runs
                if run["round"] in base and base[run["round"]]["output_throughput"]
            ]
            result["output_throughput_ratio"] = statistics.median(ratios) if ratios else None
            results.append(result)
        return results

    def save(self, directory: Path) -> None:
        """Write results.json (settings, runs, medians) and results.csv (one row a run, numbers only)."""
        directory.mkdir(parents=True, exist_ok=True)
        everything = {"settings": self.settings, "medians": self.medians(), "runs": self.runs}
        _replace(directory / "results.json", json.dumps(everything, indent=2, allow_nan=False) + "\n")
        columns = [
            key
            for key in dict.fromkeys(key for run in self.runs for key in run)
            if not any(isinstance(run.get(key), list | dict) for run in self.runs)
        ]
        with open(directory / "results.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(self.runs)

    def show(self, console: Console) -> None:
        """Print the medians: throughput, latencies, errors."""
        results = self.medians()
        console.print(_throughput_table(results))
        console.print(_latency_table(results))
        for result in results:
            for name, number in result["errors_by_class"].items():
                sample = " ".join(str(result["error_samples"].get(name, "")).split())
                console.print(
                    f"{result['label']}, {level_of(result)}: {number} x {name}  {sample[:160]}",
                    markup=False,
                    style="red",
                )


def level_of(result: Result) -> Level:
    """The load of a result."""
    rate = result["request_rate"]
    return Level(result["max_concurrency"], None if rate == "inf" else rate)


def _throughput_table(results: Sequence[Result]) -> Table:
    several = len({result["label"] for result in results}) > 1
    columns = {
        "done": ("completed", 0),
        "failed": ("failed", 0),
        "tok/s": ("output_throughput", 1),
        **({"ratio": ("output_throughput_ratio", 2)} if several else {}),
        "per user": ("mean_user_throughput", 1),
        "req/s": ("request_throughput", 2),
        "goodput": ("request_goodput", 2),
        "budget": ("verification_budget", 2),
        "tok/step": ("tokens_per_request_step", 2),
    }
    if not any(result["failed"] for result in results):
        del columns["failed"]
    shown = {title: at for title, at in columns.items() if any(result.get(at[0]) is not None for result in results)}
    table = Table(title="output tokens and requests", box=SIMPLE_HEAD, padding=0)
    for title in ("target", "load", *shown):
        table.add_column(title, justify="left" if title == "target" else "right", no_wrap=True)
    for result in results:
        cells = [_cell(result.get(key), digits) for key, digits in shown.values()]
        table.add_row(result["label"], str(level_of(result)), *cells)
    return table


def _latency_table(results: Sequence[Result]) -> Table:
    table = Table(title="latency, ms", box=SIMPLE_HEAD, padding=0)
    for title in ("target", "load", "", "mean", *(f"p{q}" for q in PERCENTILES)):
        table.add_column(title, justify="left" if title in ("target", "") else "right", no_wrap=True)
    for result in results:
        queueing = () if result["request_rate"] == "inf" else ("client_queue",)
        for name in (*LATENCIES, *queueing):
            keys = [f"mean_{name}_ms", *(f"p{q}_{name}_ms" for q in PERCENTILES)]
            where = (result["label"], str(level_of(result))) if name == LATENCIES[0] else ("", "")
            title = {"e2el": "E2E", "client_queue": "client queue"}.get(name, name.upper())
            table.add_row(*where, title, *(_cell(result.get(key), 1) for key in keys))
    return table


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _replace(path: Path, text: str) -> None:
    """Write a file atomically: an interrupted run leaves the old one whole."""
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
