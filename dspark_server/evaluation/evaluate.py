"""`dspark-server eval`: measures of a drafter on prompts, as one object and as a table."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dspark_server.config import SpeculativeConfig
from dspark_server.engine.request import SamplingParams
from dspark_server.evaluation import measures
from dspark_server.evaluation.collect import Blocks, Floats, chat_tokens, collect, read_prompts
from dspark_server.evaluation.plots import plot_evaluation

THRESHOLDS = np.round(np.arange(0, 1, 0.1), 2)


@dataclass(frozen=True)
class EvalConfig:
    """An evaluation's settings. `concurrency` requests at once, up to `max_tokens` each, at one temperature."""

    prompts: list[Path]
    model: str
    speculative: SpeculativeConfig
    temperature: float = 0.0
    max_tokens: int = 256
    concurrency: int = 16
    limit: int | None = None
    baseline: bool = True
    raw: bool = False
    plots: Path | None = None


def evaluate(run: EvalConfig) -> dict[str, Any]:
    """Run the prompts with every block verified whole; for speed, also as they are served, and without the drafter."""
    prompts = read_prompts(run.prompts, run.limit)
    domains = sorted({prompt.domain for prompt in prompts})
    groups = [domains.index(prompt.domain) for prompt in prompts]
    tokens = chat_tokens(prompts, run.model, raw=run.raw)
    params = [SamplingParams(max_tokens=run.max_tokens, temperature=run.temperature)] * len(prompts)

    def go(speculative: SpeculativeConfig, label: str) -> tuple[Blocks, float]:
        done = collect(
            tokens,
            params,
            model=run.model,
            speculative=speculative,
            concurrency=run.concurrency,
            groups=groups,
            label=label,
        )
        return done.blocks, done.tokens / done.seconds

    blocks, whole = go(replace(run.speculative, selection="fixed"), "whole blocks")
    served = without = float("nan")
    if run.baseline:
        served = go(run.speculative, f"selection {run.speculative.selection}")[1]
        without = go(SpeculativeConfig(method="none"), "without the drafter")[1]
    result = summary(blocks, domains) | {
        "temperature": run.temperature,
        "requests": len(prompts),
        "selection": run.speculative.selection,
        "tokens_per_second": {"with": served, "without": without, "whole_blocks": whole},
    }
    if run.plots is not None:
        plot_evaluation(blocks, domains, result, run.plots)
    clean: dict[str, Any] = without_nan(result)
    return clean


def summary(blocks: Blocks, domains: list[str]) -> dict[str, Any]:
    """Every measure of the blocks, in total and by domain (group g belongs to domains[g])."""
    parts = {name: blocks.of(blocks.group == index) for index, name in enumerate(domains)}
    by_domain = {
        name: {
            "tau": measures.tau(part),
            "acceptance_rate": measures.acceptance_rate(part),
            "per_position": measures.conditional_acceptance(part),
            "blocks": len(part.accepted),
            "threshold_sweep": measures.threshold_sweep(part, THRESHOLDS),
        }
        for name, part in parts.items()
    }
    return {
        "macro_tau": float(np.mean([measures.tau(part) for part in parts.values()])),
        "domains": by_domain,
        "per_position": measures.conditional_acceptance(blocks),
        "ece": measures.ece_by_position(blocks.survival, blocks),
        "ece_uncalibrated": measures.ece_by_position(uncalibrated(blocks), blocks),
        "auc": measures.auc_by_position(blocks.survival, blocks),
        "acceptance_rate": measures.acceptance_rate(blocks),
        "blocks": len(blocks.accepted),
        "threshold_sweep": measures.threshold_sweep(blocks, THRESHOLDS),
    }


def uncalibrated(blocks: Blocks) -> Floats:
    """a_k [N, gamma] by the head alone, NaN without one; of blocks copied alone, as used in serving."""
    said = (1 / (1 + np.exp(-blocks.confidence))).cumprod(axis=1)
    return np.asarray(np.where(blocks.alone[:, None], blocks.survival, said))


def show(result: dict[str, Any], console: Console) -> None:
    """Print the result as a table."""
    # Only greedy copies are longer than the drafter's blocks: without any, the slots beyond say nothing.
    gamma = max((k for k, value in enumerate(result["per_position"], 1) if value is not None), default=1)
    table = Table(title=f"temperature {result['temperature']:g}, {result['blocks']} blocks; 1 to {gamma}: by slot")
    for column in ("domain", "tau", "rate", *[str(k) for k in range(1, gamma + 1)]):
        table.add_column(column, justify="left" if column == "domain" else "right")
    for name, part in result["domains"].items():
        cells = [_two(value) for value in part["per_position"][:gamma]]
        table.add_row(name, _two(part["tau"]), _two(part["acceptance_rate"]), *cells)
    cells = [_two(value) for value in result["per_position"][:gamma]]
    table.add_row("all (macro tau)", _two(result["macro_tau"]), _two(result["acceptance_rate"]), *cells)
    for name, title in (("ece_uncalibrated", "ECE before, %"), ("ece", "ECE, %"), ("auc", "AUC")):
        scale = 1 if name == "auc" else 100
        cells = [_two(value and scale * value) for value in result[name][:gamma]]
        table.add_row(title, "", "", *cells)
    console.print(table)
    speed = result["tokens_per_second"]
    if speed["without"]:
        ratio = speed["with"] / speed["without"]
        console.print(
            f"{speed['with']:.1f} tok/s with the drafter (selection {result['selection']}), "
            f"{speed['without']:.1f} without: {ratio:.2f} x"
        )


def _two(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def without_nan(value: Any) -> Any:
    """Replace NaN, which JSON does not have, by null."""
    if isinstance(value, dict):
        return {name: without_nan(each) for name, each in value.items()}
    if isinstance(value, list):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
