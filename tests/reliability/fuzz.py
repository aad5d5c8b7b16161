"""Fuzzers of what reads foreign bytes: request parser, stop matcher with detokenizer, checkpoint loader.

    python -m tests.reliability.fuzz [parser|text|checkpoint ...] [--seconds 30]

With atheris installed (Linux, CPython with a wheel) inputs are guided by coverage; without it, hypothesis makes them.
An input that breaks a property is printed and the exit code is 1.
"""

import argparse
import contextlib
import json
import logging
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from dspark_server.errors import CheckpointError, RequestError

TARGETS = ("parser", "text", "checkpoint")


def parser() -> Callable[[bytes], None]:
    """Any body gives a request or a RequestError whose message is short and is not the body."""
    from dspark_server.api.chat_schema import ChatRequest
    from dspark_server.api.prompts import prompts_of
    from dspark_server.api.schema import CompletionRequest, parse

    logging.disable()

    def check(data: bytes) -> None:
        for kind in (CompletionRequest, ChatRequest):
            refusal = None
            try:
                body = parse(data, kind)
                if isinstance(body, CompletionRequest):
                    prompts_of(body, vocab_size=257, max_model_len=64)
                params = body.sampling(8)
                assert params.max_tokens >= 0 and params.temperature >= 0 and 0 < params.top_p <= 1
            except RequestError as error:
                refusal = error
            assert refusal is None or (400 <= refusal.status < 500 and len(str(refusal)) < 2000)

    return check


def text() -> Callable[[bytes], None]:
    """Tokens in any pieces give the text of the whole, up to the first stop string, and nothing behind it."""
    from dspark_server.engine.output import Detokenizer, StopMatcher
    from tests.api.fake_engine import EOS, build_tokenizer

    detokenizer = Detokenizer(build_tokenizer())
    token_of = {detokenizer.bytes_of(token)[0]: token for token in range(EOS)}

    def check(data: bytes) -> None:
        if len(data) < 4:
            return
        step, length, count = 1 + data[0] % 7, 1 + data[1] % 4, data[2] % 3
        body = data[3:]
        stops = [body[i * length : (i + 1) * length].decode(errors="ignore") for i in range(count)]
        stops = [stop for stop in stops if stop]
        tokens = [*(token_of[byte] for byte in body[count * length :]), EOS]
        stream = detokenizer.stream([], StopMatcher(stops) if stops else None)
        said = ""
        for start in range(0, len(tokens), step):
            said += stream.push(tokens[start : start + step])
            if stream.stopped is not None:
                break
        said += stream.finish()
        whole = detokenizer.decode(tokens)
        ends = {whole.find(stop) + len(stop) for stop in stops if stop in whole}
        if not ends:
            assert stream.stopped is None and said == whole
            return
        end = min(ends)
        first = max((stop for stop in stops if whole[:end].endswith(stop)), key=len)
        assert (stream.stopped, said) == (first, whole[: end - len(first)]), (stops, whole)

    return check


def checkpoint() -> Callable[[bytes], None]:
    """Any file is read or refused with a CheckpointError; nothing else, and no memory beyond the file's size."""
    import torch

    from dspark_server.models.loading import WeightReader, open_checkpoint

    directory = Path(tempfile.mkdtemp())
    (directory / "config.json").write_text("{}")

    def check(data: bytes) -> None:
        # Most random bytes fail at the length of the header: every other input has a right one.
        content = struct.pack("<Q", len(data) // 2) + data if data[:1] < b"\x80" else data
        (directory / "model.safetensors").write_bytes(content)
        with contextlib.suppress(CheckpointError):
            reader = WeightReader(open_checkpoint(directory), torch.float32)
            reader.take("a", (2, 2))
            reader.finish()

    return check


SEEDS = {
    "parser": [
        json.dumps({"prompt": "a", "max_tokens": 3, "stop": ["x"], "logit_bias": {"5": 1.5}, "seed": 1}).encode(),
        json.dumps({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "n": 2}).encode(),
        json.dumps({"prompt": [[1, 2], [3]], "stream": True, "stream_options": {"include_usage": True}}).encode(),
    ],
    "text": [b"\x01\x02\x01ab-\xf0\x9f\x98\x80 and ab", "\x02\x00\x02..é…é".encode()],
    "checkpoint": [
        (header := json.dumps({"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}).encode()) + b"\0" * 16,
        struct.pack("<Q", len(header)) + header + b"\0" * 16,
        b'{"a":{"dtype":"F32","shape":[9223372036854775807,2],"data_offsets":[0,16]}}',
    ],
}  # fmt: skip


def one(target: str, seconds: float) -> int:
    """Fuzz in this process, whose exit code it is with atheris."""
    try:
        import atheris
    except ImportError:
        atheris = None
    watched = ["dspark_server.api", "dspark_server.engine.output", "dspark_server.models.loading"]
    with atheris.instrument_imports(include=watched) if atheris else contextlib.nullcontext():
        check = {"parser": parser, "text": text, "checkpoint": checkpoint}[target]()
    for seed in SEEDS[target]:
        check(seed)
    if atheris is None:
        return by_hypothesis(check, seconds, target)
    corpus = Path(tempfile.mkdtemp())
    for number, seed in enumerate(SEEDS[target]):
        (corpus / str(number)).write_bytes(seed)
    options = [f"-max_total_time={int(seconds)}", "-max_len=2048", "-rss_limit_mb=4096", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], check)
    atheris.Fuzz()
    return 0


def by_hypothesis(check: Callable[[bytes], None], seconds: float, target: str) -> int:
    """Without atheris: random bytes, and seeds with some of them changed."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    changed = st.tuples(st.sampled_from(SEEDS[target]), st.lists(st.tuples(st.integers(0, 300), st.binary(max_size=3))))

    def apply(change: tuple[bytes, list[tuple[int, bytes]]]) -> bytes:
        data, edits = change
        for at, piece in edits:
            data = data[:at] + piece + data[at + 1 :]
        return data

    count = 0

    @settings(max_examples=500, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.binary(max_size=512) | changed.map(apply))
    def run(data: bytes) -> None:
        nonlocal count
        count += 1
        check(data)

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        run()
    print(f"{target}: {count} inputs by hypothesis, nothing broken")
    return 0


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("targets", nargs="*", help=f"any of {', '.join(TARGETS)}; default: all")
    arguments.add_argument("--seconds", type=float, default=30.0, help="for each target")
    arguments.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = arguments.parse_args()
    given.targets = given.targets or list(TARGETS)
    if unknown := set(given.targets) - set(TARGETS):
        arguments.error(f"unknown: {', '.join(unknown)}")
    if given.here:
        return one(given.targets[0], given.seconds)
    broken = 0
    for target in given.targets:
        failed, seen = fuzz(target, given.seconds)
        print(f"{target}: {seen}")
        broken |= failed
    return int(broken)


def fuzz(target: str, seconds: float) -> tuple[bool, str]:
    """Fuzz in a process of its own, which the fuzzer ends: whether a property broke, and what was seen."""
    command = [sys.executable, "-m", "tests.reliability.fuzz", target, "--here", "--seconds", str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    if done.returncode:
        print(output[-5000:], file=sys.stderr)
    counted = re.search(r"number_of_executed_units: (\d+)|: (\d+) inputs by hypothesis", output)
    by = "atheris" if counted and counted[1] else "hypothesis"
    inputs = f"{int(counted[1] or counted[2]):,} inputs by {by}" if counted else "no count of inputs"
    return done.returncode != 0 or counted is None, inputs + (", BROKEN" if done.returncode else "")


if __name__ == "__main__":
    sys.exit(main())
