"""Settings as a table, as JSON, and as the reference in docs/configuration.md."""

from collections.abc import Iterator, Sequence
from typing import Any

import orjson
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dspark_server.api.auth import OPEN_FOLDER, OPEN_PATHS
from dspark_server.cli.options import OPTIONS
from dspark_server.resolve import DEFAULT, OTHER_VARIABLES, Resolution, Resolved
from dspark_server.settings import GROUPS, MASK, Option, options


def table(resolution: Resolution) -> None:
    """Print every setting in force with its value and source, by group; defaults are dim."""
    grid = Table(box=None, pad_edge=False, show_header=False)
    for _ in range(3):
        grid.add_column(overflow="fold")
    for group in GROUPS:
        grid.add_row(f"[bold]{group}[/bold]")
        for option, resolved in resolution.settings.items():
            if option.group == group:
                for name, value, source in _rows(option, resolved):
                    style = "dim" if source == DEFAULT else ""
                    grid.add_row(f"  {name}", escape(value or "-"), escape(source), style=style)
        grid.add_row()
    console = Console()
    if not console.is_terminal:
        console.width = 1000  # one line per setting, however long, so that they can be searched
    console.print(grid)


def _rows(option: Option, resolved: Resolved) -> Iterator[tuple[str, str, str]]:
    if not option.is_mapping:
        yield option.name, option.show(resolved.value), resolved.source
        return
    for inner in options(option.kind):
        source = resolved.source if inner.field in resolved.keys else DEFAULT
        yield f"{option.name}.{inner.field}", inner.show(getattr(resolved.value, inner.field)), source


def as_json(resolution: Resolution) -> str:
    """Return `{"port": {"value": 8000, "source": "default"}, ...}`; secrets are masked."""

    def plain(option: Option, value: Any) -> Any:
        if option.secret and value:
            return MASK
        if option.is_mapping:
            return {inner.field: getattr(value, inner.field) for inner in options(option.kind)}
        return value

    found = {
        option.name: {"value": plain(option, resolved.value), "source": resolved.source}
        for option, resolved in resolution.settings.items()
    }
    return orjson.dumps(found, option=orjson.OPT_INDENT_2).decode()


def reference() -> str:
    """Return docs/configuration.md."""
    parts = [_PREFACE]
    for group in GROUPS:
        rows = [
            (f"`{_flag(option)}`", f"`{option.variable}`", _default(option), _meaning(option))
            for option in OPTIONS
            if option.group == group
        ]
        parts.append(f"## {group}\n\n{_markdown(('option', 'environment', 'default', 'meaning'), rows)}")
        if group == "Server":
            parts.append(_KEYS)
        for outer in (option for option in OPTIONS if option.group == group and option.is_mapping):
            inner = [(f"`{option.field}`", _default(option), _meaning(option)) for option in options(outer.kind)]
            keys = _markdown(("key", "default", "meaning"), inner)
            parts.append(f"### Keys of `--{outer.name}`\n\n{_MAPPING}\n\n{keys}")
    variables = [(f"`{name}`", meaning) for name, meaning in OTHER_VARIABLES.items()]
    parts.append(f"## Other environment variables\n\n{_markdown(('variable', 'meaning'), variables)}")
    return "\n\n".join(parts) + "\n"


def _flag(option: Option) -> str:
    if option.name == "model":
        return "MODEL"
    if option.kind is bool:
        return f"--{option.name}` / `--no-{option.name}"
    return f"--{option.name}"


def _default(option: Option) -> str:
    shown = "" if option.is_mapping else option.show(option.default)
    return f"`{shown}`" if shown else ""


def _meaning(option: Option) -> str:
    parts = [option.help.replace("|", "\\|")]
    if option.choices:
        parts.append(f"One of {', '.join(f'`{choice}`' for choice in option.choices)}.")
    if option.minimum is not None and option.maximum is not None:
        parts.append(f"From {option.minimum} to {option.maximum}.")
    elif option.minimum is not None:
        parts.append(f"At least {option.minimum}.")
    if option.above is not None:
        parts.append(f"More than {option.above}.")
    return " ".join(parts)


def _markdown(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [headings, ("---",) * len(headings), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


_PREFACE = """\
# Configuration

<!-- Made by `dspark-server config --markdown` from the settings in the code; a test says when it is out of date. -->

Every setting can be given in four places; the first place that has it decides:

1. the command line: `dspark-server serve --max-num-seqs 32`
2. the environment: `DSPARK_MAX_NUM_SEQS=32`
3. a YAML file, `--config serve.yaml` or `DSPARK_CONFIG=serve.yaml`, with the long names of the options:

   ```yaml
   model: SmolLM2-135M-Instruct
   port: 9000
   max-num-seqs: 32
   enable-prefix-caching: false
   speculative-config:
     method: dspark
     model: build/drafter
     selection: lagged
   ```
4. the default.

`dspark-server config` with the same flags prints the settings in force and the source of each value. An unknown name is
an error in every place, so that a misspelt key is not ignored. Lists are separated by commas; in YAML they may be
lists. Where vLLM has the setting, the name is vLLM's."""

_MAPPING = """\
A JSON object on the command line and in the environment, a mapping (or that JSON) in YAML. The first place
that has it gives the whole object: places are not merged."""

_KEYS = f"""\
With API keys every request needs `Authorization: Bearer KEY`, or it gets 401. GET needs no key for
{", ".join(f"`{path}`" for path in sorted(OPEN_PATHS))} and below `{OPEN_FOLDER}`: paths
that probes and scrapers read, and the dashboard's page (not its figures)."""
