"""`serve`, and `config`, which prints the settings that `serve` would use."""

import logging
import signal
import sys
from typing import Annotated

import typer

from dspark_server import failpoints
from dspark_server.api.logs import set_up
from dspark_server.api.settings import ServerSettings
from dspark_server.cli.options import takes_settings
from dspark_server.cli.ranks import EXIT_DEAD, Ranks
from dspark_server.config import EngineConfig
from dspark_server.errors import CheckpointError, EngineDeadError
from dspark_server.models.hub import resolve_model
from dspark_server.resolve import Resolution


@takes_settings()
def serve(resolution: Resolution) -> None:
    """Serve MODEL over HTTP."""
    config, settings = resolution.make(EngineConfig), resolution.make(ServerSettings)
    set_up(settings.log_level, settings.log_format)
    log = logging.getLogger("dspark_server")
    if armed := failpoints.arm_from_environment():
        log.warning("failpoints are armed, this server will fail on purpose: %s", ", ".join(armed))
    # Until the server handles it: the first process of a container ignores SIGTERM by default.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if config.tensor_parallel_size > 1:  # before the other ranks exist, which would repeat the errors
        from dspark_server.models.registry import load_config

        directory = resolve_model(config.model, revision=config.revision)
        load_config(directory, config.enable_expert_parallel).shared_by(config.tensor_parallel_size)
    # From here on torch is imported, which takes seconds; wrong settings are reported before.
    with Ranks.start(config.tensor_parallel_size, config.device) as ranks:
        if ranks.rank != 0:
            _follow(config, ranks)
            return
        log.info("settings: %s", resolution)
        _lead(config, settings, ranks)


def _lead(config: EngineConfig, settings: ServerSettings, ranks: Ranks) -> None:
    """Run rank 0, in most servers the only one."""
    from dspark_server.api.server import StillLoading, run
    from dspark_server.engine.core import EngineCore
    from dspark_server.engine.engine import AsyncEngine
    from dspark_server.models.ends import warn_of_ends

    log = logging.getLogger("dspark_server")

    def load() -> AsyncEngine:
        log.info("loading %s; /health is 503 until it is there", config.model)
        group, device = ranks.meet(config.device, config.step_timeout)
        core = EngineCore.load(config, group=group, device=device)
        if core.tokenizer is None:
            raise CheckpointError(f"{config.model} has no tokenizer: name one with --tokenizer.")
        warn_of_ends(core.eos_token_ids, core.tokenizer, settings.chat_template)
        engine = AsyncEngine(core, core.tokenizer)
        ranks.watch(engine.die)
        return engine

    try:
        run(load, settings)
    except StillLoading:
        ranks.leave(0)
    except EngineDeadError as error:
        log.critical("%s The process ends; start it again.", error)
        ranks.leave(EXIT_DEAD)


def _follow(config: EngineConfig, ranks: Ranks) -> None:
    """Run a rank other than 0: it serves rank 0, which also ends it; signals are for rank 0."""
    from dspark_server.engine.ranks import follow
    from dspark_server.runtime.group import TorchGroup

    try:
        group, device = ranks.meet(config.device, config.step_timeout)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        assert isinstance(group, TorchGroup)
        follow(config, group, device=device)
    except EngineDeadError as error:
        logging.getLogger("dspark_server").critical("rank %d: %s", ranks.rank, error)
        ranks.leave(EXIT_DEAD)


@takes_settings()
def config(
    resolution: Resolution,
    json: Annotated[bool, typer.Option("--json", help="One JSON object instead of the table.")] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="The reference of all settings (docs/configuration.md).")
    ] = False,
) -> None:
    """Print the settings in force and where each comes from.

    They are those that `serve` with the same flags would use; nothing is loaded.
    """
    from dspark_server.cli import show

    if markdown:
        typer.echo(show.reference(), nl=False)
        return
    resolution.make(EngineConfig), resolution.make(ServerSettings)  # conflicting settings are an error here too
    if json:
        typer.echo(show.as_json(resolution))
    else:
        show.table(resolution)
