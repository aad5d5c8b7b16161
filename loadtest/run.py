#!/usr/bin/env python3
"""Load test of any OpenAI-style server with /v1/completions, or a comparison of dspark-server's selection policies.

examples:
  a running server, closed loop at 1, 4, 16 users, made-up prompts:
    python loadtest/run.py --url http://127.0.0.1:8000 --concurrency 1,4,16

  Poisson arrivals at 1, 2 and 4 requests a second for a minute each; goodput under a service level in seconds:
    python loadtest/run.py --url http://127.0.0.1:8000 --rate 1,2,4 --duration 60 --slo ttft=1,tpot=0.1

  two servers beside each other, in turn, with real prompts in the model's chat template:
    python loadtest/run.py --url ours=http://127.0.0.1:8000 --url vllm=http://127.0.0.1:8001 \\
        --prompts math.jsonl code.jsonl chat.jsonl --tokenizer MODEL_DIR --concurrency 1,8,32 --rounds 3

  selection policies, each in a server started and stopped here (A B C D, then again), ten seconds of steady load each:
    python loadtest/run.py --compare none,fixed,causal,lagged --concurrency 1,2,4,8,16,32 --rounds 3 --steady 10 \\
        --speculative-config '{"method": "dspark", "model": "DRAFTER_DIR"}' --serve-args '--max-num-seqs 32'

Writes results.json (vllm bench serve's names), results.csv and two plots into --out. What the figures mean:
docs/loadtest.md. Exit status: 0; 1 if anything stopped the test or a level completed no request; 2 for bad options.
"""

import argparse
import asyncio
import os
import platform
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

sys.path.append(str(Path(__file__).resolve().parent.parent))  # for `python loadtest/run.py`

from loadtest.client import LoadTestError, Outcome, RequestOptions, closed_loop, connect, open_loop, steady_load
from loadtest.counters import scrape
from loadtest.options import build_parser, check
from loadtest.report import Level, Report, Result, Slo, detailed, summarize
from loadtest.servers import Server, speculative_config
from loadtest.workload import Prompts, chat_template, poisson_arrivals

DEFAULT_MODEL = "SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Target:
    """A measured server: a name for the report, a base URL, the model to ask for, the process if started here."""

    name: str
    url: str
    model: str = ""
    server: Server | None = None


@dataclass(frozen=True)
class Plan:
    """Settings of each run. `requests` None: four per user, at least 16; for Poisson arrivals `duration` seconds.

    With `steady` a closed loop is measured over a window of that many seconds instead.
    """

    levels: Sequence[Level]
    rounds: int = 1
    requests: int | None = None
    duration: float | None = None
    steady: float | None = None
    warmup: int = 2
    max_in_flight: int | None = None
    seed: int = 0
    slo: Slo | None = None
    save_detailed: bool = False

    def requests_of(self, level: Level) -> int | None:
        """Number of requests that a run sends; None if time decides."""
        if self.requests is not None or self.duration is not None or self.steady is not None:
            return self.requests
        return max(16, 4 * level.concurrency) if level.concurrency is not None else None


async def measure(
    target: Target,
    level: Level,
    round_number: int,
    plan: Plan,
    options: RequestOptions,
    prompts: Callable[[int], str],
    first: int = 0,
    report: Callable[[Outcome], None] = lambda _: None,
) -> tuple[Result, int]:
    """One run: warm up, read the counters, load, read them again. Its result, and the index after its last prompt.

    Prompts are taken from index `first` on; the same arguments give the same prompts at the same intended times.
    """
    options = replace(options, model=target.model or options.model)
    async with connect(target.url, options.api_key) as client:
        if plan.warmup:
            users = min(plan.warmup, level.concurrency or plan.warmup)
            await closed_loop(client, options, prompts, users=users, first=first, requests=plan.warmup)
        first += plan.warmup
        if plan.steady is not None:
            return await _measure_steady(client, level.concurrency or 1, plan, options, prompts, first, report)
        requests = plan.requests_of(level)
        before = await scrape(client)
        cpu, start = time.process_time(), time.perf_counter()
        if level.rate is not None:
            duration = plan.duration or 60.0 if requests is None else None
            seed = f"{plan.seed}/{round_number}"
            arrivals = poisson_arrivals(level.rate, seed, requests=requests, duration=duration)
            outcomes = await open_loop(
                client,
                options,
                prompts,
                arrivals=arrivals,
                first=first,
                max_in_flight=plan.max_in_flight,
                report=report,
            )
        else:
            outcomes = await closed_loop(
                client,
                options,
                prompts,
                users=level.concurrency or 1,
                first=first,
                requests=requests,
                duration=plan.duration,
                report=report,
            )
        elapsed = time.perf_counter() - start
        cpu = time.process_time() - cpu
        counters = (await scrape(client)).since(before)
    result: Result = {"model_id": options.model, "client_cpu": cpu / elapsed}
    result |= summarize(outcomes, elapsed, plan.slo) | counters.figures()
    if plan.save_detailed:
        result |= detailed(outcomes)
    return result, first + len(outcomes)


async def _measure_steady(
    client: httpx.AsyncClient,
    users: int,
    plan: Plan,
    options: RequestOptions,
    prompts: Callable[[int], str],
    first: int,
    report: Callable[[Outcome], None],
) -> tuple[Result, int]:
    """A window of `plan.steady` seconds of a steady load. Latencies are those of requests that ended within it."""
    async with steady_load(client, options, prompts, users=users, first=first, report=report) as load:
        before = await scrape(client)
        ended = len(load.outcomes)
        cpu, start = time.process_time(), time.perf_counter()
        await asyncio.sleep(plan.steady or 0.0)
        end = time.perf_counter()
        cpu = time.process_time() - cpu
        within = load.outcomes[ended:]
        counters = (await scrape(client)).since(before)
    tokens = load.tokens_between(start, end)
    result: Result = {"model_id": options.model, "client_cpu": cpu / (end - start)}
    result |= summarize(within, end - start, plan.slo, output_tokens=tokens) | counters.figures()
    if plan.save_detailed:
        result |= detailed(within)
    return result, first + load.sent


async def run(
    targets: Sequence[Target],
    plan: Plan,
    options: RequestOptions,
    prompts: Prompts,
    report: Report,
    out: Path,
    console: Console,
) -> None:
    """All runs: in each round, at each level, the targets in turn with the same prompts. Saves after every run.

    Raises LoadTestError when a server that was started here has ended.
    """
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    first = 0
    repeated = False
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        overall = progress.add_task("runs", total=plan.rounds * len(plan.levels) * len(targets))
        for round_number, level in product(range(1, plan.rounds + 1), plan.levels):
            after = first
            for target in targets:
                title = f"{target.name}, {level}, round {round_number} of {plan.rounds}"
                task = progress.add_task(title, total=plan.requests_of(level))
                result, last = await measure(
                    target, level, round_number, plan, options, prompts, first, report=partial(_advance, progress, task)
                )
                progress.remove_task(task)
                progress.advance(overall)
                result = report.add(target.name, level, round_number, result)
                report.save(out)
                progress.console.print(f"{title}: {_line(result)}", markup=False, highlight=False, soft_wrap=True)
                if target.server is not None:
                    target.server.check(f"during {title}")
                after = max(after, last)
            first = after
            if not repeated and prompts.distinct is not None and first > prompts.distinct:
                repeated = True
                progress.console.print(
                    f"note: the {prompts.distinct} prompts are used up and repeat; a prefix cache will know them",
                    style="yellow",
                )


def _advance(progress: Progress, task: TaskID, _: Outcome) -> None:
    progress.advance(task)


def _line(result: Result) -> str:
    parts = [f"{result['output_throughput']:.1f} tok/s"]
    if result["mean_user_throughput"] is not None:
        parts.append(f"{result['mean_user_throughput']:.1f} per user")
    if result.get("verification_budget") is not None:
        parts.append(f"budget {result['verification_budget']:.2f}")
    parts.append(f"{result['completed']} completed")
    parts += [f"{number} x {name}" for name, number in result["errors_by_class"].items()]
    return ", ".join(parts)


async def find_model(target: Target, api_key: str | None) -> str:
    """The name of the first model the server lists. Raises LoadTestError if it does not answer or list any."""
    async with connect(target.url, api_key) as client:
        try:
            response = await client.get("/v1/models", timeout=30.0)
            response.raise_for_status()
            return str(response.json()["data"][0]["id"])
        except httpx.HTTPError as error:
            raise LoadTestError(f"{target.name}: no model list from {target.url}: {error or repr(error)}") from None
        except (ValueError, LookupError, TypeError):
            raise LoadTestError(f"{target.name}: {target.url}/v1/models lists no model; give --model.") from None


async def start_servers(arguments: argparse.Namespace, stack: ExitStack, console: Console) -> list[Target]:
    """A ready server for every policy of --compare, started one after the other; `stack` stops them."""
    targets = []

    def stop(server: Server) -> None:
        if trouble := server.stop():
            console.print(trouble, markup=False, style="yellow")

    for policy in arguments.compare:
        command = [*arguments.serve_command, "serve", arguments.model or DEFAULT_MODEL, *arguments.serve_args]
        command += ["--speculative-config", speculative_config(policy, arguments.speculative_config)]
        server = Server(policy, command, arguments.out / "logs" / f"{policy}.log")
        stack.callback(stop, server)
        with console.status(f"starting {policy} ({server.url}, log {server.log})"):
            begin = time.monotonic()
            await server.ready(arguments.start_timeout)
        console.print(f"{policy} is ready after {time.monotonic() - begin:.1f} s", highlight=False)
        targets.append(Target(policy, server.url, server=server))
    return targets


async def load_test(arguments: argparse.Namespace, console: Console) -> Report:
    """Run all that the command line asks for, without the final printing. Results are saved even after an error."""
    template = chat_template(arguments.tokenizer) if arguments.tokenizer else None
    prompts = Prompts(None, seed=arguments.seed, words=arguments.prompt_words)
    if arguments.prompts:
        prompts = Prompts.read(arguments.prompts, seed=arguments.seed, template=template)
    levels = [Level(concurrency=users) for users in arguments.concurrency or ()]
    levels += [Level(rate=rate) for rate in arguments.rate or ()]
    plan = Plan(
        levels=levels,
        rounds=arguments.rounds,
        requests=arguments.requests_per_level,
        duration=arguments.duration,
        steady=arguments.steady,
        warmup=arguments.warmup,
        max_in_flight=arguments.max_in_flight,
        seed=arguments.seed,
        slo=arguments.slo,
        save_detailed=arguments.save_detailed,
    )
    options = RequestOptions(
        model=arguments.model or "",
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        ignore_eos=arguments.ignore_eos,
        timeout=arguments.timeout,
        api_key=arguments.api_key or os.environ.get("OPENAI_API_KEY"),
        request_seed=arguments.seed if arguments.request_seeds else None,
        extra_body=arguments.extra_body,
    )
    hidden = ("api_key", "url")
    settings = {name: _plain(value) for name, value in vars(arguments).items() if name not in hidden}
    settings |= {"machine": platform.machine(), "cpus": os.cpu_count(), "python": platform.python_version()}
    report = Report(settings)
    with ExitStack() as stack:
        if arguments.compare:
            targets = await start_servers(arguments, stack, console)
        else:
            targets = [Target(name, url) for name, url in arguments.url]
        asked = arguments.model if arguments.url else None
        targets = [replace(t, model=asked or await find_model(t, options.api_key)) for t in targets]
        try:
            await run(targets, plan, options, prompts, report, arguments.out, console)
        finally:
            if report.runs:
                report.save(arguments.out)
                _plot(report, arguments.out, console)
    return report


def _plot(report: Report, directory: Path, console: Console) -> None:
    """Draw the plots, where there is matplotlib."""
    try:
        from loadtest.plots import plot
    except ImportError:
        console.print("no plots: they need matplotlib (pip install 'dspark-server[plots]')", markup=False)
        return
    plot(report.medians(), directory)


def _event_loop() -> Callable[[Coroutine[Any, Any, Report]], Report]:
    """The runner of a coroutine: uvloop if installed, which takes less of a processor that the server shares."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run
    return uvloop.run


def _plain(value: object) -> object:
    """The value as JSON can hold it."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | dict | None) else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = build_parser(__doc__ or "")
    arguments = parser.parse_args(argv)
    check(parser, arguments)
    console = Console(stderr=True)
    try:
        report = _event_loop()(load_test(arguments, console))
    except LoadTestError as error:
        console.print(f"loadtest: {error}", markup=False, highlight=False, style="red", soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print(f"interrupted; what was measured is in {arguments.out}")
        return 130
    report.show(Console() if sys.stdout.isatty() else Console(width=120))
    print(f"results are in {arguments.out}: {', '.join(sorted(path.name for path in arguments.out.iterdir()))}")
    return 0 if all(run["completed"] for run in report.runs) else 1


if __name__ == "__main__":
    sys.exit(main())
