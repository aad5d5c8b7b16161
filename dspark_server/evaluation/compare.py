"""Drafters side by side, from `dspark-server eval --json` of each (figure 2 of the paper):

python -m dspark_server.evaluation.compare FIGURE.png DSpark=greedy.json DSpark=sampled.json DFlash=other.json ...
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dspark_server.figures import new_figure


def plot_positions(results: Sequence[tuple[str, dict[str, Any]]], path: Path) -> None:
    """Acceptance given those before by draft position: a panel for each temperature, a line for each evaluation."""
    temperatures = sorted({result["temperature"] for _, result in results})
    figure = new_figure(5 * len(temperatures), 4)
    panels = figure.subplots(1, len(temperatures), squeeze=False)[0]
    for axes, temperature in zip(panels, temperatures, strict=True):
        for label, result in results:
            if result["temperature"] == temperature:
                # A position that no block reached is null there, and a gap here.
                values = [float("nan") if value is None else value for value in result["per_position"]]
                label = f"{label}: tau {result['macro_tau']:.2f}"
                axes.plot(range(1, len(values) + 1), values, marker="o", label=label)
        axes.set(xlabel="draft position", ylabel="accepted, given those before", ylim=(0, 1))
        axes.set_title(f"temperature {temperature:g}")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    figure.savefig(path, dpi=120)


def main(arguments: list[str]) -> None:
    """The first argument is the figure to write, the others are LABEL=FILE."""
    if len(arguments) < 2 or not all("=" in argument for argument in arguments[1:]):
        sys.exit("usage: python -m dspark_server.evaluation.compare FIGURE.png LABEL=EVALUATION.json ...")
    named = [argument.split("=", 1) for argument in arguments[1:]]
    plot_positions([(label, json.loads(Path(file).read_text())) for label, file in named], Path(arguments[0]))


if __name__ == "__main__":
    main(sys.argv[1:])
