"""What is asked and when: prompts from files or made up, and Poisson arrivals. The same seed gives the same of both."""

import json
import random
from collections.abc import Callable, Sequence
from itertools import accumulate, chain, takewhile, zip_longest
from pathlib import Path

from loadtest.client import LoadTestError

# Frequent, short English words: about one token each in any tokenizer.
WORDS = (
    "the of and to in is it you that he was for on are with as his they be at one have this from or had by hot word "
    "but what some we can out other were all there when up use your how said an each she which do their time if will "
    "way about many then them write would like so these her long make thing see him two has look more day could go "
    "come did number sound no most people my over know water than call first who may down side been now find any new "
    "work part take get place made live where after back little only round man year came show every good me give our "
    "under name very through just form great think say help low line differ turn cause much mean before move right boy "
    "old too same tell does set three want air well also play small end put home read hand port large spell add even "
    "land here must big high such follow act why ask men change went light kind off need house picture try us again"
)


class Prompts:
    """Prompt i for every i: the files' prompts over and over, or made-up ones that never repeat.

    `distinct` is the number of different ones, None for no end. A server with a prefix cache answers a repeated prompt
    faster than a new one.
    """

    def __init__(self, texts: Sequence[str] | None, *, seed: int = 0, words: int = 64) -> None:
        self._texts = texts
        self._seed = seed
        self._words = words
        self._vocabulary = WORDS.split()
        self.distinct = None if texts is None else len(texts)

    def __call__(self, index: int) -> str:
        """The text of prompt `index`."""
        if self._texts is not None:
            return self._texts[index % len(self._texts)]
        return " ".join(random.Random(f"{self._seed}/{index}").choices(self._vocabulary, k=self._words))

    @classmethod
    def read(cls, files: Sequence[Path], *, seed: int, template: Callable[[str], str] | None = None) -> "Prompts":
        """Prompts of JSON lines {"prompt": text, "domain": name}, shuffled within each domain, domains in turn.

        Domains in turn, so that a small level has the same mix as a large one. Raises LoadTestError naming the line
        that is no prompt.
        """
        domains: dict[str, list[str]] = {}
        for path in files:
            for number, line in enumerate(_lines(path), 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                    prompt, domain = row["prompt"], str(row.get("domain") or path.stem)
                    if not isinstance(prompt, str) or not prompt:
                        raise ValueError
                except (ValueError, LookupError, TypeError, AttributeError):
                    raise LoadTestError(f'{path}, line {number}: no JSON object with a text "prompt".') from None
                domains.setdefault(domain, []).append(template(prompt) if template else prompt)
        shuffle = random.Random(seed).shuffle
        for name in sorted(domains):
            shuffle(domains[name])
        turns = zip_longest(*[domains[name] for name in sorted(domains)])
        texts = [text for text in chain.from_iterable(turns) if text is not None]
        if not texts:
            raise LoadTestError(f"no prompts in {', '.join(map(str, files))}.")
        return cls(texts, seed=seed)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LoadTestError(f"cannot read {path}: {error}") from None


def chat_template(directory: str) -> Callable[[str], str]:
    """A function that wraps a user's words in the chat template of the tokenizer in `directory`.

    Raises LoadTestError if there is none.
    """
    from transformers import AutoTokenizer  # takes seconds, and only this needs it

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise LoadTestError(f"no tokenizer in {directory}: {str(error).splitlines()[0]}") from None
    if not tokenizer.chat_template:
        raise LoadTestError(f"the tokenizer in {directory} has no chat template.")

    def wrap(text: str) -> str:
        turn = [{"role": "user", "content": text}]
        return str(tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))

    return wrap


def poisson_arrivals(
    rate: float, seed: str, *, requests: int | None = None, duration: float | None = None
) -> list[float]:
    """Arrival times in seconds from the start of a Poisson process of `rate` a second.

    `requests` of them, or all within `duration` seconds. The same seed and rate give the same times.
    """
    generator = random.Random(f"arrivals/{seed}/{rate}")
    if requests is not None:
        return list(accumulate(generator.expovariate(rate) for _ in range(requests)))
    if duration is None:
        raise ValueError("either requests or duration is needed")
    endless = accumulate(iter(lambda: generator.expovariate(rate), None))
    return list(takewhile(lambda time: time < duration, endless))
