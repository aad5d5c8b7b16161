"""An engine with the real one's front door and no model: what it says is written in the prompt.

    say TEXT      TEXT, then end of sequence      forever     "x " until max_tokens
    fail N        N tokens, then an error         nothing     end of sequence at once

In a chat the last message is the prompt; "show" says what the chat template was given, "refuse" makes it refuse.
Every step but a choice's first is told as one that verified a draft of two tokens.

`run_child` serves it in a process of its own, for tests that send signals.
"""

import asyncio
import itertools
import os
import socket
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from time import monotonic

import uvloop
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dspark_server.api import ServerSettings, serve
from dspark_server.engine.logprobs import TokenLogprob
from dspark_server.engine.request import FinishReason, SamplingParams
from dspark_server.engine.stats import EngineStats
from dspark_server.engine.thread import TokenEvent
from dspark_server.errors import CapacityError, EngineDeadError, RequestError

EOS = 256

CHAT_TEMPLATE = """
{%- set last = messages[-1].content %}
{%- if last == "show" %}
    {{- "say " ~ {"messages": messages, "tools": tools, "open": add_generation_prompt, "mood": mood} | tojson }}
{%- elif last == "refuse" %}
    {{- raise_exception("Roles must alternate.") }}
{%- else %}
    {{- last }}
{%- endif %}
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: an emoji is four tokens."""
    vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def build_sentencepiece() -> PreTrainedTokenizerFast:
    """A tokenizer in the manner of Llama 2: words with their space, bytes for all else, <s> before a prompt."""
    words = ["▁", "▁say", "▁the", "▁cat", "s", "▁sat", "▁▁", "<s>"]
    vocabulary = {
        entry: token for token, entry in enumerate([*(f"<0x{byte:02X}>" for byte in range(256)), "</s>", *words])
    }
    letters = sorted({letter for word in words[:-1] for letter in word} - vocabulary.keys())
    vocabulary |= {letter: len(vocabulary) + number for number, letter in enumerate(letters)}
    merges = [("▁", "▁")]
    for word in ("say", "the", "cat", "sat"):
        for length in range(1, len(word)):
            merges.append((word[:length], word[length]))
            vocabulary.setdefault(word[: length + 1], len(vocabulary))
        merges.append(("▁", word))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(strip)
    tokenizer.add_special_tokens([AddedToken("</s>", special=True), AddedToken("<s>", special=True)])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", vocabulary["<s>"])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@dataclass(eq=False)
class FakeHandle:
    """A choice in the fake engine."""

    prompt: list[int]
    params: SamplingParams
    script: list[int]
    on_tokens: object
    fails: bool = False
    sent: int = 0
    submitted: float = field(default_factory=monotonic)
    finished: bool = False
    tenant: str = ""


@dataclass(eq=False)
class FakeReservation:
    """Places taken."""

    engine: "FakeEngine"
    places: int

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.engine.in_flight -= self.places


class FakeEngine:
    """See the module. `per_step` tokens of every running choice each `step_seconds`."""

    def __init__(
        self,
        *,
        capacity: int = 64,
        per_step: int = 1,
        step_seconds: float = 0.002,
        chat_template: str | None = CHAT_TEMPLATE,
        tokenizer: PreTrainedTokenizerFast | None = None,
    ) -> None:
        self.model_name = "fake"
        self.max_model_len = 2048
        self.backend = self.speculation = "none"
        self.cache_info = {"block_size": "16", "num_gpu_blocks": "100"}
        self.max_num_seqs = 64
        self.drafter = self.costs = None
        self.gamma = 2
        self.policies = ("none",)
        self.selection = "none"
        self.tokenizer = tokenizer or build_tokenizer()
        self.vocab_size = len(self.tokenizer)
        self.sampling_defaults: dict[str, float | int] = {}
        self.tokenizer.chat_template = chat_template
        self.stats = EngineStats(accepted_per_position=[3, 1])
        self.capacity = capacity
        self.per_step = per_step
        self.step_seconds = step_seconds
        self.in_flight = 0
        self.state = "ready"
        self.failure = None
        self.running: list[FakeHandle] = []
        self.submitted: list[FakeHandle] = []
        self.encoded = 0
        self.aborted = 0

    async def start(self) -> None:
        self._task = asyncio.create_task(self._steps())

    async def stop(self) -> None:
        self._task.cancel()

    def health(self) -> str:
        return self.state

    def begin_drain(self) -> None:
        self.state = "draining"

    async def wait_idle(self, timeout: float) -> bool:
        end = asyncio.get_running_loop().time() + timeout
        while self.in_flight and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.01)
        return self.in_flight == 0

    def select(self, policy: str) -> None:
        self.selection = policy

    def watch(self, trace: object) -> None:
        """Its steps have nothing to show."""

    def fail_all(self, message: str) -> None:
        for handle in list(self.running):
            self._finish(handle, TokenEvent([], FinishReason.ERROR, error=message))

    def reserve(self, choices: int = 1, tokens: int = 0) -> FakeReservation:
        if self.state == "dead":
            raise EngineDeadError("The engine has stopped.")
        if self.state == "draining":
            raise CapacityError("The server is shutting down.", retry_after=5)
        if choices > self.capacity:
            raise RequestError("More choices than the server holds.", param="n")
        if self.in_flight + choices > self.capacity:
            raise CapacityError("The queue is full.", retry_after=1)
        self.in_flight += choices
        return FakeReservation(self, choices)

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        self.encoded += 1
        return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens=add_special_tokens)

    def room(self, prompt_length: int) -> int:
        return self.max_model_len - prompt_length

    def submit(
        self, prompt, params, *, reservation, request_id, on_tokens, choice=0, cache_salt="", leader=None, tenant=""
    ):
        if len(prompt) + params.max_tokens > self.max_model_len:
            message = f"maximum context length is {self.max_model_len}, the prompt has {len(prompt)}"
            param = "max_tokens" if len(prompt) < self.max_model_len else "prompt"
            raise RequestError(message, param=param, code="context_length_exceeded")
        word, _, rest = self.tokenizer.decode(prompt, skip_special_tokens=True).partition(" ")
        encode = partial(self.tokenizer.encode, add_special_tokens=False)
        forever = list(itertools.islice(itertools.cycle(encode("x ")), params.max_tokens))
        script = [*encode(rest), EOS] if word == "say" else [EOS] if word == "nothing" else forever
        if word == "fail":
            script = forever[: int(rest)]
        handle = FakeHandle(prompt, params, script, on_tokens, fails=word == "fail", tenant=tenant)
        reservation.places -= 1
        self.running.append(handle)
        self.submitted.append(handle)
        self.stats.prompt_tokens += len(prompt)
        self.stats.queue_times.append(0.001)
        return handle

    def abort(self, handle: FakeHandle) -> None:
        if not handle.finished:
            self.aborted += 1
            self._finish(handle, TokenEvent([], FinishReason.ABORT))

    def _finish(self, handle: FakeHandle, event: TokenEvent) -> None:
        handle.finished = True
        self.running.remove(handle)
        self.in_flight -= 1
        handle.on_tokens(event)

    async def _steps(self) -> None:
        while True:
            await asyncio.sleep(self.step_seconds)
            self.stats.running = len(self.running)
            for handle in list(self.running):
                if not handle.finished:
                    self._step(handle)

    def _step(self, handle: FakeHandle) -> None:
        if handle.fails and handle.sent == len(handle.script):
            self._finish(handle, TokenEvent([], FinishReason.ERROR, error="The engine failed while running this."))
            return
        room = min(self.per_step, handle.params.max_tokens - handle.sent)
        tokens = handle.script[handle.sent : handle.sent + room]
        drafted = 2 if handle.sent else 0
        extra = {
            "cached_tokens": 2,
            "admitted": handle.submitted,
            "drafted": drafted,
            "accepted": max(0, min(drafted, len(tokens) - 1)),
            **logprobs_of(handle, tokens),
        }
        handle.sent += len(tokens)
        self.stats.generation_tokens += len(tokens)
        self.stats.iteration_tokens.append(len(tokens))
        stops = handle.params.stop_token_ids | (frozenset() if handle.params.ignore_eos else {EOS})
        stop = next((token for token in tokens if token in stops), None)
        if stop is not None:
            tokens = tokens[: tokens.index(stop) + 1]
            self._finish(handle, TokenEvent(tokens, FinishReason.STOP, stop, **extra))
        elif handle.sent == handle.params.max_tokens or (handle.sent == len(handle.script) and not handle.fails):
            self._finish(handle, TokenEvent(tokens, FinishReason.LENGTH, **extra))
        else:
            handle.on_tokens(TokenEvent(tokens, **extra))


def logprobs_of(handle: FakeHandle, tokens: list[int]) -> dict[str, object]:
    """Every token has -0.5 and rank 1; the alternatives are 0, 1, 2, ... with -1, -2, -3, ..."""

    def described(token: int, count: int) -> TokenLogprob:
        return TokenLogprob(token, -0.5, 1, [(token, -0.5), *((other, -1.0 - other) for other in range(20))][:count])

    params, found = handle.params, {}
    if params.logprobs is not None:
        found["logprobs"] = [described(token, params.logprobs) for token in tokens]
    if params.prompt_logprobs is not None and handle.sent == 0:
        rest = [described(token, params.prompt_logprobs) for token in handle.prompt[1:]]
        found["prompt_logprobs"] = [None, *rest]
    return found


def run_child(port: Connection, log: str, shutdown_timeout: float, step_seconds: float) -> None:
    """Main of a server process: sends its port, logs to a file, serves until SIGTERM."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    listener = socket.create_server(("127.0.0.1", 0))
    port.send(listener.getsockname()[1])
    engine = FakeEngine(step_seconds=step_seconds)
    uvloop.run(serve(lambda: engine, ServerSettings(shutdown_timeout=shutdown_timeout), sockets=[listener]))
