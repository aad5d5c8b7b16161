"""lm-eval's local-completions, as it comes from PyPI, on small tasks of our own; judged by transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from .conftest import Served, installed, run

QUESTIONS = [
    ("The capital of France is", ["Paris", "Rome", "a fish"]),
    ("Two plus two is", ["four", "seventeen", "blue"]),
    ("Water freezes at zero degrees", ["Celsius", "Sunday", "of freedom in the statistical sense"]),
    ("The opposite of hot is", ["cold", "hotter still", "Paris"]),
    ("def add(a, b):\n    return a +", ["b", "c", "add"]),
    ("Naïve café – 日本", ["語", "の", "x"]),
    ("The sun rises in the", ["east", "west", "refrigerator"]),
]


def evaluate(served: Served, directory: Path, task: dict[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run one task; its samples in order."""
    program = installed("lm-eval", "lm_eval")
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fixed = {"task": "ours", "dataset_path": "json", "test_split": "test", "metadata": {"version": 1}}
    fixed["dataset_kwargs"] = {"data_files": {"test": str(directory / "rows.jsonl")}}
    (directory / "ours.yaml").write_text(yaml.safe_dump({**fixed, **task}))
    arguments = {
        "model": served.model,
        "base_url": f"{served.url}/v1/completions",
        "tokenizer": served.directory,
        "tokenizer_backend": "huggingface",
        "tokenized_requests": True,
        "num_concurrent": 2,
        "max_retries": 1,
        "max_length": 2048,
    }
    command = [program, "run", "--model", "local-completions", "--tasks", "ours", "--include_path", str(directory)]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())]
    command += ["--batch_size", "4", "--log_samples", "--output_path", str(directory / "out")]
    run(command, directory)
    (samples,) = (directory / "out").rglob("samples_ours_*.jsonl")
    found = [json.loads(line) for line in samples.read_text().splitlines()]
    return sorted(found, key=lambda sample: sample["doc_id"])


@pytest.fixture(scope="module")
def reference(served: Served) -> Any:
    """transformers' model and tokenizer, in float32 as the server's."""
    model = AutoModelForCausalLM.from_pretrained(served.directory, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(served.directory)


def loglikelihood(reference: Any, context: str, continuation: str) -> tuple[float, bool]:
    """log p(continuation | context), and whether it is the greedy one."""
    model, tokenizer = reference
    whole, start = tokenizer(context + continuation).input_ids, len(tokenizer(context).input_ids)
    with torch.inference_mode():
        law = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    wanted = torch.tensor(whole[start:])
    rows = law[start - 1 : -1]
    return float(rows.gather(1, wanted[:, None]).sum()), bool((rows.argmax(-1) == wanted).all())


def test_loglikelihood_is_transformers(served: Served, reference: Any, tmp_path: Path) -> None:
    task = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    rows = [{"question": question, "choices": choices, "answer": 0} for question, choices in QUESTIONS]
    samples = evaluate(served, tmp_path, task, rows)
    assert len(samples) == len(QUESTIONS)
    flags = set()
    for sample, (question, choices) in zip(samples, QUESTIONS, strict=True):
        for response, choice in zip(sample["filtered_resps"], choices, strict=True):
            expected, is_greedy = loglikelihood(reference, question, " " + choice)
            assert float(response[0]) == pytest.approx(expected, abs=1e-3), (question, choice)
            assert str(response[1]) == str(is_greedy), (question, choice)
            flags.add(is_greedy)
    assert flags == {True, False}


def test_generation_is_transformers(served: Served, reference: Any, tmp_path: Path) -> None:
    task = {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 12, "temperature": 0.0, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    samples = evaluate(served, tmp_path, task, [{"question": question, "answer": ""} for question, _ in QUESTIONS])
    model, tokenizer = reference
    for sample, (question, _) in zip(samples, QUESTIONS, strict=True):
        ids = tokenizer(question, return_tensors="pt").input_ids
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        text = tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
        assert sample["resps"][0][0] == text.split("\n\n")[0], question
