"""Draws the figure of the README from the tables of docs/benchmarks.md.

python loadtest/gain.py        # writes docs/figures/gain.svg
"""

import re
from pathlib import Path
from statistics import geometric_mean
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "docs" / "benchmarks.md"
FIGURE = ROOT / "docs" / "figures" / "gain.svg"
BESIDE_VLLM = "commit ea6a1ab"  # the paragraph before the table of the last round beside vLLM-CPU
SWEEP = "commit a6264d4"  # the paragraph before the table of the greedy sweep of selection policies
USERS = (1, 8, 32)


class Row(NamedTuple):
    """Output tokens per second of one concurrency: ours and vLLM-CPU's, greedy and at temperature 1."""

    users: int
    greedy: float
    greedy_vllm: float
    sampled: float
    sampled_vllm: float


def table_after(text: str, phrase: str) -> list[list[str]]:
    """The cells of the first table behind a phrase, without its head."""
    lines = text[text.index(phrase) :].splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip(" *") for cell in line.strip("|").split("|")])
    return rows


def beside_vllm() -> list[Row]:
    """The last round beside vLLM-CPU, at every concurrency measured."""
    rows = table_after(BENCHMARKS.read_text(), BESIDE_VLLM)
    return [Row(int(r[0]), float(r[1]), float(r[2]), float(r[5]), float(r[6])) for r in rows]


def over_no_drafts() -> dict[int, float]:
    """Throughput of `causal` over that of `none`, by users: geometric mean of the domains of the greedy sweep."""
    ratios: dict[int, list[float]] = {}
    for _, load, none, _, causal, *_ in table_after(BENCHMARKS.read_text(), SWEEP):
        ratios.setdefault(int(re.sub(r"\D", "", load)), []).append(float(causal) / float(none))
    return {users: geometric_mean(values) for users, values in ratios.items()}


def table() -> str:
    """The table of the README."""
    gains = over_no_drafts()
    lines = [
        "| users at once | greedy, tok/s: ours / vLLM-CPU | | T = 1, tok/s: ours / vLLM-CPU | "
        "| drafts / no drafts, greedy |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in beside_vllm():
        if row.users in USERS:
            greedy = f"{row.greedy:.0f} / {row.greedy_vllm:.0f} | **{row.greedy / row.greedy_vllm:.2f} ×**"
            sampled = f"{row.sampled:.0f} / {row.sampled_vllm:.0f} | **{row.sampled / row.sampled_vllm:.2f} ×**"
            lines.append(f"| {row.users} | {greedy} | {sampled} | {gains[row.users]:.2f} × |")
    return "\n".join(lines) + "\n"


def draw(path: Path) -> None:
    """Two panels of bars, each pair with its ratio."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "gain", "font.size": 10}
    from matplotlib import pyplot

    rows = beside_vllm()
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3), sharey=True, layout="constrained")
    for panel, title, pairs in (
        (panels[0], "greedy", [(row.greedy, row.greedy_vllm) for row in rows]),
        (panels[1], "T = 1", [(row.sampled, row.sampled_vllm) for row in rows]),
    ):
        for index, (ours, theirs) in enumerate(pairs):
            panel.bar(index - 0.2, ours, 0.38, color="#0b6b61", label="dspark-server" if not index else None)
            panel.bar(index + 0.2, theirs, 0.38, color="#c9c6bb", label="vLLM-CPU 0.32" if not index else None)
            panel.text(index, ours + 9, f"{ours / theirs:.2f} ×", ha="center", weight="bold")
        panel.set_xticks(range(len(rows)), [str(row.users) for row in rows])
        panel.set_xlabel("users at once")
        panel.set_title(title, loc="left")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(0, 640)
    panels[0].set_ylabel("output tokens per second")
    panels[0].legend(frameon=False, loc="upper left")
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    draw(FIGURE)
    print(table(), end="")
