"""PromQL held against what the server's /metrics says."""

from collections.abc import Iterator
from dataclasses import dataclass

import promql_parser

COUNTED = ("rate", "increase")
TARGET_LABELS = {"job", "instance", "namespace", "pod"}  # Prometheus adds them as it scrapes


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
        missing = (each.matched | each.grouped) - series.labels - TARGET_LABELS
        assert not missing, f"{each.name} has no label {missing}"
        grows = series.kind in ("counter", "histogram")
        assert grows == (each.function in COUNTED), f"{each.name} is a {series.kind}, but stands in {each.function}"
