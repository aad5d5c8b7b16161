"""The learning curve of a run, drawn from its log."""

import csv
from pathlib import Path

from dspark_server.figures import new_figure


def plot_training(log: Path, path: Path) -> None:
    """Held-out tau, at T = 1 and greedy, and the loss, against positions seen; `log` is a run's log.csv."""
    with log.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        return
    seen = [float(row["positions"]) / 1e6 for row in rows]
    figure = new_figure(9, 4)
    left, right = figure.subplots(1, 2)
    left.plot(seen, [float(row["held_out_tau"]) for row in rows], label="T = 1")
    left.plot(seen, [float(row["held_out_greedy_tau"]) for row in rows], label="greedy")
    left.set(xlabel="positions, millions", ylabel="held-out tau", xscale="log")
    left.legend()
    right.plot(seen, [float(row["loss"]) for row in rows])
    right.set(xlabel="positions, millions", ylabel="training loss", xscale="log")
    figure.savefig(path, dpi=120)
