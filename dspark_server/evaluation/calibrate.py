"""`dspark-server calibrate`: fit sequential scaling (temperature and offset) to the acceptance of whole blocks.

The tables of trust in copies from the context are fitted too. Prompts are the held-out ones of a training corpus: one
half is for the fit, the other for its evaluation.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dspark_server.config import SpeculativeConfig
from dspark_server.engine.request import SamplingParams
from dspark_server.errors import ConfigError
from dspark_server.evaluation import measures
from dspark_server.evaluation.collect import Blocks, Floats, collect
from dspark_server.evaluation.evaluate import uncalibrated, without_nan
from dspark_server.evaluation.plots import plot_reliability
from dspark_server.models.hub import resolve_model
from dspark_server.models.registry import load_config
from dspark_server.speculation.calibration import Calibration
from dspark_server.speculation.copying import BUCKETS, CopyTables
from dspark_server.speculation.dspark_formats import DSparkConfig
from dspark_server.speculation.families import family_of
from dspark_server.training.corpus import Corpus, Split

BIASES = np.arange(-2, 16.01, 0.25)
LEAST_SLOPE = 0.05  # least weight of the head's logit, for a head without information or with the contrary


@dataclass(frozen=True)
class CalibrateConfig:
    """`held_out` must equal the training run's; `samples` answers are drawn per prompt at temperature 1."""

    drafter: str
    corpus: Path
    model: str
    held_out: int = 300
    samples: int = 1
    max_tokens: int = 256
    concurrency: int = 16
    plots: Path | None = None


@dataclass(frozen=True)
class Scaling:
    """Divisors of the logits of c_k and offsets that are then added, by position [gamma]."""

    temperatures: tuple[float, ...]
    offsets: tuple[float, ...]


def calibrate(run: CalibrateConfig) -> dict[str, Any]:
    """Fit, store beside the checkpoint, and report the error of predictions before and after on the other prompts."""
    directory = resolve_model(run.drafter)
    if (family := family_of(directory)) != "dspark":
        raise ConfigError(
            f"{run.drafter} is a drafter of method {family}: it has no confidence head to calibrate. How long its "
            "drafts survive is learnt while serving."
        )
    corpus = Corpus.load(run.corpus)
    held_out = Split.of(corpus, run.held_out, 0).held_out
    prompts = [corpus.sequence(index)[: int(corpus.prompt_length[index])].tolist() for index in held_out]
    before = Calibration.load(directory, DSparkConfig.load(directory, load_config(resolve_model(run.model))).gamma)
    tables, report = before.copying, {}
    fitted: dict[float, Scaling] = {}
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
        tables = fit_copying(fit, tables, greedy=temperature == 0)
        fitted[temperature] = fit_scaling(fit, len(before.greedy))
        raw, scaled = uncalibrated(test), predicted(test, fitted[temperature], tables, temperature)
        report[f"{temperature:g}"] = {
            "temperatures": list(fitted[temperature].temperatures),
            "offsets": list(fitted[temperature].offsets),
            "fitted_on_blocks": len(fit.accepted),
            "judged_on_blocks": len(test.accepted),
            "copied_alone": float(test.alone.mean()) if len(test.alone) else 0.0,
            "ece_before": measures.ece_by_position(raw, test),
            "ece_after": measures.ece_by_position(scaled, test),
            "auc_before": measures.auc_by_position(raw, test),
            "auc_after": measures.auc_by_position(scaled, test),
        }
        if run.plots is not None:
            run.plots.mkdir(parents=True, exist_ok=True)
            path = run.plots / f"calibration-T{temperature:g}.png"
            plot_reliability({"before": raw, "after": scaled}, test, path)
    about: dict[str, object] = without_nan(
        {name: {k: v for k, v in part.items() if k not in ("temperatures", "offsets")} for name, part in report.items()}
    )
    greedy, sampled = fitted[0.0], fitted[1.0]
    stored = Calibration(greedy.temperatures, sampled.temperatures, tables, greedy.offsets, sampled.offsets)
    stored.save(directory, {"fit": about})
    return report


def fit_copying(blocks: Blocks, tables: CopyTables, *, greedy: bool) -> CopyTables:
    """Biases, trust and survival of lone copies by match length, where the blocks show them; else from `tables`."""
    name = "greedy" if greedy else "sampled"
    bucket = np.digitize(blocks.match, BUCKETS) - 1  # -1: not biased
    bias, trust = list(getattr(tables, f"{name}_bias")), np.array(getattr(tables, f"{name}_trust"))
    for index in range(len(BUCKETS)):
        use = (bucket == index) & ~np.isnan(blocks.repeated)  # only the drafter's own blocks have values
        odds, repeated = blocks.odds[use][:, None], blocks.repeated[use][:, None]
        # The bias under which the following tokens were likeliest; a little weight on the table's own.
        errors = -np.log(_sigmoid((odds + BIASES) * (2 * repeated - 1)) + 1e-12).sum(axis=0)
        bias[index] = float(BIASES[np.argmin(errors + 0.05 * (BIASES - bias[index]) ** 2)])
    reached = (bucket >= 0) & (blocks.accepted[:, None] >= np.arange(blocks.gamma)) & measures.judged(blocks)
    reached &= ~blocks.alone[:, None]
    if reached.any() and not np.isnan(blocks.confidence[reached]).any():
        features = np.zeros((int(reached.sum()), 2 + len(BUCKETS)))
        features[:, 0], features[:, 1] = blocks.confidence[reached], blocks.odds[reached]
        features[np.arange(len(features)), 2 + bucket[reached]] = 1
        trust = logistic(features, measures.prefix_survived(blocks)[reached].astype(float), trust)
    fitted = replace(tables, **{f"{name}_bias": tuple(bias), f"{name}_trust": tuple(float(round(w, 4)) for w in trust)})
    return fitted if not greedy else replace(fitted, alone=_alone(blocks.of(blocks.alone), tables.alone))


def _alone(blocks: Blocks, prior: tuple[float, ...]) -> tuple[float, ...]:
    """By bucket: acceptance of a token copied alone, given those before it; the prior counts like five tokens."""
    reached = (blocks.accepted[:, None] >= np.arange(blocks.gamma)) & measures.judged(blocks)
    bucket = np.digitize(blocks.match, BUCKETS) - 1
    stood = measures.prefix_survived(blocks)
    shares = []
    for index, chance in enumerate(prior):
        use = reached & (bucket == index)
        shares.append(float(round((stood[use].sum() + 5 * chance) / (use.sum() + 5), 4)))
    return tuple(shares)


def logistic(features: Floats, labels: Floats, prior: Floats) -> Floats:
    """Weights [f] of the logistic regression of labels [N] on features [N, f], shrunk a little towards `prior` [f]."""

    def misfit(weights: Floats) -> float:
        logits = features @ weights
        return float(np.logaddexp(0, logits).sum() - labels @ logits + 0.5 * ((weights - prior) ** 2).sum())

    weights = prior.copy()
    for _ in range(30):
        chance = _sigmoid(features @ weights)
        gradient = features.T @ (chance - labels) + (weights - prior)
        curvature = (features.T * (chance * (1 - chance))) @ features + np.eye(len(prior))
        change = np.linalg.solve(curvature, gradient)
        while misfit(weights - change) > misfit(weights) and np.abs(change).max() > 1e-6:
            change = change / 2  # far from the optimum, Newton's step may overshoot
        weights = weights - change
        if np.abs(change).max() < 1e-6:
            break
    return weights


def fit_scaling(blocks: Blocks, gamma: int) -> Scaling:
    """Left to right: the scaling of logit k under which the outcomes of the slots that were reached are likeliest.

    Over the drafter's own blocks, `gamma` slots of each, in slots without a copy bias.
    """
    stood = measures.prefix_survived(blocks).astype(float)
    reached = (blocks.accepted[:, None] >= np.arange(blocks.gamma)) & measures.judged(blocks)
    reached &= (blocks.match == 0) & ~blocks.alone[:, None] & ~np.isnan(blocks.confidence)
    temperatures, offsets = [], []
    for k in range(gamma):
        use = reached[:, k]
        features = np.stack([blocks.confidence[use, k], np.ones(use.sum())], axis=1)
        slope, offset = logistic(features, stood[use, k], np.array([1.0, 0.0]))
        temperatures.append(float(round(1 / max(slope, LEAST_SLOPE), 4)))
        offsets.append(float(round(offset, 4)))
    return Scaling(tuple(temperatures), tuple(offsets))


def predicted(blocks: Blocks, scaling: Scaling, tables: CopyTables, temperature: float) -> Floats:
    """a_k [N, gamma] after scaling, as in the engine; of blocks copied alone, the engine's own (it knew more)."""
    scale, shift = np.ones(blocks.gamma), np.zeros(blocks.gamma)
    gamma = len(scaling.temperatures)
    scale[:gamma], shift[:gamma] = scaling.temperatures, scaling.offsets
    own = _sigmoid(blocks.confidence / scale + shift)
    chance = np.where(blocks.match > 0, _copied(blocks, tables, temperature), own)
    return np.asarray(np.where(blocks.alone[:, None], blocks.survival, chance.cumprod(axis=1)))


def _copied(blocks: Blocks, tables: CopyTables, temperature: float) -> Floats:
    """Probability [N, gamma] that slots biased by a match are accepted."""
    trust = np.array(tables.sampled_trust if temperature else tables.greedy_trust)
    offset = trust[2:][np.maximum(np.digitize(blocks.match, BUCKETS) - 1, 0)]
    return _sigmoid(trust[0] * blocks.confidence + trust[1] * blocks.odds + offset)


def _sigmoid(values: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-np.clip(values, -60, 60))))
