"""`serve`, and `config`, which says what it would serve with."""

import logging
import os
import signal
import sys
from typing import Annotated, NoReturn

import typer

from dspark_server import failpoints
from dspark_server.api.logs import set_up
from dspark_server.api.settings import ServerSettings
from dspark_server.cli.options import takes_settings
from dspark_server.config import EngineConfig
from dspark_server.errors import EngineDeadError
from dspark_server.resolve import Resolution

EXIT_DEAD = 70  # EX_SOFTWARE: the engine died, and with it the server


@takes_settings()
def serve(resolution: Resolution) -> None:
    """Serve MODEL over HTTP."""
    config, settings = resolution.make(EngineConfig), resolution.make(ServerSettings)
    set_up(settings.log_level, settings.log_format)
    log = logging.getLogger("dspark_server")
    log.info("settings: %s", resolution)
    if armed := failpoints.arm_from_environment():
        log.warning("failpoints are armed, this server will fail on purpose: %s", ", ".join(armed))
    # Until the server handles it: as the first process of a container this one would else not hear of it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    # Imported here: torch takes seconds, and a wrong setting should not.
    from dspark_server.api.server import StillLoading, run
    from dspark_server.engine.core import EngineCore
    from dspark_server.engine.engine import AsyncEngine

    def load() -> AsyncEngine:
        log.info("loading %s; /health is 503 until it is there", config.model)
        core = EngineCore.load(config)
        return AsyncEngine(core, core.load_tokenizer())

    try:
        run(load, settings)
    except StillLoading:
        _leave(0)
    except EngineDeadError as error:
        log.critical("%s The process ends; start it again.", error)
        _leave(EXIT_DEAD)


def _leave(code: int) -> NoReturn:
    """Not sys.exit: it waits for threads, and the one that loads or steps may never end."""
    logging.shutdown()
    os._exit(code)


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
    resolution.make(EngineConfig), resolution.make(ServerSettings)  # what does not go together is an error here too
    if json:
        typer.echo(show.as_json(resolution))
    else:
        show.table(resolution)
