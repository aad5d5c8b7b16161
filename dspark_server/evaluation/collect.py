"""Run prompts through the engine with whole blocks verified, and keep what became of every block."""

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from dspark_server.config import EngineConfig, SpeculativeConfig
from dspark_server.engine.core import EngineCore, load_tokenizer
from dspark_server.engine.request import SamplingParams
from dspark_server.engine.step import StepTrace
from dspark_server.errors import ConfigError
from dspark_server.models.hub import resolve_model

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Prompt:
    """A user turn and the domain it counts for."""

    text: str
    domain: str


def read_prompts(paths: Iterable[Path], limit: int | None = None) -> list[Prompt]:
    """JSON lines with "prompt" and perhaps "domain" (default: the file's name), `limit` of each file.

    Raises ConfigError that names the file and line.
    """
    prompts = []
    for path in paths:
        try:
            lines = path.read_text().splitlines()
        except OSError as error:
            raise ConfigError(f"cannot read prompts: {error}") from None
        for number, line in enumerate(filter(str.strip, lines[:limit]), 1):
            try:
                fields: Any = json.loads(line)
                prompts.append(Prompt(str(fields["prompt"]), str(fields.get("domain", path.stem))))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ConfigError(f'{path}, line {number}: expected a JSON object with "prompt".') from None
    if not prompts:
        raise ConfigError("There are no prompts: give files of JSON lines with a prompt in each.")
    return prompts


def chat_tokens(prompts: Sequence[Prompt], model: str, *, raw: bool = False) -> list[list[int]]:
    """Token ids of each prompt as a user turn of the chat template; as it stands if `raw`, or where there is none."""
    tokenizer = load_tokenizer(resolve_model(model))
    if raw or tokenizer.chat_template is None:
        return [list(tokenizer(prompt.text).input_ids) for prompt in prompts]
    turns = [[{"role": "user", "content": prompt.text}] for prompt in prompts]
    texts = [str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)) for turn in turns]
    return [list(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]


@dataclass(frozen=True)
class Blocks:
    """N draft blocks that were verified whole.

    group [N]: whose (an index the caller gave each prompt); confidence [N, gamma]: logits of c_k, NaN without a
    confidence head; survival [N, gamma]: a_k as the engine used it; accepted [N]: draft tokens that stood; judged [N]:
    slots whose fate means something (all, but where the request ended inside the block); committed [N]: tokens the
    cycle gave, the bonus token included.
    """

    group: Integers
    confidence: Floats
    survival: Floats
    accepted: Integers
    judged: Integers
    committed: Integers

    def of(self, chosen: npt.NDArray[np.bool_]) -> "Blocks":
        """The blocks where `chosen` [N] holds."""
        return Blocks(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))

    @property
    def gamma(self) -> int:
        """Draft tokens per block."""
        return int(self.confidence.shape[1])


class Recorder:
    """A StepLoop trace that keeps the blocks. Blocks cut short by max_tokens are left out: they tell less."""

    def __init__(self, gamma: int) -> None:
        self._gamma = gamma
        self._groups: list[int] = []
        self._rows: list[tuple[list[float], list[float]]] = []
        self._fates: list[tuple[int, int, int]] = []

    def __call__(self, step: StepTrace) -> None:
        if step.drafted is None:
            return
        block = step.drafted.block
        counts = dict(zip(step.verified.requests, step.accepted.count.tolist(), strict=True))
        survival = step.drafted.survival.tolist()
        confidence = survival if block.confidence is None else block.confidence.tolist()
        for row, request in enumerate(step.drafted.requests):
            if step.drafted.lengths[row] < self._gamma:
                continue
            accepted = counts[request]
            tokens = block.tokens[row, :accepted].tolist()
            ends = next((place for place, token in enumerate(tokens, 1) if token in request.stop_ids), None)
            self._groups.append(request.choice)
            self._rows.append(([float("nan")] * self._gamma if block.confidence is None else confidence[row],
                               survival[row]))  # fmt: skip
            self._fates.append((accepted, self._gamma, accepted + 1) if ends is None else (ends, ends, ends))

    def blocks(self) -> Blocks:
        """What was seen so far."""
        rows = np.array(self._rows, dtype=np.float64).reshape(len(self._rows), 2, self._gamma)
        fates = np.array(self._fates, dtype=np.int64).reshape(len(self._fates), 3)
        groups = np.array(self._groups, dtype=np.int64)
        return Blocks(groups, rows[:, 0], rows[:, 1], fates[:, 0], fates[:, 1], fates[:, 2])


@dataclass(frozen=True)
class Collected:
    """Blocks, output tokens and seconds of one run."""

    blocks: Blocks
    tokens: int
    seconds: float


def collect(
    prompts: Sequence[list[int]],
    params: Sequence[SamplingParams],
    *,
    model: str,
    speculative: SpeculativeConfig,
    concurrency: int = 16,
    groups: Sequence[int] | None = None,
    label: str = "",
    kv_cache_memory_bytes: int = 1 << 30,
) -> Collected:
    """Run every prompt to its end, `concurrency` at once, every draft verified whole. Progress goes to stderr."""
    config = EngineConfig(
        model=model,
        speculative=speculative,
        max_num_seqs=concurrency,
        max_num_batched_tokens=max(256, concurrency * 9),
        kv_cache_memory_bytes=kv_cache_memory_bytes,
    )
    recorder: Recorder | None = None

    def look(step: StepTrace) -> None:
        if recorder is not None:
            recorder(step)

    core = EngineCore.load(config, trace=look)
    recorder = Recorder(core.loop.executor.gamma)
    whose = groups if groups is not None else [0] * len(prompts)
    requests = [
        # The choice index tells requests apart in the noise, and here whose they are.
        core.new_request(prompt, own, nonce=index, choice=group)
        for index, (prompt, own, group) in enumerate(zip(prompts, params, whose, strict=True))
    ]
    for request in requests:
        core.batcher.check_fits(request.prompt_length, request.params.max_tokens)
        core.batcher.add(request)
    began = time.monotonic()
    with tqdm(total=len(requests), unit="request", desc=label or None, disable=not label) as bar:
        while core.loop.has_work:
            bar.update(sum(output.request.finish_reason is not None for output in core.loop.step()))
    seconds = time.monotonic() - began
    return Collected(recorder.blocks(), sum(len(request.output) for request in requests), seconds)
