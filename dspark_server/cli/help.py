"""`--help` of a command, for terminals of any width."""

from typing import Any

from rich.console import Console, Group
from rich.padding import Padding
from rich.panel import Panel
from rich.text import Text
from typer.core import TyperArgument, TyperCommand


class Command(TyperCommand):
    """Prints each name on its own line; typer's columns cut names on narrow terminals."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Usage, purpose, a panel for each group of parameters, examples."""
        console = Console(highlight=False)
        console.print()
        console.print(Text(self.get_usage(ctx), style="bold"), soft_wrap=True)
        console.print(Padding(_paragraphs(self.help or ""), (1, 1)))
        panels: dict[str, list[Any]] = {"Arguments": [], "Options": []}
        for param in self.get_params(ctx):
            default = "Arguments" if isinstance(param, TyperArgument) else "Options"
            panels.setdefault(getattr(param, "rich_help_panel", None) or default, []).append(param)
        for title, params in panels.items():
            if params:
                entries = Group(*(part for param in params for part in _entry(param, ctx)))
                console.print(Panel(entries, title=title, title_align="left", border_style="dim"))
        for line in (self.epilog or "").splitlines():
            console.print(f" {line}", soft_wrap=True)  # unwrapped, to be copied
        console.print()


def _entry(param: Any, ctx: Any) -> tuple[Text, Padding]:
    """A parameter's names and their details, then its meaning."""
    names, said = param.get_help_record(ctx)
    if isinstance(param, TyperArgument):
        names = names.partition(" ")[0]  # the record repeats the argument's name
    about = param.help or ""
    meaning = Text.from_markup(about).append(said.removeprefix(about), style="dim")
    return Text(names, style="bold cyan", overflow="fold"), Padding(meaning, (0, 0, 0, 4))


def _paragraphs(text: str) -> Text:
    """Reflow a docstring: single line ends are dropped, empty lines kept."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    return Text.from_markup("\n\n".join(paragraphs))
