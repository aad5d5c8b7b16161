"""The `dspark-server` command: serve, pull, profile, conformance, data, train, calibrate, eval."""

import logging
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from dspark_server import __version__
from dspark_server.errors import ConfigError, DSparkServerError

app = typer.Typer(
    name="dspark-server",
    help="Lossless speculative inference server (DSpark): drafts in blocks, verifies what is likely to survive.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

SPECULATIVE_HELP = (
    'JSON. {"method": "none"} switches drafting off; {"method": "dspark", "model": "DRAFTER_DIR"} names a drafter; '
    '"selection" is causal (default), lagged, fixed, threshold or none. SmolLM2-135M-Instruct comes with a drafter.'
)
MODEL_HELP = "A model directory, a Hugging Face id, or SmolLM2-135M-Instruct (embedded default)."


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Errors raised on purpose end the command with their message and status 1, without a traceback."""
    try:
        yield
    except DSparkServerError as error:
        typer.echo(f"dspark-server: {error}", err=True)
        raise typer.Exit(1) from None


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit()


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)] = "SmolLM2-135M-Instruct",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 picks a free one.")] = 8000,
    served_model_name: Annotated[str | None, typer.Option(help="Name clients use; default: MODEL.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16 or float32.")] = "auto",
    max_model_len: Annotated[int | None, typer.Option(help="Longest sequence, in tokens.")] = None,
    block_size: Annotated[int, typer.Option(help="Tokens per KV block.")] = 16,
    kv_cache_memory_bytes: Annotated[int, typer.Option(help="Size of the KV pool, in bytes.")] = 2 << 30,
    max_num_seqs: Annotated[int, typer.Option(help="Requests running together.")] = 64,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Tokens of one step.")] = 256,
    max_num_queued_reqs: Annotated[int, typer.Option(help="Requests that may wait; beyond, clients get 503.")] = 1024,
    enable_prefix_caching: Annotated[bool, typer.Option(help="Reuse KV blocks of common prefixes.")] = True,
    seed: Annotated[int | None, typer.Option(help="Seed of private noise, for repeatable experiments.")] = None,
    speculative_config: Annotated[str, typer.Option(help=SPECULATIVE_HELP)] = "{}",
    measure_costs_again: Annotated[
        bool, typer.Option("--measure-costs-again", help="Time drafts and target passes anew at this start.")
    ] = False,
    shutdown_timeout: Annotated[float, typer.Option(help="Seconds running requests get after SIGTERM.")] = 30.0,
) -> None:
    """Serve MODEL over HTTP.

    Example: dspark-server serve SmolLM2-135M-Instruct --port 8000
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    with _clear_errors():
        # Imported here: torch takes seconds, and --help should not.
        from dspark_server.api import ServerSettings
        from dspark_server.api.server import run
        from dspark_server.config import EngineConfig, SpeculativeConfig
        from dspark_server.engine.core import EngineCore, load_tokenizer
        from dspark_server.engine.engine import AsyncEngine
        from dspark_server.models.hub import resolve_model

        config = EngineConfig(
            model=model,
            served_model_name=served_model_name,
            dtype=dtype,
            max_model_len=max_model_len,
            block_size=block_size,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_queued_reqs=max_num_queued_reqs,
            enable_prefix_caching=enable_prefix_caching,
            seed=seed,
            measure_costs_again=measure_costs_again,
            speculative=SpeculativeConfig.parse(speculative_config),
        )
        settings = ServerSettings(host=host, port=port, shutdown_timeout=shutdown_timeout)
        # libgomp keeps a pool of workers per calling thread, and stops spinning between parallel regions once all
        # pools together have more threads than there are cores. The loading thread's pool ends with it, so that the
        # step thread's is the only one.
        with ThreadPoolExecutor(1) as loader:
            core = loader.submit(EngineCore.load, config).result()
        engine = AsyncEngine(core, load_tokenizer(resolve_model(model)))
        log = logging.getLogger("dspark_server")
        log.info("%s ready: %s; %s", core.model_name, core.backend, core.speculation)
        run(engine, settings)


@app.command()
def pull(model: Annotated[str, typer.Argument(help=MODEL_HELP)] = "SmolLM2-135M-Instruct") -> None:
    """Fetch or convert MODEL into the cache and print its directory.

    Example: dspark-server pull
    """
    with _clear_errors():
        from dspark_server.models.hub import resolve_model

        typer.echo(resolve_model(model))


@app.command(name="profile")
def show_profile(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)] = "SmolLM2-135M-Instruct",
    max_num_seqs: Annotated[int, typer.Option(help="Requests running together.")] = 64,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Tokens of one step.")] = 256,
    speculative_config: Annotated[str, typer.Option(help=SPECULATIVE_HELP)] = "{}",
    again: Annotated[bool, typer.Option("--again", help="Measure, even if this machine has a kept profile.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write the curve as a PNG.")] = None,
) -> None:
    """Print what target passes and drafts cost on this machine: the SPS(B) curve that selection goes by.

    Example: dspark-server profile --again --plot sps.png
    """
    with _clear_errors():
        from rich.console import Console

        from dspark_server.config import EngineConfig, SpeculativeConfig
        from dspark_server.engine.core import EngineCore
        from dspark_server.evaluation.plots import plot_costs, show_costs

        config = EngineConfig(
            model=model,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            measure_costs_again=again,
            speculative=SpeculativeConfig.parse(speculative_config),
        )
        core = EngineCore.load(config)
        if core.loop.capacity is None:
            raise ConfigError("nothing here goes by costs: that needs a drafter and selection causal or lagged.")
        show_costs(core.loop.capacity, Console())
        if plot is not None:
            plot_costs(core.loop.capacity, plot)


@app.command()
def conformance(
    directory: Annotated[Path, typer.Argument(help="Folder with target/, draft/ and expected.safetensors.")],
) -> None:
    """Replay reference outputs of a target and drafter pair through the engine; exit 1 if any is out of bounds.

    Example: dspark-server conformance fixtures/dspark_qwen3_vanilla
    """
    with _clear_errors():
        from dspark_server.conformance import TOLERANCE, replay

        report = replay(directory, progress=lambda line: typer.echo(line, err=True))
        for kind, error in report.largest.items():
            typer.echo(f"{kind:20} largest error {error:.2e}  {'ok' if error <= TOLERANCE else 'OUT OF BOUNDS'}")
        for mismatch in report.mismatches:
            typer.echo(f"differs: {mismatch}")
        typer.echo(f"{report.rounds} rounds: {'passed' if report.passed else 'FAILED'}")
        if not report.passed:
            raise typer.Exit(1)


@app.command()
def data(
    output: Annotated[Path, typer.Argument(help="The corpus to write (.npz).")],
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "SmolLM2-135M-Instruct",
    prompts: Annotated[list[Path] | None, typer.Option(help='JSON lines with "prompt" and "domain".')] = None,
    samples: Annotated[int, typer.Option(help="Answers per prompt.")] = 1,
    starters: Annotated[
        list[Path] | None, typer.Option(help='JSON lines with "starter" (a turn\'s first words) and "domain".')
    ] = None,
    starters_count: Annotated[int, typer.Option(help="Turns the target completes per starter.")] = 1,
    self_count: Annotated[int, typer.Option("--self", help="Turns the target writes from the bare template.")] = 0,
    exclude: Annotated[list[Path] | None, typer.Option(help="Prompt files whose prompts must not occur.")] = None,
    temperatures: Annotated[str, typer.Option(help="Of the answers, drawn per answer.")] = "1,0.7,0",
    temperature_weights: Annotated[
        str | None, typer.Option(help="How often each, such as 3,1,1; default: evenly.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 384,
    max_turn_tokens: Annotated[int, typer.Option(help="Longest completion of a user turn, in tokens.")] = 128,
    concurrency: Annotated[int, typer.Option(help="Requests at once.")] = 64,
    seed: Annotated[int, typer.Option(help="Another seed samples another corpus.")] = 0,
) -> None:
    """Let MODEL sample the answers its drafter will be trained on; a stopped run goes on where it was.

    Example: dspark-server data answers.npz --prompts gsm8k-train.jsonl --starters starters.jsonl --self 1000
    """
    with _clear_errors():
        from dspark_server.training.data import DataConfig, make_data

        weights = None if temperature_weights is None else _numbers(temperature_weights)
        made = make_data(
            DataConfig(
                output=output,
                model=model,
                prompts=tuple(prompts or ()),
                samples=samples,
                starters=tuple(starters or ()),
                starters_count=starters_count,
                self_count=self_count,
                exclude=tuple(exclude or ()),
                temperatures=_numbers(temperatures),
                temperature_weights=weights,
                max_tokens=max_tokens,
                max_turn_tokens=max_turn_tokens,
                concurrency=concurrency,
                seed=seed,
            )
        )
        typer.echo(made)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{text!r} is not a list of numbers such as 1,0.7,0.") from None


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file of the run; configs/train/ has examples.")],
) -> None:
    """Train a drafter for a frozen target, or go on with a run that was stopped.

    Example: dspark-server train configs/train/smollm2.yaml
    """
    with _clear_errors():
        from dspark_server.training.config import TrainConfig
        from dspark_server.training.train import train as run

        typer.echo(run(TrainConfig.load(config)))


CORPUS_HELP = "The corpus (.npz) the drafter was trained on."


@app.command()
def calibrate(
    drafter: Annotated[str, typer.Argument(help="Directory of the drafter; calibration.json is written into it.")],
    corpus: Annotated[Path, typer.Option(help=CORPUS_HELP)],
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "SmolLM2-135M-Instruct",
    held_out: Annotated[int, typer.Option(help="Sequences the training run held out; their prompts are used.")] = 300,
    samples: Annotated[int, typer.Option(help="Answers per prompt at temperature 1.")] = 1,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    plots: Annotated[Path | None, typer.Option(help="Directory for reliability diagrams.")] = None,
) -> None:
    """Make the drafter's confidence mean what it says (sequential temperature scaling), at temperatures 0 and 1.

    Example: dspark-server calibrate build/drafter --corpus answers.npz
    """
    with _clear_errors():
        import orjson

        from dspark_server.evaluation.calibrate import CalibrateConfig
        from dspark_server.evaluation.calibrate import calibrate as run

        report = run(
            CalibrateConfig(drafter, corpus, model, held_out, samples=samples, max_tokens=max_tokens, plots=plots)
        )
        typer.echo(orjson.dumps(report, option=orjson.OPT_INDENT_2).decode())


@app.command(name="eval")
def evaluate(
    prompts: Annotated[list[Path], typer.Option(help='JSON lines with "prompt" and "domain"; may be repeated.')],
    drafter: Annotated[str | None, typer.Option(help="Directory of the drafter; default: the model's own.")] = None,
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "SmolLM2-135M-Instruct",
    selection: Annotated[str, typer.Option(help="Policy of the run that measures speed.")] = "causal",
    temperature: Annotated[float, typer.Option(help="Sampling temperature of all requests.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    concurrency: Annotated[int, typer.Option(help="Requests at once.")] = 16,
    limit: Annotated[int | None, typer.Option(help="Prompts of each file.")] = None,
    shortlist: Annotated[int | None, typer.Option(help="Candidates of a draft position; default: all.")] = None,
    baseline: Annotated[bool, typer.Option(help="Measure speed too: as served, and without the drafter.")] = True,
    raw: Annotated[bool, typer.Option(help="Prompts as they stand, without the chat template.")] = False,
    plots: Annotated[Path | None, typer.Option(help="Directory for the plots.")] = None,
    json: Annotated[bool, typer.Option(help="One JSON object instead of the table.")] = False,
) -> None:
    """Measure a drafter through the real engine: accepted length, acceptance by position, calibration, speed.

    Example: dspark-server eval --prompts math.jsonl --prompts code.jsonl --temperature 1
    """
    with _clear_errors():
        import orjson
        from rich.console import Console

        from dspark_server.config import SpeculativeConfig
        from dspark_server.evaluation.evaluate import EvalConfig, show
        from dspark_server.evaluation.evaluate import evaluate as run

        speculative = SpeculativeConfig(method="dspark", model=drafter, selection=selection, shortlist=shortlist)
        result = run(
            EvalConfig(prompts, model, speculative, temperature, max_tokens, concurrency, limit, baseline, raw, plots)
        )
        if json:
            typer.echo(orjson.dumps(result).decode())
        else:
            show(result, Console())


def main() -> None:
    """Entry point."""
    sys.exit(app())
