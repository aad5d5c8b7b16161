#!/usr/bin/env python3
"""Predicted against observed survival of draft tokens, in settings that no calibration has seen.

    python loadtest/survival.py [--settings penalty-1.3,french] [--prompts FILE]... [--server 'COMMAND']

One server answers requests of each setting (temperatures, penalties, biases, a JSON schema, other languages), under an
API key of the setting's own, so that each begins with uncorrected estimates. After `--learn` draft blocks the next
`--blocks` are counted, from the counters of /metrics. A row has the mean survival predicted for verified draft tokens,
the share that survived, both in per cent, their difference (the gap) before and after learning, and the mean gap of
tenths of the predicted survival (ECE). COMMAND lacks --port and --api-key.

Exit status 1 if a gap after learning is 3 points or more.
"""

import argparse
import asyncio
import shlex
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))  # for `python loadtest/survival.py`

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from loadtest.client import LoadTestError, RequestOptions, closed_loop, connect
from loadtest.counters import DRAFTS
from loadtest.options import count
from loadtest.run import DEFAULT_MODEL
from loadtest.servers import DSPARK_SERVER, Server
from loadtest.workload import Prompts

BAR = 3.0  # points
USERS, REQUESTS = 4, 12  # at once, and between two looks at the counters

OBJECT = {"type": "object", "properties": {"title": {"type": "string"}, "steps": {"type": "array", "items": {"type": "string"}, "minItems": 3}}, "required": ["title", "steps"]}  # fmt: skip  # noqa: E501
SCHEMA = {"response_format": {"type": "json_schema", "json_schema": {"name": "plan", "schema": OBJECT}}, "ignore_eos": False}  # fmt: skip  # noqa: E501
COMMON = {str(token): -2.0 for token in range(200, 300)}  # single characters and frequent endings

FRENCH = (
    "Décris en quelques phrases une journée d'hiver dans un village de montagne.",
    "Explique à un enfant pourquoi la mer est salée.",
    "Quels sont les avantages et les inconvénients du travail à distance ?",
    "Raconte l'histoire d'un boulanger qui perd la recette de son pain.",
    "Comment prépare-t-on une soupe de légumes pour six personnes ?",
    "Donne cinq conseils à quelqu'un qui apprend à jouer du piano.",
)
GERMAN = (
    "Beschreibe einen Markttag in einer kleinen Stadt am Fluss.",
    "Erkläre, wie ein Fahrrad im Gleichgewicht bleibt.",
    "Schreibe einen kurzen Brief an eine Nachbarin, die verreist ist.",
    "Welche Gründe sprechen dafür, Bücher aus der Bibliothek zu leihen?",
    "Erzähle von einem Leuchtturmwärter, der einen Sturm erlebt.",
    "Wie pflanzt man einen Apfelbaum, und worauf ist zu achten?",
)
LANGUAGES = {"french": FRENCH, "german": GERMAN}

# Fields of a request, by the setting's name; prompts are the files' but for languages.
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature-0.3": {"temperature": 0.3},
    "temperature-1": {"temperature": 1.0},
    "temperature-1.5": {"temperature": 1.5},
    "seeded": {"temperature": 1.0, "seed": 7},
    "top-p": {"temperature": 1.0, "top_p": 0.8, "top_k": 20},
    "penalty-1.1": {"repetition_penalty": 1.1},
    "penalty-1.3": {"repetition_penalty": 1.3},
    "frequency-0.5": {"frequency_penalty": 0.5},
    "biases": {"logit_bias": COMMON},
    "schema": SCHEMA,
    "french": {},
    "german": {"temperature": 1.0},
}


@dataclass(frozen=True)
class Survival:
    """Counters of /metrics: draft blocks, and by tenth of the predicted survival (judged, predicted, survived)."""

    blocks: float
    tenths: dict[str, tuple[float, float, float]]

    @classmethod
    def parse(cls, text: str) -> "Survival":
        """Read a page in the Prometheus text format."""
        blocks, found = 0.0, dict[str, dict[str, float]]()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                name = sample.name.removesuffix("_total")
                if name == DRAFTS:
                    blocks += sample.value
                elif name.startswith("dspark:survival_"):
                    tenth = found.setdefault(sample.labels["predicted"], {})
                    tenth[name] = tenth.get(name, 0.0) + sample.value
        kinds = ("judged", "predicted", "survived")
        return cls(
            blocks,
            {
                middle: (values[f"dspark:survival_{kinds[0]}"], values[f"dspark:survival_{kinds[1]}"],
                         values[f"dspark:survival_{kinds[2]}"])
                for middle, values in found.items()
            },
        )  # fmt: skip

    def since(self, before: "Survival") -> "Survival":
        """The increase since `before`."""
        tenths = {}
        for middle, now in self.tenths.items():
            then = before.tenths.get(middle, (0.0, 0.0, 0.0))
            tenths[middle] = (now[0] - then[0], now[1] - then[1], now[2] - then[2])
        return Survival(self.blocks - before.blocks, tenths)

    @property
    def judged(self) -> float:
        return sum(judged for judged, _, _ in self.tenths.values())

    @property
    def predicted(self) -> float:
        """Mean predicted survival of verified draft tokens, in per cent."""
        return 100 * sum(predicted for _, predicted, _ in self.tenths.values()) / max(self.judged, 1)

    @property
    def observed(self) -> float:
        """Share of verified draft tokens that survived, in per cent."""
        return 100 * sum(survived for _, _, survived in self.tenths.values()) / max(self.judged, 1)

    @property
    def gap(self) -> float:
        """Predicted less observed, in points."""
        return self.predicted - self.observed

    @property
    def calibration_error(self) -> float:
        """Mean of the gaps of tenths, in points, weighted by their verified tokens."""
        gaps = sum(abs(predicted - survived) for _, predicted, survived in self.tenths.values())
        return 100 * gaps / max(self.judged, 1)


async def _look(client: httpx.AsyncClient) -> Survival:
    response = await client.get("/metrics", timeout=10.0)
    return Survival.parse(response.text)


async def measure(
    url: str, key: str, setting: str, model: str, prompts: Callable[[int], str], *, learn: int, blocks: int,
    advance: Callable[[float], None],
) -> tuple[Survival, Survival]:  # fmt: skip
    """Counters of the first `learn` blocks of a setting, and of the `blocks` after them.

    Raises LoadTestError if a request fails, or if a round of requests drafts nothing.
    """
    fields = SETTINGS[setting]
    options = RequestOptions(model=model, max_tokens=96, api_key=key, extra_body=fields)
    async with connect(url, key) as client:
        marks = [await _look(client)]
        first = 0
        for wanted in (learn, blocks):
            since = now = marks[-1]
            while now.blocks - since.blocks < wanted:
                before = now.blocks
                outcomes = await closed_loop(client, options, prompts, users=USERS, requests=REQUESTS, first=first)
                if failed := next((each for each in outcomes if each.error), None):
                    raise LoadTestError(f"{setting}: a request failed: {failed.error} {failed.detail}")
                first += REQUESTS
                now = await _look(client)
                if now.blocks == before and first > 4 * REQUESTS:
                    raise LoadTestError(f"{setting}: nothing drafts")
                advance(now.blocks - before)
            marks.append(now)
    return marks[1].since(marks[0]), marks[2].since(marks[1])


def report(found: dict[str, tuple[Survival, Survival]], console: Console) -> bool:
    """Print the table; returns whether every gap after learning is below the bar."""
    table = Table("setting", "blocks", "judged", "predicted, %", "observed, %", "gap", "gap before", "ECE")
    kept = True
    for setting, (before, after) in found.items():
        kept &= abs(after.gap) < BAR
        table.add_row(
            setting, f"{after.blocks:.0f}", f"{after.judged:.0f}", f"{after.predicted:.1f}", f"{after.observed:.1f}",
            f"{after.gap:+.1f}", f"{before.gap:+.1f}", f"{after.calibration_error:.1f}",
        )  # fmt: skip
    console.print(table)
    return kept


async def _all(arguments: argparse.Namespace, found: dict[str, tuple[Survival, Survival]], console: Console) -> None:
    command = [*arguments.server]
    keys = {setting: f"key-of-{setting}" for setting in arguments.settings}
    for key in keys.values():
        command += ["--api-key", key]
    with ExitStack() as stack:
        server = Server("dspark", command, Path("build/survival.log"))
        stack.callback(server.stop)
        await server.ready(600)
        texts = Prompts.read(arguments.prompts, seed=0) if arguments.prompts else Prompts(None)
        progress = stack.enter_context(Progress(console=console, transient=True))
        for setting, key in keys.items():
            bar = progress.add_task(setting, total=arguments.learn + arguments.blocks)
            prompts = Prompts(LANGUAGES[setting]) if setting in LANGUAGES else texts
            found[setting] = await measure(
                server.url, key, setting, arguments.model, prompts, learn=arguments.learn, blocks=arguments.blocks,
                advance=lambda blocks, bar=bar: progress.advance(bar, blocks),
            )  # fmt: skip
            server.check(setting)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", type=lambda text: text.split(","), default=list(SETTINGS), help="default: all")
    parser.add_argument("--prompts", type=Path, action="append", help="JSON lines; default: made-up words")
    parser.add_argument("--learn", type=count, default=500, help="blocks before the count (default: 500)")
    parser.add_argument("--blocks", type=count, default=1500, help="blocks that are counted (default: 1500)")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="name that the server knows the model by")
    parser.add_argument("--server", type=shlex.split, help="command; default: this checkout's, on its default model")
    arguments = parser.parse_args()
    if unknown := [each for each in arguments.settings if each not in SETTINGS]:
        parser.error(f"--settings: {unknown[0]!r} is not one of {', '.join(SETTINGS)}")
    arguments.server = arguments.server or [*DSPARK_SERVER, "serve", DEFAULT_MODEL]
    console, found, ended = Console(), dict[str, tuple[Survival, Survival]](), None
    try:
        asyncio.run(_all(arguments, found, console))
    except LoadTestError as error:
        ended = f"[red]{error}[/red]"
    except KeyboardInterrupt:
        ended = "interrupted"
    kept = report(found, console)
    if ended is not None:
        console.print(ended)
        return 2
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
