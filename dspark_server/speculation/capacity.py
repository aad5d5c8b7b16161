"""What a step costs on this machine: draft(R) + verify(B, context), measured at start and corrected while serving.

Shapes: B tokens of a target pass (anchors, drafts and prefill chunks), R drafting requests. SPS(B), the paper's steps
per second, is 1 / verify(B) (DSpark §3.2.2).
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dspark_server.errors import ConfigError

Floats = npt.NDArray[np.float64]

CORRECTION = 0.02  # how far one step moves its whole table towards what it took: mostly the machine is slower or faster
SHAPE = 0.005  # and how far, beyond that, the measured sizes next to its own
REBUILD_EVERY = 32  # observations between two looks at the corrected table
OUTLIER = 3.0  # a step that took this many times longer than expected says nothing about cost


@dataclass(frozen=True)
class Profile:
    """Medians in seconds.

    verify[i] is a target pass over tokens[i] tokens without context; draft[i] a draft of requests[i] blocks. A token of
    context costs each run that reads it `run_context` (its rows are read once) and each query token `query_context`
    more. An empty draft table belongs to an engine without a drafter.
    """

    tokens: tuple[int, ...]
    verify: tuple[float, ...]
    requests: tuple[int, ...]
    draft: tuple[float, ...]
    run_context: float
    query_context: float

    def __post_init__(self) -> None:
        tables = {"verify": (self.tokens, self.verify), "draft": (self.requests, self.draft)}
        for name, (sizes, seconds) in tables.items():
            if len(sizes) != len(seconds) or any(a >= b for a, b in itertools.pairwise(sizes)):
                raise ConfigError(f"The capacity profile's {name} table needs one time for each of rising sizes.")
            if not all(0 < second < float("inf") for second in seconds):
                raise ConfigError(f"The capacity profile's {name} times must be positive.")
        if not self.tokens:
            raise ConfigError("The capacity profile's verify table is empty.")

    @classmethod
    def load(cls, path: Path) -> "Profile":
        """Read what `save` wrote. Raises ConfigError if it is anything else."""
        try:
            fields: Any = json.loads(path.read_text())
            values: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
            }
            return cls(**values)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is not a capacity profile: {error}") from None

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


class Capacity:
    """The cost model that selection reads. Tables are dense in B and R, never fall, and drift slowly with serving."""

    def __init__(self, profile: Profile, max_tokens: int, max_requests: int) -> None:
        """`max_tokens` and `max_requests` bound a step."""
        self._profile = profile
        self._sizes = np.arange(max_tokens + 1)
        self._requests = np.arange(max_requests + 1)
        self._verify_knots = np.array(profile.verify, dtype=np.float64)
        self._draft_knots = np.array(profile.draft, dtype=np.float64)
        self._overhead = 0.0
        self._observations = 0
        self._rebuild()

    # -- what selection reads ----------------------------------------------------------------------------------------

    @property
    def profile(self) -> Profile:
        """As measured at start."""
        return self._profile

    @property
    def raw(self) -> Floats:
        """[max_tokens + 1] seconds of a target pass over B tokens, attention to context excepted."""
        return self._raw

    def convex(self, tokens: int, drafts: int) -> Floats:
        """The greatest convex minorant of `raw` from `tokens` on, as far as so many drafts reach or up to twice as far.

        There an early stop finds the best (DSPARK.md, step 6). No further than that: what a smaller or greater pass
        would cost is no choice of this step, and the nearer the ends, the closer the minorant is to the curve.
        """
        start = min(tokens, len(self._raw) - 1)
        last = min(start + (1 << max(0, drafts - 1).bit_length()), len(self._raw) - 1)  # powers of two: few to keep
        found = self._convex.get((start, last))
        if found is None:
            corners = [start, *(size for size in self._profile.tokens if start < size < last), last]
            found = self._convex[start, last] = convex_minorant(corners, self._raw[corners].tolist())
        return found

    @property
    def verify_seconds(self) -> dict[int, float]:
        """Seconds of a pass over B tokens, at the sizes that were measured; a new object when the table changes."""
        return self._verify_seconds

    def draft(self, requests: int) -> float:
        """Seconds to draft blocks for so many requests; 0 for none."""
        return float(self._drafts[min(requests, len(self._drafts) - 1)]) if requests else 0.0

    @property
    def overhead(self) -> float:
        """Seconds of a step outside both models: planning, choosing who drafts, acceptance, commit."""
        return self._overhead

    def attention(self, context: float, pairs: float) -> float:
        """Seconds of reading `context` tokens of context, all runs together, for `pairs` (query, context) pairs."""
        return self._profile.run_context * context + self._profile.query_context * pairs

    # -- what serving teaches ----------------------------------------------------------------------------------------

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
        """A step took so many seconds: the table moves a little towards it."""
        expected = float(self._raw[min(tokens, len(self._raw) - 1)])
        _correct(self._profile.tokens, self._verify_knots, tokens, verify - self.attention(context, pairs), expected)
        if requests and len(self._draft_knots):
            _correct(self._profile.requests, self._draft_knots, requests, draft, self.draft(requests))
        if overhead < OUTLIER * self._overhead or not self._overhead:
            self._overhead += (overhead - self._overhead) * (CORRECTION if self._overhead else 1.0)
        self._observations += 1
        if self._observations % REBUILD_EVERY == 0:
            self._rebuild()

    def _rebuild(self) -> None:
        # Where measured times fall, the knots are raised, not what is between them: straight lines all the way.
        self._raw = _dense(self._profile.tokens, np.maximum.accumulate(self._verify_knots), self._sizes)
        self._convex: dict[tuple[int, int], Floats] = {}
        sizes = [size for size in self._profile.tokens if size < len(self._raw)]
        self._verify_seconds = {size: float(self._raw[size]) for size in sizes}
        self._drafts = np.zeros(len(self._requests))
        if len(self._draft_knots):
            self._drafts = _dense(self._profile.requests, np.maximum.accumulate(self._draft_knots), self._requests)


def _dense(sizes: Sequence[int], seconds: Floats, at: npt.NDArray[np.int64]) -> Floats:
    """Linear between the measured sizes, the last slope beyond them, the first value before them."""
    values = np.interp(at, sizes, seconds)
    if len(sizes) > 1:
        slope = max(0.0, (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2]))
        values = np.where(at > sizes[-1], seconds[-1] + slope * (at - sizes[-1]), values)
    return np.asarray(values, dtype=np.float64)


def _correct(sizes: Sequence[int], knots: Floats, size: int, seconds: float, expected: float) -> None:
    """Move all knots towards `seconds`, those around `size` further, each by its share in the interpolated value.

    Were it those alone, a machine that slows down would make the size that is served dear and leave the others cheap:
    more drafts would look worth their while for no reason.
    """
    if not expected / OUTLIER < seconds < expected * OUTLIER:
        return
    off = seconds / expected - 1
    knots *= 1 + CORRECTION * off
    right = int(np.searchsorted(sizes, size))
    if right == 0 or right == len(sizes):
        knots[min(right, len(sizes) - 1)] *= 1 + SHAPE * off
        return
    share = (size - sizes[right - 1]) / (sizes[right] - sizes[right - 1])
    knots[right - 1] *= 1 + SHAPE * (1 - share) * off
    knots[right] *= 1 + SHAPE * share * off


def convex_minorant(sizes: Sequence[int], seconds: Sequence[float]) -> Floats:
    """The greatest convex function on sizes[0], sizes[0] + 1 .. sizes[-1] that nowhere exceeds `seconds` at `sizes`."""
    hull: list[int] = []
    for index, (size, value) in enumerate(zip(sizes, seconds, strict=True)):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (seconds[b] - seconds[a]) * (size - sizes[a]) < (value - seconds[a]) * (sizes[b] - sizes[a]):
                break
            hull.pop()
        hull.append(index)
    corners = [sizes[index] for index in hull], [seconds[index] for index in hull]
    return np.asarray(np.interp(np.arange(sizes[0], sizes[-1] + 1), *corners))
