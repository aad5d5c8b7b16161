"""Measures what drafts and target passes cost here, on the path that serves: the table behind selection (SPS(B)).

Kept in the user's cache for each machine, model, drafter and version, so that only the first start pays for it.
"""

import hashlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

from dspark_server.engine.executor import DraftRequest, Executor
from dspark_server.errors import ConfigError
from dspark_server.runtime.batch import Run
from dspark_server.speculation.capacity import Profile
from dspark_server.speculation.noise import CounterStreams
from dspark_server.speculation.sampling import SamplingBatch

logger = logging.getLogger(__name__)

VERSION = 3  # of what is measured; another one makes every kept profile stale
REPEATS = 5
WARM = (1, 16, 256)  # tokens of the passes that are run before the first request
PATIENCE = 0.5  # seconds for the repeats of one size, the first two excepted


class Profiler:
    """Times an executor on a KV pool that nobody uses yet: `num_blocks` blocks of `block_size` tokens.

    No sequence is longer than `max_model_len`.
    """

    def __init__(self, executor: Executor, num_blocks: int, block_size: int, max_model_len: int) -> None:
        self._executor = executor
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._longest = min(max_model_len, num_blocks * block_size)
        self._run_length = executor.gamma + 1

    def warm_up(self) -> None:
        """Passes of one token, of a few requests and of a prompt, and a draft: nothing is cold for the first one."""
        if self._longest <= self._run_length:
            return
        for tokens in WARM:
            self._pass(tokens, 1)()
        if self._executor.block:
            self._draft(1, 1)()

    def measure(self, max_tokens: int, max_requests: int, near: int = 64, far: int = 1024) -> Profile:
        """Time passes up to `max_tokens` tokens and drafts up to `max_requests` requests; a few seconds.

        Context costs are the slope between `near` and `far` tokens of it, as far as the pool and the model reach.
        """
        share = max(1, self._num_blocks // -(-max_tokens // self._run_length)) * self._block_size
        near = max(1, min(near, min(share, self._longest) - self._run_length))
        far = min(far, self._longest - self._run_length)
        sizes = _sizes(max_tokens)
        requests = _sizes(max_requests) if self._executor.block else []
        with tqdm(total=len(sizes) + len(requests) + 4, desc="measuring costs", unit="size", leave=False) as bar:

            def timed(work: Callable[[], object], before: Callable[[], object] | None = None) -> float:
                bar.update()
                return _median_seconds(work, before)

            def slope(queries: int) -> float:
                """Seconds for one more token of context of a run of so many query tokens."""
                if far <= near:
                    return 0.0
                return max(0.0, timed(self._pass(queries, far)) - timed(self._pass(queries, near))) / (far - near)

            verify = [timed(self._pass(tokens, near)) for tokens in sizes]
            # As in service after a target pass, which leaves nothing of the drafter in the caches.
            draft = [timed(self._draft(count, near), self._pass(1, near)) for count in requests]
            few = min(self._run_length, max_tokens)
            single, several = slope(1), slope(few)
        per_query = max(0.0, several - single) / (few - 1) if few > 1 else 0.0
        per_run = max(0.0, single - per_query)
        bare = [
            max(0.5 * seconds, seconds - near * (per_query * tokens + per_run * -(-tokens // self._run_length)))
            for tokens, seconds in zip(sizes, verify, strict=True)
        ]
        return Profile(tuple(sizes), _rising(bare), tuple(requests), _rising(draft), per_run, per_query)

    def _pass(self, tokens: int, context: int) -> Callable[[], object]:
        """A target pass as decoding makes them: runs of an anchor and its drafts, a row of logits for each token."""
        lengths = [self._run_length] * (tokens // self._run_length)
        lengths += [tokens % self._run_length] if tokens % self._run_length else []
        tables = self._tables(len(lengths), context + self._run_length)
        runs = [Run([1] * length, context, table, length) for length, table in zip(lengths, tables, strict=True)]
        # Reading a number waits for the pass, where a device works on after `verify` has returned.
        return lambda: float(self._executor.verify(runs)[0][-1, -1])

    def _draft(self, requests: int, context: int) -> Callable[[], object]:
        tables = self._tables(requests, context + self._run_length)
        rows = [DraftRequest(1, context, table) for table in tables]
        sampling = SamplingBatch.of(position=[context + 1] * requests, key=list(range(requests)))
        streams = CounterStreams()
        return lambda: self._executor.draft(rows, sampling, streams)

    def _tables(self, runs: int, length: int) -> list[list[int]]:
        """Blocks of their own for each run, as long as there are any: what they hold does not matter."""
        each = -(-length // self._block_size)
        return [[(run * each + index) % self._num_blocks for index in range(each)] for run in range(runs)]


@torch.inference_mode()
def warm_up(executor: Executor, num_blocks: int, block_size: int, max_model_len: int) -> None:
    """Run what serving will, on a KV pool that nobody uses yet."""
    Profiler(executor, num_blocks, block_size, max_model_len).warm_up()


@torch.inference_mode()
def profile(
    executor: Executor,
    *,
    num_blocks: int,
    block_size: int,
    max_model_len: int,
    max_tokens: int,
    max_requests: int,
    directory: Path,
    identity: str,
    again: bool = False,
) -> Profile:
    """The kept profile of this machine and `identity` (model, drafter, backend), or a new one, which is then kept."""
    name = repr(
        (
            VERSION,
            identity,
            max_model_len,
            max_tokens,
            max_requests,
            executor.gamma,
            torch.get_num_threads(),
            _machine(),
        )
    )
    path = directory / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"
    if path.exists() and not again:
        try:
            return Profile.load(path)
        except ConfigError:
            pass  # damaged: measure anew
    measured = Profiler(executor, num_blocks, block_size, max_model_len).measure(max_tokens, max_requests)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        measured.save(partial)
        partial.replace(path)
    except OSError as error:  # a volume of another user, a full disk: measuring again next time is all it costs
        logger.warning("what steps cost could not be kept (%s): it is measured again at the next start", error)
    return measured


def _machine() -> str:
    """What timings depend on: processor, torch."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = sorted({line for line in lines if line.startswith(("model name", "CPU part"))})
    return f"{models} {torch.__version__}"


def _sizes(most: int) -> list[int]:
    """1, 2, 4, ... with the halves between, up to and with `most`."""
    steps = {1 << power for power in range(most.bit_length())} | {3 << power for power in range(most.bit_length())}
    return sorted({size for size in steps if size < most} | {most})


def _median_seconds(work: Callable[[], object], before: Callable[[], object] | None) -> float:
    """After one warm-up call, and each time after a call of `before`; fewer repeats where they are slow."""
    work()
    seconds: list[float] = []
    while len(seconds) < REPEATS and (len(seconds) < 2 or sum(seconds) < PATIENCE):
        if before:
            before()
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return median(seconds)


def _rising(values: list[float]) -> tuple[float, ...]:
    """More work never costs less: what was measured so is noise."""
    best = 0.0
    return tuple(best := max(best, value) for value in values)
