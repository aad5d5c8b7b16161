"""Run prompts through the engine with whole blocks verified, and keep the outcome of every block."""

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
from dspark_server.engine.trace import StepTrace
from dspark_server.errors import ConfigError
from dspark_server.models.hub import resolve_model
from dspark_server.speculation.draft_block import Source

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Prompt:
    """A user turn and its domain."""

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
    """Token ids of each prompt as a user turn of the chat template; of the bare text if `raw` or without a template."""
    tokenizer = load_tokenizer(resolve_model(model))
    if raw or tokenizer.chat_template is None:
        return [list(tokenizer(prompt.text).input_ids) for prompt in prompts]
    turns = [[{"role": "user", "content": prompt.text}] for prompt in prompts]
    texts = [str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)) for turn in turns]
    return [list(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]


@dataclass(frozen=True)
class Blocks:
    """N draft blocks that were verified whole.

    group [N]: an index that the caller gave each prompt; confidence [N, gamma]: logits of c_k, NaN without a confidence
    head; survival [N, gamma]: a_k before outcomes correct it; accepted [N]: accepted draft tokens; judged [N]: slots
    whose outcome counts (all drafted ones, unless the request ended inside the block); committed [N]: tokens that the
    cycle gave, the bonus token included. alone [N]: the block was copied from the context; match [N, gamma]: length of
    the match that biased the slot or was copied, 0 without one; odds [N, gamma]: log odds of the matched token before
    the bias; repeated [N, gamma]: 1 if the text went on with that token, 0 if not, NaN where that was not seen.
    """

    group: Integers
    confidence: Floats
    survival: Floats
    accepted: Integers
    judged: Integers
    committed: Integers
    alone: npt.NDArray[np.bool_]
    match: Integers
    odds: Floats
    repeated: Floats

    def of(self, chosen: npt.NDArray[np.bool_]) -> "Blocks":
        """The blocks where `chosen` [N] holds."""
        return Blocks(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))

    @property
    def gamma(self) -> int:
        """Draft tokens per block."""
        return int(self.confidence.shape[1])


class Recorder:
    """A StepLoop trace that keeps the blocks. Blocks cut short by max_tokens are left out, as they tell less."""

    def __init__(self, gamma: int) -> None:
        self._gamma = gamma
        self._rows: list[tuple[Any, ...]] = []

    def __call__(self, step: StepTrace) -> None:
        block = step.block
        if block is None:
            return
        assert block.stated is not None
        fates = zip(step.accepted.count.tolist(), step.accepted.token.tolist(), strict=True)
        fate = dict(zip(step.verified.requests, fates, strict=True))
        survival, usable = block.stated.numpy(), block.usable.tolist()
        for row, (request, asked) in enumerate(zip(step.drafting, block.requests, strict=True)):
            if block.lengths[row] < usable[row]:
                continue
            accepted, last = fate[request]
            tokens = block.tokens[row, :accepted].tolist()
            ends = next((place for place, token in enumerate(tokens, 1) if token in request.stop_ids), None)
            accepted, judged, committed = (accepted, usable[row], accepted + 1) if ends is None else (ends, ends, ends)
            alone = asked.source is Source.COPY
            confidence, match, odds, repeated = (self._row(fill) for fill in (np.nan, 0.0, 0.0, np.nan))
            if block.confidence is not None and not alone:
                confidence[: block.confidence.shape[1]] = block.confidence[row].numpy()
            if alone and asked.match is not None:
                match = asked.match.length + np.arange(self._gamma, dtype=np.float64)
            elif block.copies is not None:
                on = block.copies.on[row].numpy()
                slots = np.arange(len(on))
                match[slots] = on * (int(block.copies.length[row]) + slots)
                odds[slots] = block.copies.odds[row].numpy()
                seen = np.array([*tokens, last][: len(on)])
                copied = block.copies.tokens[row, : len(seen)].numpy()
                repeated[: len(seen)] = np.where(on[: len(seen)], seen == copied, np.nan)
            self._rows.append((request.choice, confidence, survival[row], accepted, judged, committed,
                               alone, match, odds, repeated))  # fmt: skip

    def _row(self, fill: float) -> Floats:
        return np.full(self._gamma, fill)

    def blocks(self) -> Blocks:
        """The blocks recorded so far."""
        kinds = (np.int64, np.float64, np.float64, np.int64, np.int64, np.int64, np.bool_, np.int64, np.float64,
                 np.float64)  # fmt: skip
        columns = list(zip(*self._rows, strict=True)) or [()] * len(kinds)
        wide = (1, 2, 7, 8, 9)
        shapes = [
            (len(self._rows), self._gamma) if place in wide else (len(self._rows),) for place in range(len(kinds))
        ]
        made: list[Any] = [
            np.array(column, dtype=kind).reshape(shape)
            for column, kind, shape in zip(columns, kinds, shapes, strict=True)
        ]
        return Blocks(*made)


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
        # The choice index tells requests apart in the noise, and here it names the prompt.
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
