"""`chat`: talk to a server in the terminal. Answers go to stdout, all else to stderr, so that answers can be piped."""

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from dspark_server.cli.options import clear_errors
from dspark_server.errors import ConfigError, DSparkServerError
from dspark_server.settings import suggest

if TYPE_CHECKING:
    from dspark_server.cli.conversation import Conversation

HELP = {
    "/help": "show this",
    "/reset": "forget the conversation and begin anew",
    "/exit": "leave; so does Ctrl-D",
}
PROMPT = "> "
# A model may write control characters that a terminal would obey.
_CONTROLS = dict.fromkeys([*(code for code in range(32) if code not in b"\t\n"), *range(0x7F, 0xA0)])


def chat(
    url: Annotated[str, typer.Option(help="Where the server listens.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Name to ask for; default: the first the server lists.")] = None,
    api_key: Annotated[
        str | None, typer.Option(help="Key the server asks for.", envvar="DSPARK_API_KEY", show_envvar=True)
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Sampling temperature; default: the server's.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling; default: the server's.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer, in tokens; default: the server's.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes answers repeat.")] = None,
) -> None:
    """Talk to a server in the terminal.

    Several turns, streamed; Ctrl-C stops an answer. Below each stands how fast it came.
    """
    from dspark_server.cli.conversation import Conversation, connect

    given = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": seed}
    sampling = {name: value for name, value in given.items() if value is not None}
    if not url.startswith(("http://", "https://")):
        url = f"http://{url}"
    with clear_errors():
        key = (api_key or "").split(",")[0].strip()  # the server's variable may list several
        if not key.isascii():
            raise ConfigError("--api-key must be ASCII.")
        with connect(url, key) as http:
            conversation = Conversation(http, model, system, sampling)
            _note(f"{conversation.model} at {url}. /help lists commands; Ctrl-C stops an answer.")
            failed = _talk(conversation)
    if failed:
        raise typer.Exit(1)


def _talk(conversation: "Conversation") -> bool:
    """Run turns until the input ends; return whether the last one failed."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() then edits lines and remembers them)
    failed = False
    while True:
        try:
            line = input(PROMPT if sys.stdin.isatty() else "").strip()
        except EOFError:
            return failed
        except KeyboardInterrupt:
            _note("\n/exit or Ctrl-D leaves.")
            continue
        if line == "/exit":
            return False
        if line == "/reset":
            conversation.reset()
            _note("A new conversation.")
        elif line == "/help":
            _note("\n".join(f"{name:8}{meaning}" for name, meaning in HELP.items()))
        elif line.startswith("/") and " " not in line:
            _note(f"There is no command {line}.{suggest(line, HELP)} /help lists them.")
        elif line:
            failed = not _answer(conversation, line)


def _answer(conversation: "Conversation", line: str) -> bool:
    """Stream one answer; return whether it came without an error."""
    try:
        answer = conversation.ask(line, _write)
    except DSparkServerError as error:
        print(flush=True)
        typer.secho(f"dspark-server: {error}", err=True, fg="red")
        return False
    print(flush=True)
    _note(answer.summary())
    return True


def _write(text: str) -> None:
    print(text.translate(_CONTROLS), end="", flush=True)


def _note(text: str) -> None:
    typer.secho(text, err=True, dim=True)
