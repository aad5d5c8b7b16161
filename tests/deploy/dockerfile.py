"""A Dockerfile as instructions. Enough of the language for ours: no heredocs, `#` comments on lines of their own."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

PATH = Path(__file__).parents[2] / "Dockerfile"


@dataclass(frozen=True)
class Instruction:
    """One instruction: its word in capitals, and what follows, continued lines joined."""

    word: str
    value: str


def instructions(path: Path = PATH) -> list[Instruction]:
    """All instructions in order."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [Instruction(*line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def stage(name: str, path: Path = PATH) -> list[Instruction]:
    """The instructions of the stage of that name, its FROM first."""
    found: list[Instruction] = []
    inside = False
    for each in instructions(path):
        if each.word == "FROM":
            inside = each.value.endswith(f" AS {name}")
        if inside:
            found.append(each)
    assert found, f"no stage {name}"
    return found


def environment(name: str) -> dict[str, str]:
    """What a stage's ENV instructions set."""
    pairs = [pair for each in stage(name) if each.word == "ENV" for pair in each.value.split()]
    return dict(pair.split("=", 1) for pair in pairs)


def arguments() -> dict[str, str]:
    """Defaults of the build arguments."""
    return dict(each.value.split("=", 1) for each in instructions() if each.word == "ARG" and "=" in each.value)


def exec_form(name: str, word: str) -> list[str]:
    """The words of an exec-form instruction of a stage, options before it left out."""
    [value] = [each.value for each in stage(name) if each.word == word]
    words = json.loads(value[value.index("[") :])
    assert isinstance(words, list)
    return words
