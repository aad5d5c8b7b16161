"""Sequences sampled by the target itself, and the blocks of them that a step trains on."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dspark_server.errors import ConfigError

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Corpus:
    """S sequences one after another: tokens [T]; sequence s is tokens[start[s] : start[s + 1]].

    `prompt_length` [S] counts the tokens of each prompt, which the target did not write.
    """

    tokens: Integers
    start: Integers
    prompt_length: Integers

    @classmethod
    def load(cls, path: Path) -> "Corpus":
        """Read an .npz of tokens, length, prompt_length. Raises ConfigError if it is not one."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                tokens, length, prompt = (arrays[name] for name in ("tokens", "length", "prompt_length"))
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"{path} is not a corpus (.npz of tokens, length, prompt_length): {error}") from None
        if length.sum() != len(tokens):
            raise ConfigError(f"{path}: lengths sum to {length.sum()}, but there are {len(tokens)} tokens.")
        start = np.concatenate([[0], np.cumsum(length)]).astype(np.int64)
        return cls(tokens.astype(np.int64), start, prompt.astype(np.int64))

    @property
    def size(self) -> int:
        """Number of sequences."""
        return len(self.prompt_length)

    def sequence(self, index: int) -> Integers:
        """The tokens of one sequence (a view)."""
        return self.tokens[self.start[index] : self.start[index + 1]]

    def anchors(self, index: int) -> Integers:
        """Possible anchors: tokens of the answer that have a successor."""
        return np.arange(self.prompt_length[index], self.start[index + 1] - self.start[index] - 1)

    def frequent(self, count: int, vocab_size: int) -> Integers:
        """The `count` most frequent tokens of the answers, ascending."""
        counts = np.bincount(self.tokens, minlength=vocab_size)
        return np.sort(np.argsort(-counts, kind="stable")[:count])


@dataclass(frozen=True)
class Split:
    """Held-out sequences, and a reproducible order of the others: a step's data depend on (seed, step) alone."""

    corpus: Corpus
    held_out: list[int]
    training: Integers
    seed: int
    reuse: int = 1

    @classmethod
    def of(cls, corpus: Corpus, held_out: int, seed: int, reuse: int = 1) -> "Split":
        """The held-out sequences are the same for every seed, so that runs can be compared; the order differs."""
        usable = np.array([i for i in range(corpus.size) if len(corpus.anchors(i))])
        if held_out >= len(usable):
            raise ConfigError(f"{held_out} sequences held out of {len(usable)} leaves none to train on.")
        order = np.random.default_rng(20260601).permutation(usable)
        training = np.random.default_rng([seed, 4]).permutation(order[held_out:])
        return cls(corpus, order[:held_out].tolist(), training, seed, reuse)

    def step(self, step: int, sequences: int, anchors: int) -> list[tuple[int, Integers]]:
        """Sequences of a training step with the anchors drawn for each, ascending."""
        chosen = [self.drawn(place) for place in range(step * sequences, (step + 1) * sequences)]
        return self.blocks(chosen, anchors, [self.seed, 2, step])

    def drawn(self, place: int) -> int:
        """The sequence at a place of the order: all of them first, then epochs of shuffles.

        A sequence's features cost more than a visit does. With `reuse` > 1, only every reuse-th place brings a new one
        and those between return to one seen before, so that the first epoch's cost is spread over reuse epochs' places.
        """
        count = len(self.training)
        if place < count * self.reuse:
            new, again = divmod(place, self.reuse)
            if again:
                new = int(np.random.default_rng([self.seed, 3, place]).integers(new + 1))
            return int(self.training[new])
        epoch, offset = divmod(place - count * self.reuse, count)
        return int(np.random.default_rng([self.seed, 1, epoch]).permutation(self.training)[offset])

    def blocks(self, chosen: list[int], anchors: int, key: list[int]) -> list[tuple[int, Integers]]:
        """Up to `anchors` anchors of each chosen sequence, without replacement, by the noise of `key`."""
        noise = np.random.default_rng(key)
        drawn = []
        for index in chosen:
            possible = self.corpus.anchors(index)
            drawn.append((index, np.sort(noise.choice(possible, min(anchors, len(possible)), replace=False))))
        return drawn
