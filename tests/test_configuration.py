"""Settings from command line, environment, file and defaults: which one wins, and what is an error."""

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import pytest

from dspark_server.api.settings import ServerSettings
from dspark_server.cli import show
from dspark_server.cli.options import OPTIONS
from dspark_server.config import EngineConfig, SpeculativeConfig
from dspark_server.errors import ConfigError
from dspark_server.resolve import OTHER_VARIABLES, Resolution, Resolved, resolve
from dspark_server.settings import options

ROOT = Path(__file__).parents[1]
BY_NAME = {option.name: option for option in OPTIONS}


def resolved(
    file: str | None = None, *, tmp_path: Path, environment: dict[str, str] | None = None, **command_line: Any
) -> Resolution:
    path = None
    if file is not None:
        path = tmp_path / "serve.yaml"
        path.write_text(file)
    return resolve(OPTIONS, command_line, environment or {}, path)


def of(resolution: Resolution, name: str) -> Resolved:
    return resolution.settings[BY_NAME[name]]


def test_the_command_line_wins_over_the_environment_over_the_file_over_the_default(tmp_path: Path) -> None:
    file = "port: 3\nmax-num-seqs: 3\nblock-size: 3"
    environment = {"DSPARK_PORT": "2", "DSPARK_MAX_NUM_SEQS": "2"}
    resolution = resolved(file, tmp_path=tmp_path, environment=environment, port="1")
    path = tmp_path / "serve.yaml"
    assert of(resolution, "port") == Resolved(1, "command line")
    assert of(resolution, "max-num-seqs") == Resolved(2, "environment DSPARK_MAX_NUM_SEQS")
    assert of(resolution, "block-size") == Resolved(3, f"file {path}")
    assert of(resolution, "max-num-batched-tokens") == Resolved(256, "default")
    config, settings = resolution.make(EngineConfig), resolution.make(ServerSettings)
    assert (settings.port, config.max_num_seqs, config.block_size, config.max_num_batched_tokens) == (1, 2, 3, 256)


def test_the_environment_may_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("port: 7")
    assert of(resolve(OPTIONS, {}, {"DSPARK_CONFIG": str(path)}), "port").value == 7
    other = tmp_path / "other.yaml"
    other.write_text("port: 8")
    assert of(resolve(OPTIONS, {}, {"DSPARK_CONFIG": str(path)}, other), "port").value == 8


def test_a_file_takes_every_kind_of_value(tmp_path: Path) -> None:
    file = """
        model: some/where
        max_model_len: 4096
        enable-prefix-caching: no
        shutdown-timeout: 5
        seed: null
        api-key: [first, second]
        disable-access-log-for-endpoints: /health, /metrics
        speculative-config: {method: dspark, model: drafter, num-speculative-tokens: 3}
    """
    resolution = resolved(file, tmp_path=tmp_path)
    config, settings = resolution.make(EngineConfig), resolution.make(ServerSettings)
    assert (config.model, config.max_model_len, config.seed) == ("some/where", 4096, None)
    assert (config.enable_prefix_caching, settings.shutdown_timeout) == (False, 5.0)
    assert settings.api_key == ("first", "second")
    assert settings.disable_access_log_for_endpoints == ("/health", "/metrics")
    assert config.speculative == SpeculativeConfig(method="dspark", model="drafter", num_speculative_tokens=3)
    assert of(resolution, "speculative-config").keys == {"method", "model", "num_speculative_tokens"}


@pytest.mark.parametrize("file", ["", "# nothing", "{}"])
def test_an_empty_file_changes_nothing(file: str, tmp_path: Path) -> None:
    assert {one.source for one in resolved(file, tmp_path=tmp_path).settings.values()} == {"default"}


@pytest.mark.parametrize(("text", "value"), [("true", True), ("1", True), ("yes", True), ("off", False), ("0", False)])
def test_the_environment_says_yes_and_no(text: str, value: bool, tmp_path: Path) -> None:
    environment = {"DSPARK_ACCESS_LOG": text}
    assert of(resolved(tmp_path=tmp_path, environment=environment), "access-log").value is value


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("max-num-seq: 3", r"serve\.yaml has the key 'max-num-seq'.* Did you mean max-num-seqs\?"),
        ("speculative_confg: {}", "Did you mean speculative-config"),
        ("no-enable-prefix-caching: true", "Did you mean enable-prefix-caching"),
        ("check-invariants: true", "not a setting"),
        ("port: many", r"port in .*serve\.yaml must be a whole number, not 'many'"),
        ("port: 1.5", "port in .* must be a whole number, not 1.5"),
        ("port: true", "port in .* must be a whole number, not true"),
        ("port: null", "port in .* must be a whole number, not null"),
        ("port: [1]", r"port in .* must be a whole number, not \[1\]"),
        ("port: 99999", "port in .* must be at most 65535, not 99999"),
        ("max-num-seqs: 0", "max-num-seqs in .* must be at least 1, not 0"),
        ("body-timeout: 0", "body-timeout in .* must be more than 0, not 0"),
        ("stall-timeout: .nan", "stall-timeout in .* must be finite"),
        ("access-log: 2", "access-log in .* must be true or false, not 2"),
        ("revision: 1.0", r"revision in .* must be text \(quote it\), not 1.0"),
        ("revision: ''", "revision in .* is empty"),
        (
            "dtype: bf16",
            r"dtype in .* must be one of auto, bfloat16, float16, float32, not 'bf16'\. Did you mean bfloat16\?",
        ),
        ("api-key: 12345678", "api-key in .* must be a list of texts"),
        ("api-key: [12345678]", "api-key in .* must be a list of texts"),
        ("speculative-config: {selektion: fixed}", "no key 'selektion'. Did you mean selection"),
        ("speculative-config: {shortlist: many}", "shortlist in speculative-config in .* must be a whole number"),
        (
            "speculative-config: {method: eagle}",
            "method in .* must be one of auto, dspark, dflash, dflash2, eagle3, mtp, ngram, none",
        ),
        ("speculative-config: [1]", "must be a JSON object"),
        ("port: 1\nport: 2", "'port' is there twice"),
        ("block-size: 1\nblock_size: 2", "gives block-size twice"),
        ("- port", "must be a mapping"),
        ("port: [", r"is not valid YAML: .* \(line 1, column 8\)"),
        ("api-key: '12345678", r"is not valid YAML: .* \(line 1, column 19\)"),
        ("port: \x07", "is not valid YAML: it has bytes that are no text"),
        ("? [1, 2]\n: 3", "found unhashable key"),
    ],
)
def test_what_a_file_must_not_say(file: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        resolved(file, tmp_path=tmp_path)
    assert "12345678" not in str(raised.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml cannot be read: No such file"):
        resolve(OPTIONS, {}, {}, tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("DSPARK_MAX_NUM_SEQ", "3", "DSPARK_MAX_NUM_SEQ is not a setting. Did you mean DSPARK_MAX_NUM_SEQS?"),
        ("DSPARK_CACHEDIR", "x", "Did you mean DSPARK_CACHE_DIR?"),
        ("DSPARK_PORT", "many", "DSPARK_PORT must be a whole number, not 'many'"),
        ("DSPARK_PORT", "", "DSPARK_PORT is empty"),
        ("DSPARK_API_KEY", "", "DSPARK_API_KEY is empty"),
        ("DSPARK_SPECULATIVE_CONFIG", "{", "DSPARK_SPECULATIVE_CONFIG is not valid JSON"),
    ],
)
def test_what_the_environment_must_not_say(name: str, value: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        resolved(tmp_path=tmp_path, environment={name: value})


def test_service_links_of_kubernetes_are_no_settings(tmp_path: Path) -> None:
    """Services called dspark and dspark-server give their neighbours' containers these variables."""
    address = "tcp://10.0.0.1:8000"
    environment = {
        "DSPARK_PORT": address,
        "DSPARK_SERVICE_HOST": "10.0.0.1",
        "DSPARK_SERVICE_PORT": "8000",
        "DSPARK_SERVER_PORT": address,
        "DSPARK_SERVER_SERVICE_PORT_HTTP": "8000",
        "DSPARK_SERVER_PORT_8000_TCP": address,
        "DSPARK_SERVER_PORT_8000_TCP_ADDR": "10.0.0.1",
    }
    assert of(resolved(tmp_path=tmp_path, environment=environment), "port") == Resolved(8000, "default")


def test_every_variable_the_code_reads_is_known() -> None:
    """Else setting one of them would stop the server."""
    known = set(OTHER_VARIABLES) | {option.variable for option in OPTIONS}
    read = {
        name
        for folder in ("dspark_server", "kernels")
        for path in (ROOT / folder).rglob("*.py")
        for name in re.findall(r'environ(?:\.get)?[\[(]"(DSPARK_\w+)"', path.read_text())
    }
    assert {"DSPARK_CACHE_DIR", "DSPARK_KERNELS", "DSPARK_LINEAR"} <= read <= known


def test_settings_that_do_not_go_together(tmp_path: Path) -> None:
    for wrong, message in (
        ({"max_num_seqs": "64", "max_num_batched_tokens": "64"}, r"--max-num-batched-tokens \(64\) must exceed"),
        ({"speculative_config": '{"method": "none", "model": "x"}'}, "takes no drafter"),
        ({"gpu_memory_utilization": "0.9", "kv_cache_memory_bytes": "1"}, "both size the KV pool"),
        ({"gpu_memory_utilization": "1.1"}, "at most 1"),
        ({"cuda_graph_sizes": "0"}, "at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            resolved(tmp_path=tmp_path, **wrong).make(EngineConfig)
    for refused in ({"gpu_memory_utilization": "0.9"}, {"attention_backend": "triton"}, {"cuda_graph_sizes": "1,2"}):
        config = resolved(tmp_path=tmp_path, **refused).make(EngineConfig)
        config.check_device("cuda")
        with pytest.raises(ConfigError, match="GPU"):
            config.check_device(None)
    assert resolved(tmp_path=tmp_path, cuda_graph_sizes=[1, 8]).make(EngineConfig).cuda_graph_sizes == (1, 8)
    # What would change nothing is accepted.
    config = resolved(tmp_path=tmp_path, tensor_parallel_size="1", enforce_eager=True).make(EngineConfig)
    assert (config.tensor_parallel_size, config.enforce_eager) == (1, True)


def test_dataclasses_check_what_python_gives_them() -> None:
    with pytest.raises(ConfigError, match="--block-size must be at least 1, not 0"):
        EngineConfig(block_size=0)
    with pytest.raises(ConfigError, match="threshold must be at most 1, not 2"):
        SpeculativeConfig(threshold=2)


def test_api_keys_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# team a\nfirst-key\n\n  second-key  \n")
    assert ServerSettings(api_key=("zero",), api_key_file=str(path)).all_api_keys() == (
        *("zero", "first-key", "second-key"),
    )
    assert "zero" not in repr(ServerSettings(api_key=("zero",)))
    path.write_text("# none\n")
    with pytest.raises(ConfigError, match="has no keys"):
        ServerSettings(api_key_file=str(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        ServerSettings(api_key_file=str(tmp_path))
    for wrong in ("", "two words", "schlüssel", "line\n"):
        with pytest.raises(ConfigError, match="API key"):
            ServerSettings(api_key=(wrong,))


def test_every_field_of_the_server_is_a_setting() -> None:
    """A field somebody adds must be made with `setting`, or nobody can set it."""
    assert {field.name for field in dataclasses.fields(ServerSettings)} == {o.field for o in options(ServerSettings)}
    internal = {field.name for field in dataclasses.fields(EngineConfig)} - {o.field for o in options(EngineConfig)}
    assert internal == {"num_blocks", "check_invariants"}


def test_names_are_vllms_and_unique() -> None:
    assert len(BY_NAME) == len(OPTIONS)
    expected = """served-model-name tokenizer revision dtype max-model-len gpu-memory-utilization max-num-seqs
        max-num-batched-tokens block-size enable-prefix-caching enforce-eager seed speculative-config
        tensor-parallel-size host port api-key shutdown-timeout max-num-queued-reqs disable-access-log-for-endpoints"""
    assert set(expected.split()) <= set(BY_NAME)


def test_the_reference_is_up_to_date() -> None:
    """If not: dspark-server config --markdown > docs/configuration.md"""
    assert (ROOT / "docs" / "configuration.md").read_text() == show.reference()


def test_the_environment_is_that_of_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "DSPARK_PORT", "81")
    assert of(resolve(OPTIONS, {}), "port").value == 81
