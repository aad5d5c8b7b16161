"""Flags made from settings, and a command's error messages."""

import functools
import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Concatenate, ParamSpec

import typer
from rich.markup import escape

from dspark_server.api.settings import ServerSettings
from dspark_server.config import EngineConfig
from dspark_server.errors import DSparkServerError
from dspark_server.resolve import CONFIG_VARIABLE, Resolution, resolve
from dspark_server.settings import GROUPS, Option, options

OPTIONS = tuple(
    sorted((*options(EngineConfig), *options(ServerSettings)), key=lambda option: GROUPS.index(option.group))
)
MODEL_HELP = next(option.help for option in OPTIONS if option.name == "model")
DEFAULT_MODEL = EngineConfig().model

P = ParamSpec("P")


@contextmanager
def clear_errors() -> Iterator[None]:
    """End the command with the message of a deliberate error and status 1, without a traceback."""
    try:
        yield
    except DSparkServerError as error:
        typer.echo(f"dspark-server: {error}", err=True)
        raise typer.Exit(1) from None


def takes_settings(
    groups: Collection[str] = GROUPS, *, without: Collection[str] = ()
) -> Callable[[Callable[Concatenate[Resolution, P], None]], Callable[..., None]]:
    """Give a command the flags of the settings in `groups`, and the resolved settings as its first parameter.

    The flags stand before the command's own; files and the environment may set all settings.
    """
    shown = [option for option in OPTIONS if option.group in groups and option.name not in without]

    def decorate(function: Callable[Concatenate[Resolution, P], None]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(**arguments: Any) -> None:
            with clear_errors():
                file = arguments.pop("config_file")
                written = {option: arguments.pop(option.key) for option in shown}
                given = {
                    option.key: ",".join(value) if option.is_list else value
                    for option, value in written.items()
                    if value is not None and value != []
                }
                function(resolve(OPTIONS, given, file=file), **arguments)  # type: ignore[call-arg]

        own = list(inspect.signature(function).parameters.values())[1:]
        parameters = [*map(_parameter, shown), _CONFIG_FILE, *own]
        keyword_only = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
        command.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]
        return command

    return decorate


def _parameter(option: Option) -> inspect.Parameter:
    """Return a setting's command-line parameter. All are read as text: Option.read converts and checks."""
    default = option.show(option.default) if not option.is_mapping else ""
    rules = "; ".join(filter(None, ("|".join(option.choices), default and f"default: {default}")))
    shown = escape(option.help) + (f" [dim]{escape(f'[{rules}]')}[/dim]" if rules else "")
    info: Any
    if option.name == "model":
        info = typer.Argument(help=shown, show_default=False, metavar="MODEL")
    elif option.kind is bool:
        flags = f"--{option.name}/--no-{option.name}"
        info = typer.Option(flags, help=shown, show_default=False, rich_help_panel=option.group)
    else:
        info = typer.Option(
            f"--{option.name}", help=shown, show_default=False, rich_help_panel=option.group, metavar=option.metavar
        )
    kind: Any = bool | None if option.kind is bool else list[str] | None if option.is_list else str | None
    return inspect.Parameter(option.key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, info])


_CONFIG_FILE = inspect.Parameter(
    "config_file",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE",
            help=f"YAML with the long names of these options; default: what {CONFIG_VARIABLE} names. The command line "
            "comes before the environment (DSPARK_PORT and so on), and that before the file.",
            show_default=False,
        ),
    ],
)
