"""Measures the cost of drafts and target passes here, on the serving path: the cost table of selection (SPS(B)).

Profiles are kept in the user's cache per machine, model, drafter and version, so that only the first start measures.
"""

import hashlib
import itertools
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from dspark_server.engine.executor import Executor
from dspark_server.errors import ConfigError
from dspark_server.runtime.batch import Run
from dspark_server.runtime.paging import BlockTable, CacheGroup, tables_for
from dspark_server.speculation.cost_model import Profile
from dspark_server.speculation.curves import isotonic, runs_as
from dspark_server.speculation.draft_block import DraftRequest
from dspark_server.speculation.noise import CounterStreams
from dspark_server.speculation.sampling import SamplingBatch

logger = logging.getLogger(__name__)

VERSION = 6  # of the measurement; a change makes every kept profile stale
ROUNDS = 5  # over all sizes
FEWEST = 3  # minimum number of rounds, however long they take
PATIENCE = 10.0  # seconds after which no further round begins
WARM = (1, 16, 256)  # tokens of the passes that are run before the first request, as far as a step may have them
PROBED = (1, 8, 32)  # tokens of the passes that check a kept profile
TRIALS = 3  # of each
VARIOUS = 128  # ids of tokens in a pass
TOLERANCE = 1.5  # factor between kept and present seconds beyond which a profile is measured again


class Work(NamedTuple):
    """A call to time, and a call that is run before it each time, untimed."""

    run: Callable[[], object]
    before: Callable[[], object] = lambda: None


class Profiler:
    """Times an executor on a KV pool not in use yet: `num_blocks` blocks of the sizes of `groups`.

    No sequence is longer than `max_model_len`.
    """

    def __init__(
        self,
        executor: Executor,
        num_blocks: int,
        groups: Sequence[CacheGroup],
        max_model_len: int,
        vocab_size: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._executor = executor
        self._clock = clock
        self._num_blocks = num_blocks
        self._groups = groups
        self._various = range(min(VARIOUS, vocab_size))
        self._longest = min(max_model_len, self._fitting(num_blocks))
        self._run_length = executor.gamma + 1

    def warm_up(self, max_tokens: int) -> None:
        """Run passes of one token, of a few requests and of a prompt, and a draft, before the first request.

        No step has more than `max_tokens` tokens.
        """
        if self._longest <= self._run_length:
            return
        for tokens in sorted({min(tokens, max_tokens) for tokens in WARM}):
            self._pass(tokens, 1)()
        if self._executor.block:
            self._draft(1, 1)()

    def measure(self, max_tokens: int, max_requests: int, near: int = 64, far: int = 1024) -> Profile:
        """Time passes up to `max_tokens` tokens and drafts up to `max_requests` requests; takes a few seconds.

        Context costs are the slope between `near` and `far` tokens of context, limited by the pool and the model.
        """
        share = self._fitting(max(1, self._num_blocks // -(-max_tokens // self._run_length)))
        near = max(1, min(near, min(share, self._longest) - self._run_length))
        far = min(far, self._longest - self._run_length)
        recorded, recorded_drafts = self._executor.recorded
        sizes = measured_sizes(max_tokens, recorded)
        requests = measured_sizes(max_requests, recorded_drafts) if self._executor.block else []
        few = min(self._run_length, max_tokens)
        slopes = [(queries, context) for queries in {1, few} for context in (far, near)] if far > near else []
        works = [Work(self._pass(tokens, near)) for tokens in sizes]
        # As when serving: after a target pass, which leaves nothing of the drafter in the processor's caches.
        works += [Work(self._draft(count, near), self._pass(1, near)) for count in requests]
        works += [Work(self._pass(queries, context)) for queries, context in slopes]
        seconds = self._undisturbed(works, ROUNDS, PATIENCE)
        verify, draft = seconds[: len(sizes)], seconds[len(sizes) : len(sizes) + len(requests)]
        times = dict(zip(slopes, seconds[len(works) - len(slopes) :], strict=True))

        def slope(queries: int) -> float:
            """Seconds for one more token of context of a run of `queries` tokens."""
            return max(0.0, times[queries, far] - times[queries, near]) / (far - near) if times else 0.0

        single, several = slope(1), slope(few)
        per_query = max(0.0, several - single) / (few - 1) if few > 1 else 0.0
        per_run = max(0.0, single - per_query)
        bare = [
            max(0.5 * seconds, seconds - near * (per_query * tokens + per_run * -(-tokens // self._run_length)))
            for tokens, seconds in zip(sizes, verify, strict=True)
        ]
        rising = tuple(isotonic(bare).tolist()), tuple(isotonic(draft).tolist())
        return Profile(
            tuple(sizes),
            rising[0],
            tuple(requests),
            rising[1],
            per_run,
            per_query,
            recorded=tuple(recorded),
            recorded_drafts=tuple(recorded_drafts) if requests else (),
        )

    def disagreement(self, kept: Profile) -> tuple[str, float, float] | None:
        """Largest deviation of `kept` from a few passes and a draft timed now; None if within TOLERANCE.

        Gives the name of the pass or draft, its seconds now, and its kept seconds.
        """
        sizes = [tokens for tokens in PROBED if tokens <= kept.tokens[-1]]
        works = [Work(self._pass(tokens, 1)) for tokens in sizes]
        names = [f"a pass of {tokens} tokens" for tokens in sizes]
        expected = np.interp(runs_as(kept.recorded, np.asarray(sizes)), kept.tokens, kept.verify).tolist()
        if kept.requests and self._executor.block:
            works.append(Work(self._draft(1, 1), self._pass(1, 1)))
            names.append("a draft for one request")
            expected.append(kept.draft[0])
        found = zip(names, self._undisturbed(works, TRIALS), expected, strict=True)
        furthest = max(found, key=lambda each: abs(math.log(each[1] / each[2])))
        return furthest if abs(math.log(furthest[1] / furthest[2])) > math.log(TOLERANCE) else None

    def _undisturbed(self, works: Sequence[Work], rounds: int, patience: float = math.inf) -> list[float]:
        """Seconds of each work without disturbance, from its times in several rounds over all works.

        Disturbances only add time, so the lower quartile is taken. Rounds spread the repeats of a work over time, so
        that one disturbance, or a slow first call, cannot affect all of them.
        """
        times: list[list[float]] = [[] for _ in works]
        began = self._clock()
        for number in tqdm(range(rounds), desc="measuring costs", unit="round", leave=False):
            if number >= FEWEST and self._clock() - began > patience:
                break
            for work, own in zip(works, times, strict=True):
                own.append(self._seconds(work))
        return [sorted(own)[(len(own) - 1) // 4] for own in times]

    def _seconds(self, work: Work) -> float:
        work.before()
        began = self._clock()
        work.run()
        return self._clock() - began

    def _pass(self, tokens: int, context: int) -> Callable[[], object]:
        """A target pass as in decoding: runs of an anchor and its drafts, a row of logits for each token."""
        lengths = [self._run_length] * (tokens // self._run_length)
        lengths += [tokens % self._run_length] if tokens % self._run_length else []
        tables = self._tables(len(lengths), context)
        # Different tokens, as in serving: in a mixture of experts, equal ones would all go to the same few experts.
        various = itertools.cycle(self._various)
        runs = [
            Run(list(itertools.islice(various, length)), context, each, length)
            for length, each in zip(lengths, tables, strict=True)
        ]
        # Reading a number waits for the pass on a device that is not done when `verify` returns.
        return lambda: float(self._executor.cycle(runs, CounterStreams(), time.perf_counter).verify(None)[0][-1, -1])

    def _draft(self, requests: int, context: int) -> Callable[[], object]:
        rows = [DraftRequest(0, 1, context, each, self._executor.block) for each in self._tables(requests, context)]
        sampling = SamplingBatch.of(position=[context + 1] * requests, key=list(range(requests)))
        return lambda: self._executor.cycle([], CounterStreams(), time.perf_counter).draft(rows, sampling)

    def _fitting(self, blocks: int) -> int:
        """Tokens of a sequence whose rows, all of them in every group, take `blocks` blocks."""
        return int(blocks / sum(1 / group.block_size for group in self._groups))

    def _tables(self, runs: int, context: int) -> list[list[BlockTable]]:
        """Block tables of runs after `context` tokens. Runs share blocks only if the pool has too few.

        Block contents do not matter.
        """
        blocks = (index % self._num_blocks for index in itertools.count())
        return [tables_for(self._groups, blocks, context, context + self._run_length) for _ in range(runs)]


@torch.inference_mode()
def warm_up(
    executor: Executor,
    num_blocks: int,
    groups: Sequence[CacheGroup],
    max_model_len: int,
    vocab_size: int,
    max_tokens: int,
) -> None:
    """Warm up the serving path on a KV pool not in use yet; no step has more than `max_tokens` tokens."""
    Profiler(executor, num_blocks, groups, max_model_len, vocab_size).warm_up(max_tokens)


@torch.inference_mode()
def profile(
    executor: Executor,
    *,
    num_blocks: int,
    groups: Sequence[CacheGroup],
    max_model_len: int,
    vocab_size: int,
    max_tokens: int,
    max_requests: int,
    directory: Path,
    identity: str,
    again: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> Profile:
    """The kept profile of this machine and `identity` (model, drafter, backend), or a new one, which is then kept.

    A kept profile is first checked by a few passes, and measured again if it is far off.
    """
    name = repr(
        (
            VERSION,
            identity,
            max_model_len,
            max_tokens,
            max_requests,
            executor.gamma,
            executor.recorded,
            _machine(),
        )
    )
    path = directory / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"
    profiler = Profiler(executor, num_blocks, groups, max_model_len, vocab_size, clock)
    if not again and (kept := _kept(path, profiler)):
        return kept
    measured = profiler.measure(max_tokens, max_requests)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        measured.save(partial)
        partial.replace(path)
    except OSError as error:  # a volume of another user, a full disk: the next start only measures again
        logger.warning("what steps cost could not be kept (%s): it is measured again at the next start", error)
    return measured


def _kept(path: Path, profiler: Profiler) -> Profile | None:
    """The profile at `path`; None if it is missing or damaged, or disagrees with the seconds measured now."""
    if not path.exists():
        return None
    try:
        kept = Profile.load(path)
    except ConfigError:
        return None
    found = profiler.disagreement(kept)
    if found is None:
        return kept
    what, now, then = found
    logger.warning(
        "the kept cost profile is off by a factor of %.1f: %s takes %.4g ms, not %.4g ms as measured; measuring again",
        max(now / then, then / now),
        what,
        1e3 * now,
        1e3 * then,
    )
    return None


def _machine() -> str:
    """Description of what timings depend on: processor model and torch version."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = sorted({line for line in lines if line.startswith(("model name", "CPU part"))})
    return f"{models} {torch.__version__}"


def measured_sizes(most: int, recorded: Sequence[int] = ()) -> list[int]:
    """`recorded` sizes and the first past them, then those of 1, 2, 3, 4, 6, 8, 12, ... that are larger; and `most`."""
    steps = {1 << power for power in range(most.bit_length())} | {3 << power for power in range(most.bit_length())}
    largest = max(recorded, default=0)
    own = {size for size in steps if size > largest} | {*recorded} | ({largest + 1} if recorded else set())
    return sorted({size for size in own if size < most} | {most})
