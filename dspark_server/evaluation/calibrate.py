"""`dspark-server calibrate`: fit sequential temperature scaling on what the target does with whole blocks.

Prompts are the held-out ones of a training corpus: half of them fit the temperatures, the other half judges them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dspark_server.config import SpeculativeConfig
from dspark_server.engine.request import SamplingParams
from dspark_server.evaluation import measures
from dspark_server.evaluation.collect import Blocks, Floats, collect
from dspark_server.evaluation.evaluate import uncalibrated
from dspark_server.evaluation.plots import plot_reliability
from dspark_server.models.hub import resolve_model
from dspark_server.speculation.calibration import Calibration
from dspark_server.training.corpus import Corpus, Split

GRID = np.exp(np.linspace(np.log(0.2), np.log(5.0), 161))


@dataclass(frozen=True)
class CalibrateConfig:
    """`held_out` must be what the training run held out; `samples` answers are drawn per prompt at temperature 1."""

    drafter: str
    corpus: Path
    model: str
    held_out: int = 300
    samples: int = 1
    max_tokens: int = 256
    concurrency: int = 16
    plots: Path | None = None


def calibrate(run: CalibrateConfig) -> dict[str, Any]:
    """Fit, store beside the checkpoint, and say how well predictions held before and after on the other prompts."""
    directory = resolve_model(run.drafter)
    corpus = Corpus.load(run.corpus)
    held_out = Split.of(corpus, run.held_out, 0).held_out
    prompts = [corpus.sequence(index)[: int(corpus.prompt_length[index])].tolist() for index in held_out]
    fitted, report = {}, {}
    for temperature in (0.0, 1.0):
        samples = run.samples if temperature else 1
        blocks = collect(
            prompts * samples,
            [SamplingParams(max_tokens=run.max_tokens, temperature=temperature)] * (samples * len(prompts)),
            model=run.model,
            speculative=SpeculativeConfig(method="dspark", model=str(directory), selection="fixed"),
            concurrency=run.concurrency,
            groups=list(range(len(prompts))) * samples,
            label=f"temperature {temperature:g}",
        ).blocks
        fit, test = blocks.of(blocks.group % 2 == 0), blocks.of(blocks.group % 2 == 1)
        fitted[temperature] = fit_temperatures(fit)
        before, after = uncalibrated(test), scaled(test.confidence, fitted[temperature])
        report[f"{temperature:g}"] = {
            "temperatures": fitted[temperature],
            "fitted_on_blocks": len(fit.accepted),
            "judged_on_blocks": len(test.accepted),
            "ece_before": measures.ece_by_position(before, test),
            "ece_after": measures.ece_by_position(after, test),
            "auc_before": measures.auc_by_position(before, test),
            "auc_after": measures.auc_by_position(after, test),
        }
        if run.plots is not None:
            run.plots.mkdir(parents=True, exist_ok=True)
            path = run.plots / f"calibration-T{temperature:g}.png"
            plot_reliability({"before": before, "after": after}, test, path)
    about = {name: {k: v for k, v in part.items() if k != "temperatures"} for name, part in report.items()}
    Calibration(tuple(fitted[0.0]), tuple(fitted[1.0])).save(directory, {"fit": about})
    return report


def fit_temperatures(blocks: Blocks) -> list[float]:
    """Left to right: the temperature of logit k whose cumulative product errs least, those before it fixed."""
    survival = np.ones(len(blocks.accepted))
    stood, known = measures.prefix_survived(blocks), measures.judged(blocks)
    temperatures = []
    for k in range(blocks.gamma):
        use = known[:, k]
        if not use.any():
            temperatures.append(1.0)
            continue
        candidates = [survival * _sigmoid(blocks.confidence[:, k] / t) for t in GRID]
        errors = [measures.expected_calibration_error(a[use], stood[use, k]) for a in candidates]
        best = int(np.argmin(errors))
        temperatures.append(float(round(GRID[best], 4)))
        survival = survival * _sigmoid(blocks.confidence[:, k] / temperatures[-1])
    return temperatures


def scaled(confidence: Floats, temperatures: list[float]) -> Floats:
    """a_k [N, gamma] after scaling."""
    return np.asarray(_sigmoid(confidence / np.array(temperatures)).cumprod(axis=1))


def _sigmoid(values: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-values)))
