"""/metrics: vLLM's series names over plain numbers.

The step thread and the response path only add to plain Python counters; prometheus_client is used by scrapes only.
"""

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from dspark_server.engine.engine import AsyncEngine
from dspark_server.engine.stats import EngineStats

FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
INTER_TOKEN_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
LENGTH_BUCKETS = tuple(float(m * 10**e) for e in range(5) for m in (1, 2, 5))
ITERATION_BUCKETS = tuple(float(2**power) for power in range(0, 15))
BUDGET_BUCKETS = 16
LABELS = ("model_name", "engine")


class Histogram:
    """Counts per bucket and a sum; `observe` costs a bisection."""

    def __init__(self, name: str, documentation: str, bounds: Sequence[float]) -> None:
        self.name = name
        self.documentation = documentation
        self._bounds = list(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def drain(self, values: deque[float] | deque[int]) -> None:
        """Count the values that another thread appends, and remove them."""
        for _ in range(len(values)):
            self.observe(values.popleft())

    def family(self, labels: Sequence[str]) -> HistogramMetricFamily:
        """Return prometheus_client's form: cumulative buckets."""
        total, buckets = 0, []
        for bound, count in zip([*map(str, self._bounds), "+Inf"], self._counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        family = HistogramMetricFamily(self.name, self.documentation, labels=LABELS)
        family.add_metric(labels, buckets, self._sum)
        return family


class Metrics(Collector):
    """All series of `/metrics`. It has its own registry, so two servers in one process do not conflict."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._success: Counter[str] = Counter()
        self.time_to_first_token = Histogram(
            "vllm:time_to_first_token_seconds", "Time to first token in seconds.", FIRST_TOKEN_BUCKETS
        )
        self.inter_token_latency = Histogram(
            "vllm:inter_token_latency_seconds", "Time between two chunks of one choice in seconds.", INTER_TOKEN_BUCKETS
        )
        self.prefill_time = Histogram(
            "vllm:request_prefill_time_seconds", "From admission to the first token in seconds.", REQUEST_BUCKETS
        )
        self._decode = Histogram(
            "vllm:request_decode_time_seconds", "From the first token to the last in seconds.", REQUEST_BUCKETS
        )
        self._per_token = Histogram(
            "vllm:request_time_per_output_token_seconds",
            "Decode time by token after the first in seconds, one value for each choice.",
            INTER_TOKEN_BUCKETS,
        )
        self._e2e = Histogram(
            "vllm:e2e_request_latency_seconds", "From arrival to the last token in seconds.", REQUEST_BUCKETS
        )
        self._prompt = Histogram("vllm:request_prompt_tokens", "Prompt tokens of a choice.", LENGTH_BUCKETS)
        self._generated = Histogram("vllm:request_generation_tokens", "Tokens generated for a choice.", LENGTH_BUCKETS)
        self._queue = Histogram("vllm:request_queue_time_seconds", "Time waiting to be admitted.", REQUEST_BUCKETS)
        self._iteration = Histogram("vllm:iteration_tokens_total", "Tokens computed in a step.", ITERATION_BUCKETS)
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def finished(
        self, reason: str, seconds: float, *, prompt: int, generated: int, decode: float | None = None
    ) -> None:
        """Count an ended choice, whatever its finish reason; `decode` is its decode time if it got a token."""
        self._success[reason] += 1
        self._e2e.observe(seconds)
        self._prompt.observe(prompt)
        self._generated.observe(generated)
        if decode is not None:
            self._decode.observe(decode)
            if generated > 1:
                self._per_token.observe(decode / (generated - 1))

    def render(self) -> bytes:
        """Return the Prometheus text format."""
        return generate_latest(self._registry)

    def describe(self) -> Iterable[Metric]:
        """Return nothing: names are known at scrape time only."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Return all series; prometheus_client calls it at each scrape."""
        labels = (self._engine.model_name, "0")
        stats = self._engine.stats
        yield _gauge("num_requests_running", "Requests in the batch.", labels, stats.running)
        yield _gauge("num_requests_waiting", "Requests waiting to be admitted.", labels, stats.waiting)
        yield _gauge("kv_cache_usage_perc", "KV blocks in use; 1 is all of them.", labels, stats.kv_usage)
        info = self._engine.cache_info
        cache = GaugeMetricFamily(
            "vllm:cache_config_info", "What the KV cache is, in its labels; always 1.", labels=(*LABELS, *info)
        )
        cache.add_metric((*labels, *info.values()), 1)
        yield cache
        for name, documentation, value in (
            ("prompt_tokens", "Prompt tokens, those found in the prefix cache included.", stats.prompt_tokens),
            ("generation_tokens", "Tokens generated.", stats.generation_tokens),
            ("num_preemptions", "Requests preempted.", stats.preemptions),
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefix_queries),
            ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.prefix_hits),
            ("spec_decode_num_drafts", "Blocks drafted.", stats.drafts),
            ("spec_decode_num_draft_tokens", "Tokens drafted.", stats.draft_tokens),
            ("spec_decode_num_accepted_tokens", "Draft tokens accepted.", stats.accepted_tokens),
        ):
            counter = CounterMetricFamily("vllm:" + name, documentation, labels=LABELS)
            counter.add_metric(labels, value)
            yield counter
        yield self._per_position(labels, list(stats.accepted_per_position))
        yield from speculation_families(labels, stats)
        yield self._finished_family(labels)
        self._queue.drain(stats.queue_times)
        self._iteration.drain(stats.iteration_tokens)
        for histogram in (
            *(self.time_to_first_token, self.inter_token_latency, self._per_token),
            *(self._e2e, self._queue, self.prefill_time, self._decode),
            *(self._prompt, self._generated, self._iteration),
        ):
            yield histogram.family(labels)

    def _per_position(self, labels: Sequence[str], accepted: list[int]) -> Metric:
        name = "vllm:spec_decode_num_accepted_tokens_per_pos"
        family = CounterMetricFamily(name, "Draft tokens accepted, by position.", labels=(*LABELS, "position"))
        for position, count in enumerate(accepted):
            family.add_metric((*labels, str(position)), count)
        return family

    def _finished_family(self, labels: Sequence[str]) -> Metric:
        family = CounterMetricFamily(
            "vllm:request_success", "Choices that ended, by reason.", labels=(*LABELS, "finished_reason")
        )
        for reason in ("stop", "length", "abort", "error"):
            family.add_metric((*labels, reason), self._success[reason])
        return family


def speculation_families(labels: Sequence[str], stats: EngineStats) -> Iterator[Metric]:
    """Our own series: DSpark's decisions, and the quality of the estimates behind them."""

    def counters(name: str, documentation: str, label: str, values: Iterable[tuple[str, float]]) -> Metric:
        family = CounterMetricFamily("dspark:" + name, documentation, labels=(*LABELS, label))
        for value, count in values:
            family.add_metric((*labels, value), count)
        return family

    kinds = ("drafted", "copied", "skipped")
    yield counters(
        "draft_decisions",
        "Requests that could draft, each step: by the drafter, copied from their context, or left out.",
        "decision",
        [(kind, stats.drafting[kind]) for kind in kinds],
    )
    budgets, total, buckets = dict(stats.budgets), 0, []
    for tokens in range(1, BUDGET_BUCKETS + 1):
        total += budgets.get(tokens, 0)
        buckets.append((str(float(tokens)), float(total)))
    budget = HistogramMetricFamily(
        "dspark:verification_budget", "Tokens verified for a decoding request in a step, 1 + l.", labels=LABELS
    )
    buckets.append(("+Inf", float(sum(budgets.values()))))
    budget.add_metric(labels, buckets, float(sum(t * n for t, n in budgets.items())))
    yield budget
    bins = [(f"{(index + 0.5) / len(stats.survival):.2f}", each) for index, each in enumerate(stats.survival)]
    for name, documentation in (
        ("judged", "Draft tokens verified, by the middle of the tenth their predicted survival fell in."),
        ("predicted", "Sum of the predicted survivals."),
        ("survived", "Draft tokens that survived."),
    ):
        values = [(middle, float(getattr(each, name))) for middle, each in bins]
        yield counters("survival_" + name, documentation, "predicted", values)
    for name, documentation, counts in (
        (
            "context_judged",
            "The drafter's tokens verified, by the context's length, rounded up.",
            stats.judged_by_context,
        ),
        ("context_accepted", "The drafter's tokens accepted, likewise.", stats.accepted_by_context),
    ):
        yield counters(name, documentation, "context", [(str(upto), n) for upto, n in sorted(dict(counts).items())])
    yield counters(
        "step_seconds",
        "Time of steps: draft with how much of it is verified, verify, host with who drafts.",
        "part",
        list(stats.seconds.items()),
    )
    gain = GaugeMetricFamily(
        "dspark:speedup_estimate",
        "Estimate of throughput with drafts over throughput without, of the last 20 seconds of steps.",
        labels=LABELS,
    )
    if stats.gain.ratio is not None:
        gain.add_metric(labels, stats.gain.ratio)
    yield gain
    costs = GaugeMetricFamily(
        "dspark:verify_seconds", "What selection believes a pass over so many tokens takes.", labels=(*LABELS, "tokens")
    )
    for tokens, seconds in stats.verify_seconds.items():
        costs.add_metric((*labels, str(tokens)), seconds)
    yield costs
    for name, documentation, value in (
        (
            "step_slowdown",
            "Seconds that steps lately took, by those of the cost profile of the start.",
            stats.step_slowdown,
        ),
        (
            "calibration_ratio",
            "Draft tokens that survived for each that calibration predicted, of the last thousands.",
            stats.trust.ratio,
        ),
        (
            "calibration_low",
            "1 while far fewer draft tokens survive than calibration predicts.",
            stats.trust.low,
        ),
        (
            "slow_steps",
            "1 while steps have taken 5 times what the cost profile says for some seconds.",
            stats.slow_steps,
        ),
    ):
        yield _gauge(name, documentation, labels, float(value), "dspark:")


def _gauge(
    name: str, documentation: str, labels: Sequence[str], value: float, prefix: str = "vllm:"
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(prefix + name, documentation, labels=LABELS)
    family.add_metric(labels, value)
    return family
