"""What a checkpoint's generation_config.json says of sampling becomes the default of requests, or one clear line."""

import json
from pathlib import Path

import pytest

from dspark_server.errors import CheckpointError, ConfigError
from dspark_server.models.generation import sampling_defaults


def written(directory: Path, **fields: object) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "generation_config.json").write_text(json.dumps(fields))
    return directory


def test_auto_is_the_models_own_and_a_directory_another(tmp_path: Path) -> None:
    model = written(tmp_path / "model", temperature=0.6, top_p=1, top_k=20, do_sample=True, max_new_tokens=2048)
    other = written(tmp_path / "other", repetition_penalty=1.05, min_p=0, temperature=None, eos_token_id=[1, 2])
    assert sampling_defaults("auto", model) == {"temperature": 0.6, "top_p": 1.0, "top_k": 20}
    assert sampling_defaults(str(other), model) == {"repetition_penalty": 1.05, "min_p": 0.0}
    assert sampling_defaults("vllm", model) == {}
    assert sampling_defaults("auto", tmp_path) == {}, "a model need not have one"
    assert sampling_defaults("auto", written(model, top_k=-1)) == {"top_k": 0}


def test_a_directory_without_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--generation-config .*does not exist; give auto, vllm or its directory"):
        sampling_defaults(str(tmp_path / "nowhere"), tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 2.5),
        ("temperature", "hot"),
        ("temperature", True),
        ("temperature", float("nan")),
        ("top_p", 0),
        ("top_k", 5.5),
        ("top_k", -2),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
    ],
)
def test_a_value_that_no_request_could_have_is_named(tmp_path: Path, name: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=rf"{name} must be a number .*--generation-config vllm"):
        sampling_defaults("auto", written(tmp_path, **{name: value}))
