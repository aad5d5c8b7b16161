"""Plots of an evaluation, of a calibration and of costs. No display is needed."""

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dspark_server.evaluation import measures
from dspark_server.evaluation.collect import Blocks, Floats
from dspark_server.figures import new_figure
from dspark_server.speculation.cost_model import CostModel


def plot_evaluation(blocks: Blocks, domains: list[str], result: dict[str, Any], directory: Path) -> None:
    """positions.png (figure 2 of the paper), thresholds.png (5) and reliability.png (6)."""
    directory.mkdir(parents=True, exist_ok=True)
    slots = np.arange(1, blocks.gamma + 1)

    figure = new_figure(6, 4)
    axes = figure.subplots()
    for name in domains:
        axes.plot(slots, result["domains"][name]["per_position"], marker="o", label=name)
    axes.set(xlabel="draft position", ylabel="accepted, given those before", ylim=(0, 1))
    axes.legend()
    figure.savefig(directory / "positions.png", dpi=120)

    figure = new_figure(9, 4)
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
    """Predicted against observed survival of the prefix, one panel per position, one line for each of `kinds`."""
    columns = min(blocks.gamma, 6)
    rows = -(-blocks.gamma // columns)
    figure = new_figure(3 * columns, 3 * rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for spare in panels[blocks.gamma :]:
        spare.remove()
    for slot, axes in enumerate(panels[: blocks.gamma]):
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        for name, survival in kinds.items():
            points = measures.reliability(survival, blocks, slot)
            ece = measures.ece_by_position(survival, blocks)[slot]
            axes.plot([p[0] for p in points], [p[1] for p in points], marker=".", label=f"{name}: {100 * ece:.1f} %")
        axes.set(title=f"slot {slot + 1}", xlim=(0, 1), ylim=(0, 1))
        axes.legend(fontsize="x-small", loc="upper left")  # off the diagonal
    figure.supxlabel("predicted")
    figure.supylabel("survived")
    figure.savefig(path, dpi=100)


def show_costs(cost_model: CostModel, console: Console) -> None:
    """The measured costs as a table."""
    profile = cost_model.profile
    table = Table(title="a target pass over B tokens, without context")
    for column in ("B", "ms", "SPS(B)", "tokens/s"):
        table.add_column(column, justify="right")
    for tokens, seconds in zip(profile.tokens, profile.verify, strict=True):
        table.add_row(str(tokens), f"{1e3 * seconds:.2f}", f"{1 / seconds:.1f}", f"{tokens / seconds:.0f}")
    console.print(table)
    drafts = Table(title="a draft for R requests")
    for column in ("R", "ms"):
        drafts.add_column(column, justify="right")
    for requests, seconds in zip(profile.requests, profile.draft, strict=True):
        drafts.add_row(str(requests), f"{1e3 * seconds:.2f}")
    console.print(drafts)
    console.print(
        f"1,000 tokens of context cost each run {1e6 * profile.run_context:.2f} ms "
        f"and each of its tokens {1e6 * profile.query_context:.2f} ms more"
    )


def plot_costs(cost_model: CostModel, path: Path) -> None:
    """SPS(B), and seconds of a pass with its convex minorant."""
    profile, tokens = cost_model.profile, np.arange(1, len(cost_model.raw))
    figure = new_figure(9, 4)
    left, right = figure.subplots(1, 2)
    left.plot(tokens, 1 / cost_model.raw[1:])
    left.plot(profile.tokens, 1 / np.array(profile.verify), "o", markersize=3)
    left.set(xlabel="tokens of a target pass, B", ylabel="SPS(B), steps/s", xscale="log")
    right.plot(tokens, 1e3 * cost_model.raw[1:], label="target pass")
    right.plot(tokens, 1e3 * cost_model.convex(1, len(cost_model.raw)), "--", label="convex minorant")
    right.plot(profile.requests, 1e3 * np.array(profile.draft), label="draft for R requests")
    right.set(xlabel="B, or R", ylabel="ms")
    right.legend()
    figure.savefig(path, dpi=120)
