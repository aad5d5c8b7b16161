"""`pull`, `memory`, `profile` and `conformance`: a model before it is served."""

from pathlib import Path
from typing import Annotated

import typer

from dspark_server.cli.options import DEFAULT_MODEL, MODEL_HELP, clear_errors, takes_settings
from dspark_server.errors import ConfigError
from dspark_server.resolve import Resolution


def pull(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)] = DEFAULT_MODEL,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hugging Face Hub.")] = None,
) -> None:
    """Fetch or convert MODEL and print its directory."""
    with clear_errors():
        from dspark_server.models.hub import resolve_model

        typer.echo(resolve_model(model, revision=revision))


@takes_settings(("Model", "Engine", "Speculation"), without=("measure-costs-again",))
def memory(
    resolution: Resolution,
    gpu_memory: Annotated[float, typer.Option(min=1, metavar="GIB", help="Memory of one GPU, such as 79 (H100).")],
) -> None:
    """Print what each rank holds of a model, and how many tokens of context fit beside it.

    MODEL is a directory, of which config.json and the headers of the weights are read. The flags are those of serve.
    Drafters in directories of their own are not counted.
    """
    from rich.console import Console

    from dspark_server.config import EngineConfig
    from dspark_server.evaluation.memory import GIB, need, show
    from dspark_server.models.decoder import check_length
    from dspark_server.models.fields import read_json
    from dspark_server.models.loading import open_checkpoint
    from dspark_server.models.registry import family_of, load_config

    config = resolution.make(EngineConfig)
    directory = Path(config.model)
    if not directory.is_dir():
        raise ConfigError(
            f"{config.model} is not a directory on this machine: say the one that dspark-server pull prints."
        )
    fields, family, checkpoint = read_json(directory / "config.json"), family_of(directory), open_checkpoint(directory)
    ranks = range(min(config.tensor_parallel_size, 2))
    needs = [need(checkpoint, fields, family, config, rank) for rank in ranks]
    console = Console()
    show(needs, config, check_length(load_config(directory), config.max_model_len), gpu_memory * GIB, console)
    if config.speculative.model:
        console.print(f"The drafter {config.speculative.model} is not counted.")


@takes_settings(("Model", "Engine", "Speculation"), without=("measure-costs-again",))
def profile(
    resolution: Resolution,
    again: Annotated[bool, typer.Option("--again", help="Measure, even if this machine has a kept profile.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write the curve as a PNG.")] = None,
) -> None:
    """Print what passes and drafts cost on this machine.

    This is SPS(B), the curve that selection goes by. The flags are those of serve that change it.
    """
    from rich.console import Console

    from dspark_server.config import EngineConfig
    from dspark_server.engine.core import EngineCore
    from dspark_server.evaluation.plots import plot_costs, show_costs

    core = EngineCore.load(resolution.make(EngineConfig, measure_costs_again=again))
    if core.loop.cost_model is None:
        raise ConfigError("nothing here goes by costs: that needs a drafter and selection causal or lagged.")
    show_costs(core.loop.cost_model, Console())
    if plot is not None:
        plot_costs(core.loop.cost_model, plot)


def conformance(
    directory: Annotated[Path, typer.Argument(help="Folder with target/, draft/ and expected.safetensors.")],
) -> None:
    """Replay a folder of reference outputs through the engine.

    They are of a target and drafter pair; the exit code is 1 if any is out of bounds.
    """
    with clear_errors():
        from dspark_server.conformance import replay

        report = replay(directory, progress=lambda line: typer.echo(line, err=True))
        for kind, error in report.largest.items():
            verdict = "ok" if error <= report.tolerance(kind) else "OUT OF BOUNDS"
            typer.echo(f"{kind:20} largest error {error:.2e}  {verdict}")
        for mismatch in report.mismatches:
            typer.echo(f"differs: {mismatch}")
        typer.echo(f"{report.rounds} rounds: {'passed' if report.passed else 'FAILED'}")
        if not report.passed:
            raise typer.Exit(1)
