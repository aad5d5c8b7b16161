"""`dspark-server data` on the real model: what is asked is sampled, what is excluded is not, a kill loses nothing."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dspark_server.config import SpeculativeConfig
from dspark_server.engine.core import EngineCore, load_tokenizer
from dspark_server.engine.step import StepLoop
from dspark_server.engine.trace import StepOutput
from dspark_server.errors import ConfigError
from dspark_server.models.hub import resolve_model
from dspark_server.training import data
from dspark_server.training.corpus import Corpus
from dspark_server.training.data import DataConfig, make_data, plan
from tests.api.fake_engine import build_tokenizer
from tests.engine.support import SMOLLM2_COSTS, still

PAIR = Path(__file__).parents[1] / "fixtures" / "dspark_qwen3_vanilla"


def write(path: Path, key: str, texts: list[str], domain: str) -> Path:
    path.write_text("\n".join(json.dumps({key: text, "domain": domain}) for text in texts) + "\n")
    return path


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """Seven jobs; the costs of steps are passed."""
    load = EngineCore.load
    monkeypatch.setattr(EngineCore, "load", lambda config: load(config, SMOLLM2_COSTS, clock=still))
    return DataConfig(
        output=tmp_path / "answers.npz",
        prompts=(write(tmp_path / "p.jsonl", "prompt", ["What is 2 + 2?", "Say hello.", "Say  HELLO."], "asked"),),
        starters=(write(tmp_path / "s.jsonl", "starter", ["Write a poem about"], "poems"),),
        starters_count=2,
        self_count=2,
        temperatures=(1.0, 0.0),
        max_tokens=10,
        max_turn_tokens=8,
        concurrency=4,
        dtype="bfloat16",
        kv_cache_memory_bytes=64 << 20,
    )


@pytest.fixture
def tiny(run: DataConfig, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """The same jobs of a random model with a drafter, a token for each byte: for tests that do not look at a text."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for turn in messages %}U:{{ turn.content }}<|end|>{% endfor %}A:"
    speculative = SpeculativeConfig(method="dspark", model=str(PAIR / "draft"))
    load = EngineCore.load
    monkeypatch.setattr(EngineCore, "load", lambda config: load(replace(config, speculative=speculative)))
    monkeypatch.setattr(data, "load_tokenizer", lambda _: tokenizer)
    return replace(run, model=str(PAIR / "target"), dtype="float32")


def test_sequences_are_turns_of_the_template_with_the_targets_answers(run: DataConfig) -> None:
    corpus = Corpus.load(make_data(run))
    tokenizer = load_tokenizer(resolve_model(run.model))
    with np.load(run.output) as arrays:
        domains = [str(arrays["domains"][d]) for d in arrays["domain"]]
        temperatures = arrays["temperature"].tolist()
    assert domains == ["asked"] * 3 + ["poems"] * 2 + ["self"] * 2
    assert temperatures == [job.temperature for job in plan(run)]
    for index, domain in enumerate(domains):
        tokens, prompt = corpus.sequence(index), int(corpus.prompt_length[index])
        text = tokenizer.decode(tokens[:prompt])
        assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
        turn = text.split("<|im_start|>user\n")[1]
        assert {"asked": "", "poems": "Write a poem about", "self": ""}[domain] == turn[: 18 * (domain == "poems")]
        answer = tokens[prompt:].tolist()
        assert 1 <= len(answer) <= 10
        assert len(answer) == 10 or answer[-1] == 2
    assert not run.log.exists()
    with pytest.raises(ConfigError, match="exists already"):
        make_data(run)


def test_excluded_prompts_are_dropped_however_they_are_spaced(tiny: DataConfig, tmp_path: Path) -> None:
    run = replace(
        tiny, starters=(), self_count=0, exclude=(write(tmp_path / "x.jsonl", "prompt", ["say hello."], "x"),)
    )
    assert Corpus.load(make_data(run)).size == 1


def test_a_killed_run_goes_on_to_the_same_corpus(
    tiny: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny
    whole = make_data(replace(run, output=tmp_path / "whole.npz"))
    step = StepLoop.step

    def killed(self: StepLoop) -> list[StepOutput]:
        # By what is finished, not by a count of steps: drafts decide how many steps a job takes.
        if run.log.read_text().count("\n") > 2:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(StepLoop, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            make_data(run)
    finished = run.log.read_text().splitlines()[1:]
    assert 0 < len(finished) < 7
    with run.log.open("a") as file:
        file.write('{"job": 6, "prompt": [1, 2')  # torn by the kill
    make_data(run)
    with np.load(whole) as ours, np.load(run.output) as theirs:
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name], name)


def test_a_log_of_other_settings_is_refused(run: DataConfig) -> None:
    run.log.write_text('{"run": "another"}\n')
    with pytest.raises(ConfigError, match="other settings"):
        make_data(run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": (), "starters": (), "self_count": 0}, "nothing to sample"),
        ({"temperatures": (-1.0,)}, "temperatures"),
        ({"temperature_weights": (1.0,)}, "temperature_weights"),
        ({"output": Path("a.bin")}, "npz"),
        ({"prompts": (Path("nowhere.jsonl"),)}, "nowhere"),
        ({"starters_count": 0}, "starters_count"),
    ],
)
def test_bad_settings_say_what_is_wrong(run: DataConfig, change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(replace(run, **change))  # type: ignore[arg-type]
