"""The cost of a step on this machine: draft(R) + verify(B, context), measured at start and corrected while serving.

Shapes: B tokens of a target pass (anchors, drafts and prefill chunks), R drafting requests. SPS(B), the paper's steps
per second, is 1 / verify(B) (DSpark §3.2.2).
"""

import itertools
import json
import math
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from dspark_server.errors import ConfigError
from dspark_server.speculation.correction import Correction, Sieve
from dspark_server.speculation.curves import convex_minorant, dense, isotonic, runs_as, shares
from dspark_server.speculation.slowdown import Slowdown

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

STALE = 0.02  # a cost that corrections have moved by this share makes the tables be built again
OVERHEAD_GAIN = 0.1  # of a step's overhead in their average
COMPARABLE = 64  # steps after one without drafts whose overhead is compared with its: later the load may be another
SHORTEST, LONGEST = 1e-9, 1e6  # seconds: a measured draft or pass outside of these is an error of the clock


@dataclass(frozen=True)
class Profile:
    """Seconds on an undisturbed machine.

    verify[i] is a target pass over tokens[i] tokens without context; draft[i] a draft of requests[i] blocks. A token of
    context costs each run that reads it `run_context` (its rows are read once) and each query token `query_context`
    more. The draft table is empty for an engine without a drafter.

    `recorded` are the sizes of recorded passes (CUDA graphs), in tokens: a pass runs as the next of them, padded, and
    past the largest at its own size. `recorded_drafts` are those of drafts, in requests. Both are empty on a CPU.
    """

    tokens: tuple[int, ...]
    verify: tuple[float, ...]
    requests: tuple[int, ...]
    draft: tuple[float, ...]
    run_context: float
    query_context: float
    recorded: tuple[int, ...] = ()
    recorded_drafts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        tables = {"verify": (self.tokens, self.verify), "draft": (self.requests, self.draft)}
        for name, (sizes, seconds) in tables.items():
            if len(sizes) != len(seconds) or any(a >= b for a, b in itertools.pairwise(sizes)):
                raise ConfigError(f"The cost profile's {name} table needs one time for each of rising sizes.")
            if not all(0 < second < float("inf") for second in seconds):
                raise ConfigError(f"The cost profile's {name} times must be positive.")
        for recorded in (self.recorded, self.recorded_drafts):
            if any(a >= b for a, b in itertools.pairwise((0, *recorded))):
                raise ConfigError("The cost profile's recorded sizes must be positive and rise.")
        if not self.tokens:
            raise ConfigError("The cost profile's verify table is empty.")

    @classmethod
    def load(cls, path: Path) -> "Profile":
        """Read a file written by `save`. Raises ConfigError if it is anything else."""
        try:
            fields: Any = json.loads(path.read_text())
            values: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
            }
            return cls(**values)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is not a cost profile: {error}") from None

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


class CostModel:
    """The cost model that selection reads: the profile, corrected by the measured times of steps (`correction`).

    Tables are dense in B and R and never fall: a staircase up to the largest recorded size, lines beyond.
    """

    def __init__(self, profile: Profile, max_tokens: int, max_requests: int) -> None:
        """`max_tokens` and `max_requests` bound a step."""
        self._profile = profile
        self._sizes = runs_as(profile.recorded, np.arange(max_tokens + 1))
        self._requests = runs_as(profile.recorded_drafts, np.arange(max_requests + 1))
        self._corners = sorted({*profile.tokens, *profile.recorded})
        self._correction = Correction([profile.tokens, (1,), profile.requests])
        self._sieves = {"verify": Sieve(), "draft": Sieve()}
        self._since = 0.0  # seconds of steps since the last correction
        self._overhead = Overhead()
        self._drafting = Overhead()  # more of it, for each request that drafts
        self._since_plain = COMPARABLE  # steps since one without drafts
        self._slowdown = Slowdown()
        self._build()
        self._start_raw, self._start_drafts = self._raw, self._drafts

    # -- read by selection -------------------------------------------------------------------------------------------

    @property
    def profile(self) -> Profile:
        """As measured at start."""
        return self._profile

    @property
    def raw(self) -> Floats:
        """[max_tokens + 1] seconds of a target pass over B tokens, attention to context excepted."""
        return self._raw

    @property
    def stairs(self) -> Integers | None:
        """[max_tokens + 1] size that a pass over B tokens runs at; None where each size has a cost of its own."""
        return self._sizes if self._profile.recorded else None

    @property
    def largest_recorded(self) -> int:
        """Tokens of the largest recorded pass; 0 without any."""
        return self._profile.recorded[-1] if self._profile.recorded else 0

    def full_draft(self, requests: int) -> int:
        """Number of requests, at least `requests`, that can draft at the same cost."""
        return int(self._requests[requests]) if requests < len(self._requests) else requests

    def convex(self, tokens: int, drafts: int) -> Floats:
        """The greatest convex minorant of `raw` from `tokens` to the end of `drafts` draft tokens or to twice as far.

        There an early stop finds the best (DSPARK.md, step 6). It goes no further: the cost of smaller or greater
        passes is irrelevant to this step, and the nearer the ends, the closer the minorant is to the curve.
        """
        start = min(tokens, len(self._raw) - 1)
        last = min(start + (1 << max(0, drafts - 1).bit_length()), len(self._raw) - 1)  # powers of two: few to keep
        return self._minorant(start, last)

    def convex_apart(self, tokens: int, drafts: int) -> Floats:
        """`convex`, but passes past the largest recorded size have a minorant of their own.

        A chord over that size would hide what the first token past it costs.
        """
        whole, start = self.convex(tokens, drafts), min(tokens, len(self._raw) - 1)
        last = start + len(whole) - 1
        if not start <= self.largest_recorded < last:
            return whole
        beyond = self._minorant(self.largest_recorded + 1, last)
        return np.concatenate([whole[: -len(beyond)], beyond])

    def _minorant(self, start: int, last: int) -> Floats:
        """[last - start + 1] the greatest convex minorant of `raw` between the two."""
        found = self._convex.get((start, last))
        if found is None:
            corners = [start, *(size for size in self._corners if start < size < last), last]
            found = self._convex[start, last] = convex_minorant(corners, self._raw[corners].tolist())
        return found

    @property
    def verify_seconds(self) -> dict[int, float]:
        """Seconds of a pass over B tokens, at the measured sizes; a new object when the table changes."""
        return self._verify_seconds

    def draft(self, requests: int) -> float:
        """Seconds that drafts of `requests` requests add to a step beside their verification; 0 for none.

        The draft itself, and what planning, rules and acceptance take longer than in a step without drafts: penalties
        and masks of a block's slots can take as long as a fifth of the draft.
        """
        return float(self._drafts[min(requests, len(self._drafts) - 1)]) + self.drafting_overhead(requests)

    def drafting_overhead(self, requests: int) -> float:
        """The part of `draft` that is neither model's."""
        return requests * self._drafting.seconds

    def doubt(self, tokens: int) -> float:
        """Standard deviation of the log of `raw[tokens]`: large where such passes have not been measured lately."""
        parts = self._verify_parts(min(tokens, len(self._raw) - 1), 0.0)
        return math.sqrt(self._correction.variance(parts / parts.sum()))

    @property
    def overhead(self) -> float:
        """Seconds of a step without drafts outside of its pass: planning, choice of drafting requests, commit.

        Of any step, while there is none without drafts.
        """
        return self._overhead.seconds

    def attention(self, context: float, pairs: float) -> float:
        """Seconds of reading `context` tokens of context, all runs together, for `pairs` (query, context) pairs."""
        return self._attention * (self._profile.run_context * context + self._profile.query_context * pairs)

    # -- shown to people -------------------------------------------------------------------------------------------

    @property
    def slowdown(self) -> float:
        """Recent seconds of draft and pass, divided by the seconds that the profile measured at start gives for them.

        Averaged over some seconds of steps; 1 before the first.
        """
        return self._slowdown.ratio

    @property
    def slow(self) -> bool:
        """Steps have taken five times the profile's seconds for some seconds (`Slowdown`)."""
        return self._slowdown.slow

    # -- learned while serving ----------------------------------------------------------------------------------------

    def observe(
        self,
        *,
        tokens: int,
        context: float,
        pairs: float,
        verify: float,
        requests: int,
        draft: float,
        overhead: float,
    ) -> None:
        """Learn from the seconds of a step. Values that no clock can have measured are ignored."""
        reading = self._profile.run_context * context + self._profile.query_context * pairs
        size, drafting = min(tokens, len(self._raw) - 1), min(requests, len(self._drafts) - 1)
        drafted = requests > 0 and len(self._profile.draft) > 0
        if not _measured(verify) or (drafted and not _measured(draft)):
            return
        whole = verify + draft if drafted else verify
        self._since += whole
        self._slowdown.observe(whole / (self._start_raw[size] + reading + self._start_drafts[drafting]), whole)
        self._learn("verify", verify, self._verify_parts(size, reading))
        if drafted:
            self._learn("draft", draft, self._draft_parts(drafting))
        self._since_plain = self._since_plain + 1 if drafted else 0
        if drafted and self._since_plain <= COMPARABLE:
            self._drafting.learn((overhead - self._overhead.seconds) / requests)
        else:
            self._overhead.learn(overhead)

    def _verify_parts(self, size: int, reading: float) -> Floats:
        """[K] seconds that each cost contributes to a pass."""
        parts, passes = np.zeros(len(self._built)), len(self._verify)
        parts[:passes] = self._raw[size] * shares(self._profile.tokens, self._verify, int(self._sizes[size]))
        parts[passes] = self._attention * reading
        return parts

    def _draft_parts(self, requests: int) -> Floats:
        """[K] seconds that each cost contributes to a draft."""
        parts = np.zeros(len(self._built))
        size = int(self._requests[requests])
        parts[len(self._verify) + 1 :] = self._drafts[requests] * shares(self._profile.requests, self._draft, size)
        return parts

    def _learn(self, part: str, seconds: float, expected: Floats) -> None:
        total = float(expected.sum())
        heard = self._sieves[part].add(int(expected.argmax()), math.log(seconds / total), expected / total)
        if heard is None:
            return
        log_ratio, parts = heard
        self._correction.update(parts, log_ratio, self._since)
        self._since = 0.0
        if np.abs(np.log(self._correction.factors / self._built)).max() > STALE:
            self._build()

    def _build(self) -> None:
        """Build the tables from the current factors."""
        profile, self._built = self._profile, self._correction.factors
        verify, attention, draft = np.split(self._built, [len(profile.tokens), len(profile.tokens) + 1])
        self._attention = float(attention[0])
        # Where corrected times fall, the knots are pooled, not the points between them, so that lines stay straight.
        # Recently measured costs stay: the others are adjusted.
        sure = np.split(self._correction.certainty, [len(verify), len(verify) + 1])
        self._verify = isotonic(verify * profile.verify, sure[0])
        self._draft = isotonic(draft * profile.draft, sure[2])
        self._raw = dense(profile.tokens, self._verify, self._sizes)
        self._convex: dict[tuple[int, int], Floats] = {}
        self._verify_seconds = {size: float(self._raw[size]) for size in profile.tokens if size < len(self._raw)}
        self._drafts = np.zeros(len(self._requests))
        if len(profile.draft):
            self._drafts = dense(profile.requests, self._draft, self._requests)
            self._drafts[0] = 0.0


class Overhead:
    """A recent average of seconds outside both models. The median of three ignores a single step that was held up."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._last: deque[float] = deque(maxlen=3)

    def learn(self, seconds: float) -> None:
        """Add a step's; values that no clock can have measured are ignored."""
        if not seconds < LONGEST:  # nor NaN
            return
        first = not self._last
        self._last.append(max(0.0, seconds))
        self.seconds += (median(self._last) - self.seconds) * (1.0 if first else OVERHEAD_GAIN)


def _measured(seconds: float) -> bool:
    return SHORTEST < seconds < LONGEST  # False for NaN
