"""The paper's figures 7 and 8 of a load test. No display is needed."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loadtest.report import Result, level_of


def plot(medians: Sequence[Result], directory: Path) -> list[Path]:
    """Write throughput-per-user.png (figure 7) and throughput-and-budget.png (figure 8); returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[Result]] = {}
    for result in medians:
        lines.setdefault(result["label"], []).append(result)
    for results in lines.values():
        results.sort(key=_load)

    figure = Figure((6, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, results in lines.items():
        points = [r for r in results if r.get("mean_user_throughput") is not None]
        across = [r["mean_user_throughput"] for r in points]
        up = [r["output_throughput"] for r in points]
        axes.plot(across, up, marker="o", label=name)
        for result, x, y in zip(points, across, up, strict=True):
            axes.annotate(f"{_load(result):g}", (x, y), textcoords="offset points", xytext=(4, 4), fontsize="x-small")
    axes.set(xlabel="output tok/s per user", ylabel="output tok/s")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    _legend(axes)
    users = directory / "throughput-per-user.png"
    figure.savefig(users, dpi=120)

    figure = Figure((10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, key, label in (
        (left, "output_throughput", "output tok/s"),
        (right, "verification_budget", "tokens verified per request and step"),
    ):
        for name, results in lines.items():
            points = [r for r in results if r.get(key) is not None]
            style = {"marker": "o", "label": name if points else None}
            axes.plot([_load(r) for r in points], [r[key] for r in points], **style)
        closed = all(level_of(result).rate is None for result in medians)
        axes.set(xlabel="concurrency" if closed else "requests/s", ylabel=label)
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        loads = sorted({_load(result) for result in medians})
        axes.set_xticks(loads, [f"{load:g}" for load in loads])
        axes.minorticks_off()
        _legend(axes)
    if not any(result.get("verification_budget") is not None for result in medians):
        right.text(0.5, 0.5, "no speculation counters in /metrics", ha="center", transform=right.transAxes)
    budget = directory / "throughput-and-budget.png"
    figure.savefig(budget, dpi=120)
    return [users, budget]


def _load(result: Result) -> float:
    level = level_of(result)
    return float(level.rate if level.rate is not None else level.concurrency or 0)


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
