"""docs/api.md and docs/from-vllm.md say what the code does."""

import re
from pathlib import Path

import httpx
import pytest

from dspark_server.api import reference
from dspark_server.cli.options import OPTIONS

from .support import Running

DOCS = Path(__file__).parents[2] / "docs"
FROM_VLLM = (DOCS / "from-vllm.md").read_text()


def names(begin: str, end: str) -> list[str]:
    """Words in backticks of docs/from-vllm.md between two phrases."""
    part = FROM_VLLM[FROM_VLLM.index(begin) :]
    found = re.findall(r"`([^`\s]+)`", part[: part.index(end)])
    assert found
    return found


def test_the_api_reference_is_up_to_date(server: Running) -> None:
    """If not: curl -s localhost:8000/openapi.json | python -m dspark_server.api.reference > docs/api.md"""
    assert (DOCS / "api.md").read_text() == reference.reference(server.http.get("/openapi.json").json())


def test_the_page_for_browsers_is_whole(server: Running) -> None:
    """tests/dashboard opens it in one."""
    answer = server.http.get("/docs")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["content-security-policy"].startswith("default-src 'none';")
    assert not re.search(r"https?://|\ssrc=|@import|url\(|<script|\.md\b", answer.text)
    for name in ("truncate_prompt_tokens", "continue_final_message", "/detokenize"):
        assert f"<code>{name}</code>" in answer.text or f" {name}</code>" in answer.text


def test_every_field_has_a_meaning(server: Running) -> None:
    rows = re.findall(r"^\| `[^|]*\|[^|]*\|[^|]*\|(.*)\|$", (DOCS / "api.md").read_text(), flags=re.MULTILINE)
    assert len(rows) > 80
    assert all(row.strip() for row in rows)


def test_vllms_flags() -> None:
    ours = {f"--{option.name}" for option in OPTIONS} | {"--config"}
    assert set(names("The same names and meaning", "They differ")) <= ours
    refused = [flag for flag in names("Not here:", "## Fields") if flag.startswith("--")]
    own = {"--log-level", "--access-log"}
    assert own <= set(refused) & ours
    assert ours.isdisjoint(set(refused) - own)


def test_vllms_fields(server: Running) -> None:
    paths = server.http.get("/openapi.json").json()["paths"]
    body = paths["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    listed = set(names("All of these work", "[HTTP API]"))
    assert listed | {"model", "prompt", "speculation", "spaces_between_special_tokens"} == set(body["properties"])
    assert set(names("Refused with status 400", "where the message")) == set(body["x-refused"])


@pytest.mark.parametrize("name", names("Refused with status 400", "where the message"))
def test_what_is_refused(server: Running, name: str) -> None:
    refused(server.complete("say x", **{name: {"a": 1}}), name)


@pytest.mark.parametrize(
    ("old", "new"),
    [("guided_json", "json"), ("guided_regex", "regex"), ("guided_choice", "choice"), ("guided_grammar", "grammar")],
)
def test_old_names_say_the_new_one(server: Running, old: str, new: str) -> None:
    error = refused(server.chat("say x", **{old: ["a"]}), old)
    assert f'structured_outputs: {{"{new}"' in error["message"]


@pytest.mark.parametrize("name", ["structural_tag", "whitespace_pattern"])
def test_forms_that_are_not_served(server: Running, name: str) -> None:
    error = refused(server.complete("say x", structured_outputs={"regex": "a", name: "b"}), "structured_outputs")
    assert f"structured_outputs.{name}" in error["message"]


def refused(response: httpx.Response, param: str) -> dict:
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, "unsupported")
    return error


def test_endpoints(server: Running) -> None:
    paths = set(server.http.get("/openapi.json").json()["paths"])
    assert set(names("Here: `/v1", "`/load` counts")) | {"/v1/models/{name}"} == paths
    assert paths.isdisjoint(names("Not here: `/v1", "## Metrics"))


def test_metrics_that_are_missing(server: Running) -> None:
    text = server.http.get("/metrics").text
    assert "vllm:num_requests_running" in text
    assert not [name for name in names("are vLLM's. Not here", "process_resident") if name in text and ":" in name]
