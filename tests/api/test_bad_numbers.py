"""What no number may be, in every number of every request that generates; and numbers that are odd, but numbers."""

from collections.abc import Iterator

import pytest

from .support import Running
from .test_bad_input import check

PATHS = {
    "/v1/completions": '"prompt": "say x"',
    "/v1/chat/completions": '"messages": [{"role":"user","content":"say x"}]',
}
BAD = ("NaN", "Infinity", "-Infinity", "1e309", "-1e309", "true", '"1"', "[1]", "{}")


@pytest.fixture(autouse=True)
def canary(server: Running) -> Iterator[None]:
    yield
    server.canary()


def numbers(server: Running, path: str) -> list[str]:
    """Fields that take a number, as the published schema says."""
    operation = server.http.get("/openapi.json").json()["paths"][path]["post"]
    fields = operation["requestBody"]["content"]["application/json"]["schema"]["properties"]
    kinds = {
        name: {each["type"] for each in field["anyOf"] if "type" in each}
        for name, field in fields.items()
        if "anyOf" in field
    }
    return [name for name, types in kinds.items() if types & {"integer", "number"}]


@pytest.mark.parametrize("path", PATHS)
def test_what_is_no_number_is_refused_in_every_number(server: Running, path: str) -> None:
    names = numbers(server, path)
    assert {"temperature", "top_p", "max_tokens", "n", "seed", "frequency_penalty", "priority"} <= set(names)
    for name in names:
        for value in BAD:
            answer = server.http.post(path, content=f'{{{PATHS[path]}, "{name}": {value}}}')
            assert check(answer)["type"] == "invalid_request_error", (name, value)


@pytest.mark.parametrize("path", PATHS)
def test_a_negative_zero_is_zero(server: Running, path: str) -> None:
    """Accepted where 0 is, refused where 0 is."""
    for name in numbers(server, path):
        answers = [
            server.http.post(path, content=f'{{{PATHS[path]}, "{name}": {value}}}').status_code for value in ("0", "-0")
        ]
        assert answers[0] == answers[1] and answers[0] in (200, 400), (name, answers)
