"""`dspark-server data`: answers sampled by the target itself, to train its drafter on.

Every job is one sequence: a user turn, given or completed by the target from the chat template's user prefix, and the
target's answer. Finished jobs are appended to a log beside the output, so that an interrupted run can continue; the
output is written once all are finished, in the order of the jobs.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dspark_server.config import EngineConfig
from dspark_server.engine.core import EngineCore, load_tokenizer
from dspark_server.engine.request import FinishReason, Request, SamplingParams
from dspark_server.errors import ConfigError
from dspark_server.models.hub import resolve_model

_MARK = "USER-TURN-GOES-HERE"


@dataclass(frozen=True)
class DataConfig:
    """Settings of the sampling. Files are JSON lines of {"prompt", "domain"} and {"starter", "domain"}.

    `samples` answers per prompt, `starters_count` turns per starter, `self_count` turns from the bare template (domain
    "self"). Each answer's temperature is drawn from `temperatures` with `temperature_weights` (None: evenly); user
    turns are sampled at 1. Turns equal to a prompt in `exclude` are dropped.
    """

    output: Path
    model: str = "SmolLM2-135M-Instruct"
    prompts: tuple[Path, ...] = ()
    samples: int = 1
    starters: tuple[Path, ...] = ()
    starters_count: int = 1
    self_count: int = 0
    exclude: tuple[Path, ...] = ()
    temperatures: tuple[float, ...] = (1.0, 0.7, 0.0)
    temperature_weights: tuple[float, ...] | None = None
    max_tokens: int = 384
    max_turn_tokens: int = 128
    concurrency: int = 64
    seed: int = 0
    dtype: str = "auto"
    kv_cache_memory_bytes: int = 2 << 30

    def __post_init__(self) -> None:
        for name in ("samples", "starters_count", "max_tokens", "max_turn_tokens", "concurrency"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1.")
        if not self.temperatures or min(self.temperatures) < 0:
            raise ConfigError("temperatures must be one or more numbers of at least 0.")
        weights = self.temperature_weights
        if weights is not None and (len(weights) != len(self.temperatures) or min(weights) < 0 or not sum(weights)):
            raise ConfigError("temperature_weights needs one weight of at least 0 per temperature, not all 0.")
        if self.output.suffix != ".npz":
            raise ConfigError(f"the output is an .npz file, not {self.output}.")

    @property
    def log(self) -> Path:
        """The log that keeps finished jobs until all are finished."""
        return self.output.with_suffix(".partial.jsonl")


@dataclass(frozen=True)
class Job:
    """One sequence: `opening` is the user turn, or its beginning where it is not `whole`."""

    domain: str
    opening: str
    whole: bool
    temperature: float


def plan(run: DataConfig) -> list[Job]:
    """Every job of the run, in order. Raises ConfigError if there are none or a file cannot be read."""
    openings = [(text, domain, True) for text, domain in _read(run.prompts, "prompt") for _ in range(run.samples)]
    openings += [
        (text, domain, False) for text, domain in _read(run.starters, "starter") for _ in range(run.starters_count)
    ]
    openings += [("", "self", False)] * run.self_count
    if not openings:
        raise ConfigError("there is nothing to sample: give --prompts, --starters or --self.")
    weights = np.array(run.temperature_weights or [1.0] * len(run.temperatures))
    drawn = np.random.default_rng(run.seed).choice(run.temperatures, len(openings), p=weights / weights.sum())
    return [
        Job(domain, text, whole, float(temperature))
        for (text, domain, whole), temperature in zip(openings, drawn, strict=True)
    ]


def make_data(run: DataConfig, console: Console | None = None) -> Path:
    """Sample every job that is not in the log yet, write the corpus, print a summary; returns its path.

    Raises ConfigError if the output exists, a source is unusable, or the log is another run's.
    """
    if run.output.exists():
        raise ConfigError(f"{run.output} exists already: name another output, or remove it to sample anew.")
    jobs = plan(run)
    directory = resolve_model(run.model)
    tokenizer = load_tokenizer(directory)
    turns = Turns(tokenizer, {_plain(text) for text, _ in _read(run.exclude, "prompt")})
    run.output.parent.mkdir(parents=True, exist_ok=True)
    identity = repr(sorted((k, str(v)) for k, v in asdict(run).items() if k not in ("output", "concurrency")))
    records = _resume(run.log, identity)
    began, before = time.monotonic(), len(records)
    if len(records) < len(jobs):
        sampler = Sampler(run, jobs, turns)
        with run.log.open("a") as file, tqdm(total=len(jobs), initial=before, unit="sequence") as bar:
            for record in sampler.records(records.keys()):
                file.write(json.dumps(record) + "\n")
                file.flush()
                records[record["job"]] = record
                bar.update()
                bar.set_postfix(tok_s=f"{sampler.tokens / (time.monotonic() - began):.0f}")
    _write(run.output, [records[index] for index in range(len(jobs))], jobs)
    run.log.unlink()
    _summary([records[index] for index in range(len(jobs))], jobs, console or Console(stderr=True))
    return run.output


class Turns:
    """Token ids around a user turn, as the chat template writes them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, excluded: set[str]) -> None:
        if tokenizer.chat_template is None:
            raise ConfigError("the model has no chat template, and user turns cannot be told from answers without one.")
        turn = [{"role": "user", "content": _MARK}]
        text = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
        self._before, found, self._after = text.partition(_MARK)
        if not found:
            raise ConfigError("the model's chat template does not hand on the user's text as it stands.")
        self.tokenizer = tokenizer
        self._excluded = excluded

    def opened(self, text: str) -> list[int]:
        """The prompt that ends inside the user turn, after `text`."""
        return list(self.tokenizer(self._before + text, add_special_tokens=False).input_ids)

    def asked(self, text: str) -> list[int]:
        """The prompt that ends where the answer begins."""
        return list(self.tokenizer(self._before + text + self._after, add_special_tokens=False).input_ids)

    def closed(self, opened: list[int], turn: list[int]) -> list[int]:
        """The same for a turn completed by the target: its own tokens are kept."""
        return [*opened, *turn, *self.tokenizer(self._after, add_special_tokens=False).input_ids]

    def refused(self, text: str) -> str | None:
        """The reason why a user turn must not be used, or None."""
        plain = _plain(text)
        if not plain:
            return "empty turn"
        if plain in self._excluded:
            return "excluded prompt"
        return None

    def text(self, opening: str, turn: list[int]) -> str:
        """The whole user turn."""
        return opening + str(self.tokenizer.decode(turn, skip_special_tokens=True))


class Sampler:
    """Runs jobs through the engine, `concurrency` at once. Requests have seeds, so a job's tokens do not depend on
    others.
    """

    def __init__(self, run: DataConfig, jobs: list[Job], turns: Turns) -> None:
        self._run, self._jobs, self._turns = run, jobs, turns
        config = EngineConfig(
            model=run.model,
            dtype=run.dtype,
            max_num_seqs=run.concurrency,
            max_num_batched_tokens=max(256, 2 * run.concurrency),
            kv_cache_memory_bytes=run.kv_cache_memory_bytes,
        )
        self._core = EngineCore.load(config)
        self._serving: dict[Request, int] = {}
        self.tokens = 0

    def records(self, done: Any) -> Iterator[dict[str, Any]]:
        """One record per job that is not in `done`, in the order in which they end."""
        waiting = iter([index for index in range(len(self._jobs)) if index not in done])
        exhausted = False
        while True:
            while not exhausted and len(self._serving) < 2 * self._run.concurrency:
                index = next(waiting, None)
                if index is None:
                    exhausted = True
                elif (record := self._start(index)) is not None:
                    yield record
            if not self._serving:
                return
            for output in self._core.loop.step():
                self.tokens += len(output.tokens)
                if output.request.finish_reason is not None:
                    record = self._ended(output.request)
                    if record is not None:
                        yield record

    def _start(self, index: int) -> dict[str, Any] | None:
        job = self._jobs[index]
        if not job.whole:
            turn = SamplingParams(max_tokens=self._run.max_turn_tokens, temperature=1.0, seed=self._seed(index, 0))
            return self._submit(index, self._turns.opened(job.opening), turn, phase=0)
        reason = self._turns.refused(job.opening)
        return _dropped(index, reason) if reason else self._answer(index, self._turns.asked(job.opening))

    def _answer(self, index: int, prompt: list[int]) -> dict[str, Any] | None:
        temperature = self._jobs[index].temperature
        seed = self._seed(index, 1)
        params = SamplingParams(max_tokens=self._run.max_tokens, temperature=temperature, seed=seed)
        return self._submit(index, prompt, params, phase=1)

    def _submit(self, index: int, prompt: list[int], params: SamplingParams, phase: int) -> dict[str, Any] | None:
        if len(prompt) + params.max_tokens > self._core.max_model_len:
            return _dropped(index, "prompt too long")
        request = self._core.new_request(prompt, params, nonce=index, choice=phase)
        self._core.batcher.check_fits(request.prompt_length, params.max_tokens)
        self._serving[request] = index
        self._core.batcher.add(request)
        return None

    def _ended(self, request: Request) -> dict[str, Any] | None:
        index = self._serving.pop(request)
        if request.finish_reason not in (FinishReason.STOP, FinishReason.LENGTH):
            return _dropped(index, request.error or "aborted")
        if request.choice == 1:
            prompt = request.tokens[: request.prompt_length]
            return {"job": index, "prompt": prompt, "answer": request.output}
        stopped = request.finish_reason is FinishReason.STOP
        turn = request.output[:-1] if stopped else request.output
        reason = self._turns.refused(self._turns.text(self._jobs[index].opening, turn))
        if reason:
            return _dropped(index, reason)
        return self._answer(index, self._turns.closed(request.tokens[: request.prompt_length], turn))

    def _seed(self, index: int, phase: int) -> int:
        return int(np.random.default_rng([self._run.seed, index, phase]).integers(1 << 31))


def _dropped(index: int, reason: str) -> dict[str, Any]:
    return {"job": index, "dropped": reason}


def _read(paths: tuple[Path, ...], key: str) -> list[tuple[str, str]]:
    """(text, domain) of every line; the domain defaults to the file's name."""
    found = []
    for path in paths:
        try:
            lines = path.read_text().splitlines()
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error}") from None
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                fields: Any = json.loads(line)
                found.append((str(fields[key]), str(fields.get("domain", path.stem))))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ConfigError(f'{path}, line {number}: expected a JSON object with "{key}".') from None
    return found


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _resume(log: Path, identity: str) -> dict[int, dict[str, Any]]:
    """Jobs finished by an earlier run of the same settings; a line torn by a kill is cut off. Starts the log if new."""
    records: dict[int, dict[str, Any]] = {}
    whole = 0
    if log.exists():
        with log.open("rb") as file:
            for number, line in enumerate(file):
                try:
                    record = json.loads(line)
                except ValueError:
                    break
                if not line.endswith(b"\n"):
                    break
                if number == 0 and record != {"run": identity}:
                    raise ConfigError(f"{log} is of a run with other settings: repeat those, or remove it.")
                if number:
                    records[record["job"]] = record
                whole += len(line)
        os.truncate(log, whole)
    if not whole:
        log.write_text(json.dumps({"run": identity}) + "\n")
    return records


def _write(output: Path, records: list[dict[str, Any]], jobs: list[Job]) -> None:
    """tokens, length, prompt_length, temperature, domain (an index of `domains`), in the order of the jobs."""
    kept = [record for record in records if "answer" in record]
    if not kept:
        raise ConfigError("every job was dropped: nothing to write.")
    sequences = [record["prompt"] + record["answer"] for record in kept]
    tokens = np.concatenate([np.array(sequence) for sequence in sequences])
    domains = sorted({job.domain for job in jobs})
    partial = output.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez_compressed(
            file,
            tokens=tokens.astype(np.uint16 if tokens.max() < 1 << 16 else np.uint32),
            length=np.array([len(sequence) for sequence in sequences], np.int32),
            prompt_length=np.array([len(record["prompt"]) for record in kept], np.int32),
            temperature=np.array([jobs[record["job"]].temperature for record in kept], np.float32),
            domain=np.array([domains.index(jobs[record["job"]].domain) for record in kept], np.uint8),
            domains=np.array(domains),
        )
    os.replace(partial, output)


def _summary(records: list[dict[str, Any]], jobs: list[Job], console: Console) -> None:
    table = Table("domain", "sequences", "answer tokens", "mean", title="sampled by the target")
    for domain in sorted({job.domain for job in jobs}):
        lengths = [len(r["answer"]) for r in records if "answer" in r and jobs[r["job"]].domain == domain]
        table.add_row(domain, str(len(lengths)), str(sum(lengths)), f"{np.mean(lengths) if lengths else 0:.0f}")
    console.print(table)
    for reason, count in Counter(record["dropped"] for record in records if "dropped" in record).items():
        console.print(f"dropped {count}: {reason}")
