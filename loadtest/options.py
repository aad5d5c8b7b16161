"""The command line of loadtest/run.py."""

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

import httpx

from loadtest.client import LoadTestError
from loadtest.report import Slo
from loadtest.servers import DSPARK_SERVER, POLICIES


def build_parser(documentation: str) -> argparse.ArgumentParser:
    """All options; the text before "examples:" is the description, the rest comes after the options."""
    description, _, epilog = documentation.partition("examples:")
    parser = argparse.ArgumentParser(
        prog="loadtest/run.py",
        description=description,
        epilog="examples:" + epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("what to measure (--url or --compare)").add_argument
    add("--url", action="append", type=_named_url, metavar="[NAME=]URL", help="a running server; may be repeated")
    add("--compare", type=_policies, metavar="POLICY,…", help=f"start a server for each of {', '.join(POLICIES)}")
    add("--model", help="name to ask for (default: the first the server lists); with --compare the model to serve")
    add("--api-key", help="sent as bearer token; default: the environment's OPENAI_API_KEY")

    add = parser.add_argument_group("load").add_argument
    add("--concurrency", type=counts, metavar="C,…", help="closed loop: users at once (default 1,4,16)")
    add("--rate", type=_rates, metavar="R,…", help="open loop: Poisson arrivals, requests a second")
    add("--requests-per-level", type=count, metavar="N", help="default: 4 per user, at least 16; Poisson: 60 s")
    add("--duration", type=_positive, metavar="S", help="seconds in which requests are begun, instead of a number")
    add("--steady", type=_positive, metavar="S", help="closed loop: a window of so many seconds, users out of step")
    add("--rounds", type=count, default=1, metavar="N", help="repeat the sweep; figures are medians (default 1)")
    add("--warmup", type=_whole, default=2, metavar="N", help="requests before each run, not counted (default 2)")
    add("--max-in-flight", type=count, metavar="N", help="Poisson: further requests wait in the client, timed apart")
    add("--seed", type=int, default=0, help="of prompts, their order and arrival times (default 0)")

    add = parser.add_argument_group("requests").add_argument
    add("--prompts", type=Path, nargs="+", metavar="FILE", help='JSON lines {"prompt": …, "domain": …}')
    add("--tokenizer", metavar="DIR", help="apply this tokenizer's chat template to --prompts; default: as they are")
    add("--prompt-words", type=count, default=64, metavar="N", help="length of made-up prompts (default 64)")
    add("--max-tokens", type=count, default=128, metavar="N", help="output tokens of a request (default 128)")
    add("--temperature", type=float, default=0.0, metavar="T", help="default 0")
    add("--ignore-eos", action=argparse.BooleanOptionalAction, default=True, help="always run to --max-tokens")
    add("--request-seeds", action="store_true", help="also send a sampling seed with each request (changes sampling)")
    add("--extra-body", type=_object, default={}, metavar="JSON", help='more fields, such as {"top_p": 0.9}')
    add("--timeout", type=_positive, default=600.0, metavar="S", help="seconds for a whole request (default 600)")

    add = parser.add_argument_group("results").add_argument
    add("--out", type=Path, default=Path("build/loadtest"), metavar="DIR", help="default build/loadtest")
    add("--slo", type=_slo, metavar="ttft=S,tpot=S,e2e=S", help="goodput counts requests within these, in seconds")
    add("--save-detailed", action="store_true", help="also write every request's latencies to results.json")

    add = parser.add_argument_group("servers of --compare").add_argument
    add("--speculative-config", type=_object, default={}, metavar="JSON", help="common to all: the drafter, for one")
    add("--serve-args", type=shlex.split, default=[], metavar="'ARGS'", help="more arguments for each server")
    add("--serve-command", type=shlex.split, default=list(DSPARK_SERVER), metavar="'CMD'", help="what runs `serve`")
    add("--start-timeout", type=_positive, default=600.0, metavar="S", help="seconds to become ready (default 600)")
    return parser


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Fill defaults that depend on other options; exit with status 2 for options that cannot be combined."""
    if bool(arguments.url) == bool(arguments.compare):
        parser.error("give either --url or --compare")
    if arguments.url and len({name for name, _ in arguments.url}) < len(arguments.url):
        parser.error("each --url needs a name of its own: --url NAME=URL")
    if arguments.concurrency and arguments.rate:
        parser.error("give either --concurrency (closed loop) or --rate (Poisson)")
    if not arguments.concurrency and not arguments.rate:
        arguments.concurrency = [1, 4, 16]
    if sum(bool(way) for way in (arguments.requests_per_level, arguments.duration, arguments.steady)) > 1:
        parser.error("give one of --requests-per-level, --duration and --steady")
    if arguments.steady and arguments.rate:
        parser.error("--steady is for --concurrency")
    if arguments.requests_per_level and arguments.requests_per_level < max(arguments.concurrency or [0]):
        parser.error("--requests-per-level is below a concurrency, which would never be reached")
    if arguments.max_in_flight and not arguments.rate:
        parser.error("--max-in-flight is for --rate")
    if arguments.tokenizer and not arguments.prompts:
        parser.error("--tokenizer is for --prompts")


def _named_url(text: str) -> tuple[str, str]:
    """NAME and base URL, without a trailing /v1."""
    name, separator, url = text.partition("=")
    if not separator or "/" in name:
        name, url = "", text
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise argparse.ArgumentTypeError(f"{url!r}: {error}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise argparse.ArgumentTypeError(f"{url!r} is no http:// or https:// address")
    return name or parsed.netloc.decode(), url.rstrip("/").removesuffix("/v1")


def _policies(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in POLICIES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(POLICIES)}")
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError("a policy is named twice")
    return names


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number")
    return int(text)


def count(text: str) -> int:
    if (value := _whole(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return value


def counts(text: str) -> list[int]:
    return [count(part) for part in text.split(",")]


def _rates(text: str) -> list[float]:
    return [_positive(part) for part in text.split(",")]


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"no JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value


def _slo(text: str) -> Slo:
    try:
        return Slo.parse(text)
    except LoadTestError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
