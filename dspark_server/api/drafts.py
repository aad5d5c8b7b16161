"""Draft statistics of one request as vLLM reports them: `metrics.speculative_decoding` of an answer."""

from typing import Any

MAX_STEPS = 4096  # steps listed in detail; the histograms count all


class DraftRecord:
    """Counts of one choice's verified drafts.

    `longest` is the largest number of tokens in a draft. Memory grows with it, and with `detailed` up to MAX_STEPS.
    """

    __slots__ = ("_by_length", "_longest", "_steps")

    def __init__(self, longest: int, *, detailed: bool = False) -> None:
        self._longest = longest
        self._by_length: dict[int, list[int]] = {}  # by draft length: number of drafts by accepted tokens
        self._steps: list[tuple[int, int]] | None = [] if detailed else None

    def add(self, drafted: int, accepted: int) -> None:
        """Count a step that verified `drafted` > 0 draft tokens and accepted the first `accepted` of them."""
        self._by_length.setdefault(drafted, [0] * (drafted + 1))[accepted] += 1
        if self._steps is not None and len(self._steps) < MAX_STEPS:
            self._steps.append((drafted, accepted))

    def figures(self) -> dict[str, Any]:
        """Return the figures under vLLM's names, for JSON.

        Steps without a draft are not counted. The bonus or correction token of a step counts in
        `mean_acceptance_length` only.
        """
        histogram = [0] * (self._longest + 1)
        for counts in self._by_length.values():
            for accepted, steps in enumerate(counts):
                histogram[accepted] += steps
        steps = sum(histogram)
        drafted = sum(length * sum(counts) for length, counts in self._by_length.items())
        accepted = sum(count * number for count, number in enumerate(histogram))
        figures = {
            "mean_acceptance_length": 1 + accepted / steps if steps else 1.0,
            "draft_acceptance_rate": accepted / drafted if drafted else 0.0,
            "acceptance_histogram": histogram,
            "acceptance_histogram_by_draft_length": {
                str(length): counts for length, counts in sorted(self._by_length.items())
            },
            "num_spec_steps": steps,
            "num_accepted_draft_tokens": accepted,
            "num_draft_tokens": drafted,
            "num_spec_tokens": self._longest,
        }
        if self._steps is not None:
            figures["per_step_accepted"] = [accepted for _, accepted in self._steps]
            figures["per_step_drafted"] = [drafted for drafted, _ in self._steps]
        return figures
