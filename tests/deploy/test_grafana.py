"""deploy/grafana/dspark-server.json against the live /metrics of a server that has worked."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import promql_parser
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dspark_server.api import ServerSettings
from tests.api.conftest import tiny_engine
from tests.api.support import start

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "dspark-server.json"
PANELS = json.loads(DASHBOARD.read_text())["panels"]
QUERIES = [(panel["title"], target["expr"]) for panel in PANELS for target in panel.get("targets", ())]
VARIABLES = {variable["name"]: variable for variable in json.loads(DASHBOARD.read_text())["templating"]["list"]}

# Series that no panel shows, and why. A new series must be shown, or said here.
NOT_SHOWN: dict[str, str] = {}

COUNTED = ("rate", "increase")


@dataclass(frozen=True)
class Series:
    """What /metrics says of one sample name."""

    family: str
    kind: str  # counter, gauge or histogram
    labels: frozenset[str]


@dataclass(frozen=True)
class Selector:
    """A series in a query: the function around it, the labels it is matched by, and those that must outlive it."""

    name: str
    function: str | None
    matched: frozenset[str]
    grouped: frozenset[str]


@pytest.fixture(scope="module")
def live() -> Iterator[dict[str, Series]]:
    """Series of a server with the real engine, a drafter and measured costs, after some requests."""
    for server in start(ServerSettings(port=0), tiny_engine("causal")):
        for number in range(4):
            assert server.complete([7 + number, 9], max_tokens=12, temperature=number % 2).status_code == 200
        found = {}
        for family in text_string_to_metric_families(server.http.get("/metrics").text):
            for sample in family.samples:
                found[sample.name] = Series(family.name, family.type, frozenset(sample.labels))
        yield found


def parse(query: str) -> promql_parser.Expr:
    """A query as Prometheus gets it. Raises ValueError."""
    return promql_parser.parse(query.replace("$__rate_interval", "1m").replace("$__range", "30m"))


def selectors(node: object, function: str | None = None, grouped: frozenset[str] = frozenset()) -> Iterator[Selector]:
    """Everything a query asks for."""
    if isinstance(node, promql_parser.VectorSelector):
        assert node.name, "a selector without a series name"
        yield Selector(node.name, function, frozenset(m.name for m in node.matchers.matchers), grouped)
    elif isinstance(node, promql_parser.MatrixSelector):
        yield from selectors(node.vector_selector, function, grouped)
    elif isinstance(node, promql_parser.Call):
        for argument in node.args:
            yield from selectors(argument, node.func.name, frozenset() if node.func.name == "scalar" else grouped)
    elif isinstance(node, promql_parser.AggregateExpr):
        assert node.modifier is None or node.modifier.type == promql_parser.AggModifierType.By, "`by` alone"
        kept = frozenset(node.modifier.labels if node.modifier else ())
        assert grouped <= kept, f"{grouped - kept} is aggregated away before it is grouped by"
        yield from selectors(node.expr, None, kept)
    elif isinstance(node, promql_parser.BinaryExpr):
        yield from selectors(node.lhs, None, grouped)
        yield from selectors(node.rhs, None, grouped)
    elif isinstance(node, promql_parser.ParenExpr):
        yield from selectors(node.expr, function, grouped)
    else:
        assert isinstance(node, promql_parser.NumberLiteral), f"{type(node).__name__} is new here: check it too"


def check(live: dict[str, Series], query: str) -> None:
    """Fail unless the server has what a query asks for, and it is asked for as what it is."""
    found = list(selectors(parse(query)))
    assert found
    for each in found:
        assert each.name in live, f"no series {each.name}"
        series = live[each.name]
        missing = (each.matched | each.grouped) - series.labels
        assert not missing, f"{each.name} has no label {missing}"
        grows = series.kind in ("counter", "histogram")
        assert grows == (each.function in COUNTED), f"{each.name} is a {series.kind}, but stands in {each.function}"
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
