"""Plots of an evaluation and of a calibration. No display is needed."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dspark_server.evaluation import measures
from dspark_server.evaluation.collect import Blocks, Floats


def plot_evaluation(blocks: Blocks, domains: list[str], result: dict[str, Any], directory: Path) -> None:
    """positions.png (figure 2 of the paper), thresholds.png (5) and reliability.png (6)."""
    directory.mkdir(parents=True, exist_ok=True)
    slots = np.arange(1, blocks.gamma + 1)

    figure = Figure((6, 4), layout="constrained")
    axes = figure.subplots()
    for name in domains:
        axes.plot(slots, result["domains"][name]["per_position"], marker="o", label=name)
    axes.set(xlabel="draft position", ylabel="accepted, given those before", ylim=(0, 1))
    axes.legend()
    figure.savefig(directory / "positions.png", dpi=120)

    figure = Figure((9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in domains:
        sweep = result["domains"][name]["threshold_sweep"]
        at = [row["threshold"] for row in sweep]
        left.plot(at, [row["acceptance_rate"] for row in sweep], marker="o", label=name)
        right.plot([row["verified"] for row in sweep], [row["tau"] for row in sweep], marker="o", label=name)
    left.set(xlabel="threshold on the survival of the prefix", ylabel="acceptance rate", ylim=(0, 1))
    right.set(xlabel="draft tokens verified a cycle", ylabel="tau")
    left.legend()
    figure.savefig(directory / "thresholds.png", dpi=120)

    plot_reliability({"as served": blocks.survival}, blocks, directory / "reliability.png")


def plot_reliability(kinds: dict[str, Floats], blocks: Blocks, path: Path) -> None:
    """Predicted against observed survival of the prefix, one panel a position, one line for each of `kinds`."""
    figure = Figure((3 * blocks.gamma, 3), layout="constrained")
    for slot, axes in enumerate(np.atleast_1d(figure.subplots(1, blocks.gamma))):
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        for name, survival in kinds.items():
            points = measures.reliability(survival, blocks, slot)
            ece = measures.ece_by_position(survival, blocks)[slot]
            axes.plot([p[0] for p in points], [p[1] for p in points], marker=".", label=f"{name}: {100 * ece:.1f} %")
        axes.set(title=f"slot {slot + 1}", xlabel="predicted", ylabel="survived", xlim=(0, 1), ylim=(0, 1))
        axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=100)
