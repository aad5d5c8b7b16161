"""`data`, `train`, `calibrate` and `eval`: from a target to a trained, calibrated and measured drafter."""

from pathlib import Path
from typing import Annotated

import typer

from dspark_server.cli.options import DEFAULT_MODEL, MODEL_HELP, clear_errors
from dspark_server.errors import ConfigError


def data(
    output: Annotated[Path, typer.Argument(help="The corpus to write (.npz).")],
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = DEFAULT_MODEL,
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
    """Let MODEL write the text its drafter is trained on.

    A stopped run goes on where it was.
    """
    with clear_errors():
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


def train(
    config: Annotated[Path, typer.Argument(help="YAML file of the run; configs/train/ has examples.")],
) -> None:
    """Train a drafter, or go on with a run that was stopped."""
    with clear_errors():
        from dspark_server.training.config import TrainConfig
        from dspark_server.training.train import train as run

        typer.echo(run(TrainConfig.load(config)))


CORPUS_HELP = "The corpus (.npz) the drafter was trained on."


def calibrate(
    drafter: Annotated[str, typer.Argument(help="Directory of the drafter; calibration.json is written into it.")],
    corpus: Annotated[Path, typer.Option(help=CORPUS_HELP)],
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = DEFAULT_MODEL,
    held_out: Annotated[int, typer.Option(help="Sequences the training run held out; their prompts are used.")] = 300,
    samples: Annotated[int, typer.Option(help="Answers per prompt at temperature 1.")] = 1,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    plots: Annotated[Path | None, typer.Option(help="Directory for reliability diagrams.")] = None,
) -> None:
    """Make a drafter's confidence mean what it says.

    Sequential temperature scaling, at temperatures 0 and 1.
    """
    with clear_errors():
        import orjson

        from dspark_server.evaluation.calibrate import CalibrateConfig
        from dspark_server.evaluation.calibrate import calibrate as run

        report = run(
            CalibrateConfig(drafter, corpus, model, held_out, samples=samples, max_tokens=max_tokens, plots=plots)
        )
        typer.echo(orjson.dumps(report, option=orjson.OPT_INDENT_2).decode())


def evaluate(
    prompts: Annotated[list[Path], typer.Option(help='JSON lines with "prompt" and "domain"; may be repeated.')],
    drafter: Annotated[str | None, typer.Option(help="Directory of the drafter; default: the model's own.")] = None,
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = DEFAULT_MODEL,
    selection: Annotated[str, typer.Option(help="Policy of the run that measures speed.")] = "causal",
    temperature: Annotated[float, typer.Option(help="Sampling temperature of all requests.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    concurrency: Annotated[int, typer.Option(help="Requests at once.")] = 16,
    limit: Annotated[int | None, typer.Option(help="Prompts of each file.")] = None,
    shortlist: Annotated[int | None, typer.Option(help="Candidates of a draft position; default: all.")] = None,
    copying: Annotated[bool, typer.Option(help="Let drafts copy from the context too, as served.")] = True,
    acceptance: Annotated[str, typer.Option(help="Rule for sampled requests: block or ratio.")] = "block",
    baseline: Annotated[bool, typer.Option(help="Measure speed too: as served, and without the drafter.")] = True,
    raw: Annotated[bool, typer.Option(help="Prompts as they stand, without the chat template.")] = False,
    plots: Annotated[Path | None, typer.Option(help="Directory for the plots.")] = None,
    json: Annotated[bool, typer.Option(help="One JSON object instead of the table.")] = False,
) -> None:
    """Measure a drafter through the real engine.

    Accepted length, acceptance by position, calibration, speed.
    """
    with clear_errors():
        import orjson
        from rich.console import Console

        from dspark_server.config import SpeculativeConfig
        from dspark_server.evaluation.evaluate import EvalConfig, show
        from dspark_server.evaluation.evaluate import evaluate as run

        speculative = SpeculativeConfig(
            "auto", drafter, selection=selection, shortlist=shortlist, copying=copying, acceptance=acceptance
        )
        result = run(
            EvalConfig(prompts, model, speculative, temperature, max_tokens, concurrency, limit, baseline, raw, plots)
        )
        if json:
            typer.echo(orjson.dumps(result).decode())
        else:
            show(result, Console())
