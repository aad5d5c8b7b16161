"""deploy/grafana/dspark-server.json against the live /metrics of a server that has worked."""

import json
import re
from pathlib import Path

import pytest

from . import promql
from .promql import Series, parse, selectors

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "dspark-server.json"
PANELS = json.loads(DASHBOARD.read_text())["panels"]
QUERIES = [(panel["title"], target["expr"]) for panel in PANELS for target in panel.get("targets", ())]
VARIABLES = {variable["name"]: variable for variable in json.loads(DASHBOARD.read_text())["templating"]["list"]}

# Series that no panel shows, and why. A new series must be shown, or said here.
NOT_SHOWN: dict[str, str] = {}


def check(live: dict[str, Series], query: str) -> None:
    """Fail unless the server has what a panel asks for, and it asks for the chosen models alone."""
    promql.check(live, query)
    for each in selectors(parse(query)):
        assert "model_name" in each.matched, f"{each.name} of all models"
    for variable in re.findall(r"\$\{?(\w+)", query):
        assert variable in VARIABLES or variable in ("__rate_interval", "__range")


@pytest.mark.parametrize("query", [pytest.param(query, id=title) for title, query in QUERIES])
def test_a_query_asks_for_what_the_server_has(live: dict[str, Series], query: str) -> None:
    check(live, query)


def test_legends_name_labels_that_are_left() -> None:
    for panel in PANELS:
        for target in panel.get("targets", ()):
            left = frozenset[str]().union(*[each.grouped for each in selectors(parse(target["expr"]))])
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= left


def test_variables(live: dict[str, Series]) -> None:
    assert VARIABLES["datasource"]["type"] == "datasource"
    name, label = re.fullmatch(r"label_values\((\S+), (\w+)\)", VARIABLES["model_name"]["definition"]).groups()
    assert label in live[name].labels
    assert VARIABLES["model_name"]["query"]["query"] == VARIABLES["model_name"]["definition"]
    sources = [panel["datasource"] for panel in PANELS if panel["type"] != "row"]
    sources += [target["datasource"] for panel in PANELS for target in panel.get("targets", ())]
    assert {json.dumps(each) for each in sources} == {'{"type": "prometheus", "uid": "${datasource}"}'}


def test_every_series_is_shown_or_left_out_on_purpose(live: dict[str, Series]) -> None:
    shown = {live[each.name].family for _, query in QUERIES for each in selectors(parse(query))}
    ours = {series.family for name, series in live.items() if name.startswith(("vllm:", "dspark:"))}
    assert ours - shown == set(NOT_SHOWN)


def test_panels_are_described_and_do_not_overlap() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken
        assert all(x < 24 for x, _ in cells)
        taken |= cells
        assert panel["type"] == "row" or panel["description"]


def test_a_query_that_does_not_parse_is_found() -> None:
    with pytest.raises(ValueError, match="unclosed"):
        parse("sum by (le (rate(x[5m]))")


M = '{model_name=~"$model_name"}'


@pytest.mark.parametrize(
    ("query", "complaint"),
    [
        (f"rate(vllm:no_such_total{M}[1m])", "no series"),
        (f"sum by (nothing) (vllm:num_requests_running{M})", "no label"),
        (f"sum by (engine) (sum by (model_name) (vllm:num_requests_running{M}))", "aggregated away"),
        (f"rate(vllm:num_requests_running{M}[1m])", "is a gauge"),
        (f"sum (vllm:generation_tokens_total{M})", "is a counter"),
        ("vllm:num_requests_running", "all models"),
    ],
)
def test_a_wrong_query_is_found(live: dict[str, Series], query: str, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        check(live, query)
