"""Drafting by copying: the tokens that followed an earlier occurrence of the last tokens are likely to follow again.

Text repeats itself (quoted prompts, code, lists), greedy text most of all. A small drafter sees little of that; an
index of the sequence's own n-grams finds it at almost no cost. Two uses, both lossless for any draft (DSPARK.md):

- a long match of a greedy request drafts alone, up to WIDTH tokens, and the backbone does not run for it;
- any other match adds a bias to one logit of the draft, as long as the block follows the match.

Both depend on committed tokens and on earlier tokens of the block only. Trust in a match depends on its length and on
the temperature: the tables are fitted by `dspark-server calibrate`.

Shapes: R requests, gamma draft tokens each, C columns of draft logits, BUCKETS of match lengths.
"""

import itertools
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from dspark_kernels import UNNAMED, Favour
from torch import Tensor

WIDTH = 12  # draft tokens of a block that is copied alone, at most
LONG_MATCH = 4  # matched tokens from which a greedy request needs no backbone
ALONE_WEIGHT = 30.0  # weight of a table's `alone` beside a request's own record, in draft tokens (docs/experiments.md)
BUCKETS = (2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32)  # least match lengths of the tables' buckets
ORDERS = (4, 2)  # lengths of the n-grams that are looked up, longest first
SETTLED = 8  # a match this long is not replaced by a longer one


@dataclass(frozen=True)
class Match:
    """The sequence's last `length` tokens occurred earlier, followed by `tokens` (periodic past the end)."""

    length: int
    tokens: list[int]


class Grams:
    """Last occurrences of n-grams in one sequence, by their end: `ends[order][n-gram]`, in the order of ORDERS.

    N-grams that end at `entered` or before are in it, unless they begin before the part of the sequence that it covers.
    """

    def __init__(self, start: int = 0) -> None:
        self.ends: tuple[dict[tuple[int, ...], int], ...] = tuple({} for _ in ORDERS)
        self.entered = start

    def enter(self, tokens: Sequence[int], until: int) -> None:
        """Add n-grams that end after `entered`, up to `until`."""
        for order, ends in zip(ORDERS, self.ends, strict=True):
            first = max(0, self.entered - order + 1)
            last = max(first, until - order + 1)
            grams = zip(*(tokens[first + shift : last + shift] for shift in range(order)), strict=True)
            ends.update(zip(grams, itertools.count(first + order), strict=False))
        self.entered = until


class ContextIndex:
    """Last occurrences of n-grams in one growing sequence. Time and memory grow by a few entries per token.

    Its first `boundary` tokens are indexed in `prompt`, which the answers to one prompt share.
    """

    def __init__(self, boundary: int = 0, prompt: Grams | None = None) -> None:
        self.prompt = Grams() if prompt is None else prompt
        self._boundary = boundary
        self._own = Grams(boundary)
        self._seen = 0
        self._next = 0  # index of the token that followed the current match
        self._length = 0

    def enter(self, tokens: Sequence[int], most: int) -> int:
        """Index n-grams that end before the end of `tokens`, at most `most` tokens of it; returns the number indexed.

        The newest tokens may so be indexed before the rest of the prompt is.
        """
        spent = 0
        for grams, end in ((self._own, len(tokens) - 1), (self.prompt, min(self._boundary, len(tokens) - 1))):
            count = min(end - grams.entered, most - spent)
            if count > 0:
                grams.enter(tokens, grams.entered + count)
                spent += count
        return spent

    def match(self, tokens: Sequence[int], width: int) -> Match | None:
        """The best earlier occurrence of the end of `tokens`, which begin with the tokens of every earlier call.

        Finds only n-grams that `enter` has indexed.
        """
        self._follow(tokens)
        if self._length < SETTLED:
            self._look_up(tokens)
        if self._length < BUCKETS[0]:
            return None
        following = list(tokens[self._next : self._next + width])
        period = len(following)
        while len(following) < width:
            following.append(following[-period])
        return Match(self._length, following)

    def _follow(self, tokens: Sequence[int]) -> None:
        """Extend the current match as long as the new tokens agree with it."""
        for place in range(self._seen, len(tokens)):
            if self._length and tokens[self._next] == tokens[place]:
                self._next += 1
                self._length = min(self._length + 1, BUCKETS[-1])
            else:
                self._length = 0
                break
        self._seen = len(tokens)

    def _look_up(self, tokens: Sequence[int]) -> None:
        """Look up the n-gram at the end, the longest first, and its last occurrence."""
        for order, own, shared in zip(ORDERS, self._own.ends, self.prompt.ends, strict=True):
            gram = tuple(tokens[-order:])
            end = own.get(gram) or shared.get(gram)
            if end is not None:
                length = _common_suffix(tokens, end, order)
                if length > self._length:
                    self._next, self._length = end, length
                return


def _common_suffix(tokens: Sequence[int], end: int, known: int) -> int:
    """Number of tokens before `end` that equal the last ones, `known` of them for certain; capped where more is
    useless.
    """
    length = known
    while length < min(end, BUCKETS[-1]) and tokens[end - length - 1] == tokens[-length - 1]:
        length += 1
    return length


@dataclass(frozen=True)
class CopyTables:
    """Trust in copies, by BUCKETS of match length, at temperature 0 (`greedy`) and 1 (`sampled`).

    bias: added to the logit of the token that followed. trust: the log odds that a draft token drawn with such a bias
    is accepted are trust[0] * (the confidence head's logit) + trust[1] * (the copy's log odds before the bias) +
    trust[2 + bucket]. alone: the probability that a token copied without the drafter is accepted.
    """

    greedy_bias: tuple[float, ...] = (4.0, 6.0, 6.75, 8.5, 9.5, 9.5, 9.5, 9.5, 11.5, 12.5, 12.5)
    sampled_bias: tuple[float, ...] = (1.5, 3.0, 4.25, 4.25, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0)
    greedy_trust: tuple[float, ...] = (0.5, 0.1, 0.3, 0.6, 0.8, 1.1, 1.3, 1.3, 1.4, 1.6, 2.5, 3.0, 3.2)
    sampled_trust: tuple[float, ...] = (0.7, 0.1, 0.2, 0.3, 0.4, 0.4, 0.6, 0.6, 0.7, 0.7, 0.7, 0.7, 0.7)
    alone: tuple[float, ...] = (0.59, 0.7, 0.7, 0.78, 0.83, 0.8, 0.81, 0.84, 0.94, 0.96, 0.97)

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> "CopyTables":
        """Read the tables from `fields` of a stored calibration. Raises ValueError if they are not rows of finite
        numbers.
        """
        tables = {name: tuple(float(value) for value in fields[name]) for name in cls.__dataclass_fields__}
        for name, values in tables.items():
            wanted = len(BUCKETS) + 2 * name.endswith("trust")
            if len(values) != wanted or not all(map(math.isfinite, values)):
                raise ValueError(f"copying.{name} must be {wanted} finite numbers")
        return cls(**tables)

    def bias(self, temperature: Tensor) -> Tensor:
        """Sampling temperatures [R] -> biases [R, BUCKETS]."""
        return self._between(temperature, "bias")

    def trust(self, temperature: Tensor) -> Tensor:
        """Sampling temperatures [R] -> weights and offsets [R, 2 + BUCKETS]."""
        return self._between(temperature, "trust")

    def _between(self, temperature: Tensor, table: str) -> Tensor:
        greedy, sampled = (self._tensors[f"{law}_{table}"].to(temperature.device) for law in ("greedy", "sampled"))
        return torch.lerp(greedy, sampled, temperature.clamp(0, 1).float().unsqueeze(1))

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        return {name: torch.tensor(getattr(self, name)) for name in self.__dataclass_fields__}

    def chance_alone(self, length: int, gamma: int) -> list[float]:
        """[gamma] probability that a token is accepted if those before it are, in a copy after a match of `length`."""
        return [self.alone[bisect_right(BUCKETS, length + slot) - 1] for slot in range(gamma)]


def buckets(length: Tensor, gamma: int) -> Tensor:
    """The bucket [R, gamma] of each slot of blocks that follow matches of `length` [R] tokens, at least BUCKETS[0].

    At slot k the match is k tokens longer.
    """
    lengths = length.unsqueeze(1) + torch.arange(gamma)
    return torch.bucketize(lengths, torch.tensor(BUCKETS), right=True) - 1


class CopyBias:
    """Biases the tokens that followed each request's match, slot by slot, as long as its block follows them too.

    tokens [R, gamma] int64 followed a match of length [R]; on [R, gamma] bool: the slots where they were biased; odds
    [R, gamma] float32: the log odds of the slot's token before its bias, 0 where it had none.
    """

    def __init__(self, matches: Sequence[Match | None], gamma: int, temperature: Tensor, tables: CopyTables) -> None:
        none = Match(BUCKETS[0], [0] * gamma)
        self.tokens = torch.tensor([(match or none).tokens[:gamma] for match in matches])
        self.length = torch.tensor([(match or none).length for match in matches])
        self._following = torch.tensor([match is not None for match in matches])
        self.bucket = buckets(self.length, gamma)
        self._bias = tables.bias(temperature).gather(1, self.bucket)
        self.on = torch.zeros(len(matches), gamma, dtype=torch.bool)
        self.odds = torch.zeros(len(matches), gamma)

    def select(self, rows: Tensor) -> "CopyBias":
        """The same for requests `rows` [n] alone."""
        part = copy(self)
        for name in ("tokens", "length", "_following", "bucket", "_bias", "on", "odds"):
            setattr(part, name, getattr(self, name)[rows])
        return part

    def slots(self, first: int, end: int) -> "CopyBias":
        """The same for slots first .. end alone, after those before them."""
        part = copy(self)
        for name in ("tokens", "bucket", "_bias", "on", "odds"):
            setattr(part, name, getattr(self, name)[:, first:end])
        return part

    def drawn(self, first: int, tokens: Tensor, part: "CopyBias") -> None:
        """Tokens [R, n] were drawn for the slots from `first` on, with the biases of `part`."""
        end = first + tokens.shape[1]
        self.on[:, first:end], self.odds[:, first:end] = part.on, part.odds
        for slot in range(first, end):
            self.follow(slot, tokens[:, slot - first])

    def to(self, device: torch.device) -> "CopyBias":
        """The same with tensors on `device`."""
        moved = copy(self)
        for name, value in vars(self).items():
            setattr(moved, name, value.to(device))
        return moved

    def favour(self, slot: int, logits: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Draft logits [R, C] with the bias added, and the tokens [R, C] of their columns (None: column v is v).

        If no column holds the copied token, the least likely column of that row holds it from now on.
        """
        rows = self._following.nonzero().squeeze(1)
        if not len(rows):
            return logits, columns
        self.on[:, slot] = self._following
        copied, here = self.tokens[rows, slot], logits[rows]
        total = here.logsumexp(-1)
        if columns is None:
            place = copied
        else:
            named = columns[rows] == copied.unsqueeze(1)
            there, place = named.any(1), named.int().argmax(1)
            if not bool(there.all()):
                missing = (~there).nonzero().squeeze(1)
                place[missing] = here[missing].argmin(-1)
                columns = columns.clone()
                columns[rows[missing], place[missing]] = copied[missing]
                here[missing, place[missing]] = total[missing] + UNNAMED
        score = here.gather(1, place.unsqueeze(1)).squeeze(1)
        # log p / (1 - p); a copy that already has all the mass needs no bias, and must not give infinity.
        self.odds[rows, slot] = (
            (score - total - torch.log1p(-torch.exp(score - total).clamp(max=1 - 1e-6)))
            .nan_to_num(nan=UNNAMED, neginf=-20.0)
            .clamp(min=-20.0)
        )
        result = logits.clone()
        here.scatter_(1, place.unsqueeze(1), (score + self._bias[rows, slot]).unsqueeze(1))
        result[rows] = here
        return result, columns

    def all_named(self) -> Favour:
        """The same for all slots at once, where column v is token v."""
        named = torch.ones_like(self.tokens, dtype=torch.bool)
        return Favour(self.tokens, self.tokens, named, self._bias, self._following)

    def whole_block(self, base: Tensor, names: Tensor | None) -> tuple[Favour, Tensor | None]:
        """The same for all slots at once, for `Kernels.draft_tokens`, and the tokens of the columns afterwards.

        base [R, gamma, C] logits before the correction, names [C] tokens of their columns (None: column v is v).
        Returns [R, gamma, C] tokens of the columns, or None.
        """
        if names is None:
            return self.all_named(), None
        place = torch.searchsorted(names, self.tokens).clamp(max=len(names) - 1)
        named = names[place] == self.tokens
        columns = names.expand(*base.shape)
        missing = ~named & self._following.unsqueeze(1)
        if bool(missing.any()):
            place[missing] = base[missing].argmin(-1)
            columns = columns.scatter(2, place.unsqueeze(2), torch.where(named, names[place], self.tokens).unsqueeze(2))
        return Favour(self.tokens, place, named | ~self._following.unsqueeze(1), self._bias, self._following), columns

    def follow(self, slot: int, drawn: Tensor) -> None:
        """The slot's tokens [R] were drawn: blocks that did not take the copied token stop following the match."""
        self._following = self._following & (drawn == self.tokens[:, slot])
