"""Alerts, autoscaling, endpoint picking: they ask for what the server has, and limits agree with its flags."""

import re
from pathlib import Path

import pytest
import yaml

from .manifests import DEPLOY, ROOT, of_kind, overlay, servers
from .promql import Series, check, parse, selectors
from .test_manifests import with_component

ALERTS = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text())["groups"]
MONITORING = (ROOT / "docs" / "monitoring.md").read_text()
RULES = [rule for group in ALERTS for rule in group["rules"]]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_asks_for_what_the_server_has(live: dict[str, Series], rule: dict) -> None:
    if {each.name for each in selectors(parse(rule["expr"]))} == {"up"}:  # Prometheus's own
        return
    check(live, rule["expr"])


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_says_what_to_do_by_labels_it_has(rule: dict) -> None:
    assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert set(rule["annotations"]) == {"summary", "description"}
    grouped = frozenset[str]().union(*[each.grouped for each in selectors(parse(rule["expr"]))])
    has = grouped or {"job", "instance", "model_name"}
    for label in re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values())):
        assert label in has


def test_every_alert_is_made_to_fire() -> None:
    """By promtool, in `make check-deploy`."""
    tests = yaml.safe_load((DEPLOY / "prometheus" / "alerts_test.yaml").read_text())["tests"]
    assert "exp_samples" not in {test["name"]: test for test in tests}["healthy"]["promql_expr_test"][0]
    expected = [sample["labels"] for test in tests for sample in test["promql_expr_test"][0].get("exp_samples", ())]
    assert {re.search(r'alertname="(\w+)"', labels)[1] for labels in expected} == {rule["alert"] for rule in RULES}


def test_the_operator_gets_the_same_alerts() -> None:
    [rule] = of_kind(overlay("single-gpu"), "PrometheusRule")
    assert rule["spec"]["groups"] == ALERTS


def test_the_alerts_are_those_of_the_documentation() -> None:
    """By name and severity, in the same order."""
    rows = re.findall(r"^\| `(DSparkServer\w+)`, (\w+) \| [^|]+ \| [^|]+ \|$", MONITORING, re.MULTILINE)
    assert rows == [(rule["alert"], rule["labels"]["severity"]) for rule in RULES]
    assert set(re.findall(r"\bDSparkServer\w+", MONITORING)) == {rule["alert"] for rule in RULES}


def max_num_seqs(config: str) -> int:
    """Of a file of configs/serve."""
    return yaml.safe_load((ROOT / "configs" / "serve" / Path(config).name).read_text())["max-num-seqs"]


def test_keda_scales_by_queue_and_by_three_quarters_of_what_may_run(live: dict[str, Series]) -> None:
    manifests = overlay("replicas")
    [scaled] = of_kind(manifests, "ScaledObject")
    triggers = {trigger["name"]: trigger for trigger in scaled["spec"]["triggers"]}
    for name, trigger in triggers.items():
        query = trigger["metadata"]["query"]
        check(live, query)
        assert [each.name for each in selectors(parse(query))] == [f"vllm:num_requests_{name}"]
        assert 'namespace="dspark"' in query and 'job="dspark-server"' in query
    [(_, container)] = servers(manifests)
    most = max_num_seqs(container["args"][container["args"].index("--config") + 1])
    assert int(triggers["running"]["metadata"]["threshold"]) == most * 3 // 4
    assert int(triggers["waiting"]["metadata"]["threshold"]) < most
    assert scaled["spec"]["fallback"]["replicas"] >= scaled["spec"]["minReplicaCount"]


def test_the_hpa_scales_by_metrics_that_the_adapter_makes(live: dict[str, Series], tmp_path: Path) -> None:
    manifests = with_component("hpa", tmp_path)
    [scaler] = of_kind(manifests, "HorizontalPodAutoscaler")
    values = yaml.safe_load((DEPLOY / "components" / "hpa" / "adapter-values.yaml").read_text())
    made = {}
    for rule in values["rules"]["custom"]:
        check(live, rule["seriesQuery"])
        [series] = selectors(parse(rule["seriesQuery"]))
        made[rule["name"]["as"]] = series.name
        expanded = rule["metricsQuery"].replace("<<.GroupBy>>", "pod").replace("<<.Series>>", series.name)
        check(live, expanded.replace("<<.LabelMatchers>>", 'namespace="dspark"'))
    targets = {each["pods"]["metric"]["name"]: each["pods"]["target"] for each in scaler["spec"]["metrics"]}
    assert {name: made[name] for name in targets} == {
        "vllm_num_requests_waiting": "vllm:num_requests_waiting",
        "vllm_num_requests_running": "vllm:num_requests_running",
    }
    [(_, container)] = servers(manifests)
    most = max_num_seqs(container["args"][container["args"].index("--config") + 1])
    assert int(targets["vllm_num_requests_running"]["averageValue"]) == most * 3 // 4


def test_the_endpoint_picker_reads_series_that_the_server_has(live: dict[str, Series]) -> None:
    manifests = overlay("replicas")
    [picker] = [each for each in of_kind(manifests, "Deployment") if each["metadata"]["name"] == "dspark-server-epp"]
    [container] = picker["spec"]["template"]["spec"]["containers"]
    words = container["args"]
    given = dict(zip(words[::2], words[1::2], strict=True))
    metrics = {flag: name for flag, name in given.items() if flag.endswith("-metric")}
    assert {name for name in metrics.values() if name} <= live.keys()
    assert [flag for flag, name in metrics.items() if not name] == ["--lora-info-metric"]
    assert {"block_size", "num_gpu_blocks"} <= live[metrics["--cache-info-metric"]].labels
    [pool] = of_kind(manifests, "InferencePool")
    assert given["--pool-name"] == pool["metadata"]["name"]
    [(server, _)] = servers(manifests)
    assert (
        picker["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == server["terminationGracePeriodSeconds"]
    )
    [config] = [each for each in of_kind(manifests, "ConfigMap") if "plugins.yaml" in each["data"]]
    plugins = yaml.safe_load(config["data"]["plugins.yaml"])
    names = {plugin["type"] for plugin in plugins["plugins"]}
    for profile in plugins["schedulingProfiles"]:
        assert {plugin["pluginRef"] for plugin in profile["plugins"]} <= names
