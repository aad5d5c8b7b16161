"""The sequential half of a draft: from left to right, slot by slot (DSpark §3.2), in one native call where possible.

The logits of each slot are corrected for the token before it, its confidence is computed and its token is sampled.

Shapes: R drafting requests, gamma slots, D hidden size, C draft tokens (all of V, or a part), r Markov rank.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from time import monotonic
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from dspark_kernels import DraftedTokens, Favour, Filters, Kernels, Ruled
from torch import Tensor

from dspark_server.speculation.calibration import Calibration
from dspark_server.speculation.controls import Control
from dspark_server.speculation.copying import CopyBias
from dspark_server.speculation.draft_block import DraftBlock
from dspark_server.speculation.heads import ConfidenceHead, SequentialHead
from dspark_server.speculation.law import permitted, sample
from dspark_server.speculation.noise import Purpose, Streams
from dspark_server.speculation.sampling import SamplingBatch
from dspark_server.speculation.shortlist import Shortlist

# A grammar's masks are computed slot after slot, each for the tokens before it: seconds of a step that drafts wait for.
MASKS_WAIT = 0.005


class BlockSampler:
    """From a backbone's hidden states to draft blocks.

    draft_tokens [C] names the tokens that may be drafted (None: all of `vocabulary`); `shortlist` is K of Shortlist,
    `successors` as there.
    """

    def __init__(
        self,
        vocabulary: int,
        head: SequentialHead | None,
        confidence: ConfidenceHead | None,
        calibration: Calibration,
        draft_tokens: Tensor | None,
        kernels: Kernels,
        shortlist: int | None = None,
        *,
        successors: bool = True,
    ) -> None:
        self.head = head
        self.keep_logits = False  # conformance tests need every intermediate
        self._vocabulary = vocabulary
        self._confidence = confidence
        self.calibration = calibration
        self.draft_tokens = draft_tokens
        self._kernels = kernels
        columns = vocabulary if draft_tokens is None else len(draft_tokens)
        listed = shortlist is not None and shortlist < columns
        self._shortlist = Shortlist(head, shortlist, successors=successors) if listed and shortlist else None
        self.in_one_call = self._shortlist is None and (head is None or head.packed is not None)

    def sample(
        self,
        hidden: Tensor,
        base: Tensor,
        anchors: Tensor,
        sampling: SamplingBatch,
        streams: Streams,
        copies: CopyBias | None,
        patience: float = MASKS_WAIT,
    ) -> DraftBlock:
        """Blocks of R requests, row i of `sampling` belonging to request i.

        hidden [R, gamma, D], base [R, gamma, C] float32 logits, anchors [R] int64. Grammars' masks may take
        `patience` seconds.
        """
        deadline = monotonic() + patience
        if not self.in_one_call or self.keep_logits:
            return self._slot_by_slot(hidden, base, anchors, sampling, streams, copies, deadline)
        apart = sampling.coupled & ~sampling.greedy
        if sampling.controls:
            apart = apart | torch.tensor([self._needs_words(control) for control in sampling.controls]).to(apart.device)
        if not bool(apart.any()):
            return self._at_once(hidden, base, anchors, sampling, streams, copies)
        if bool(apart.all()):
            return self._slot_by_slot(hidden, base, anchors, sampling, streams, copies, deadline)
        # One request with a seed or a grammar must not slow down the others.
        rows = [(~apart).nonzero().squeeze(1), apart.nonzero().squeeze(1)]
        parts = [sampling.select(mine) for mine in rows]
        favoured = [None if copies is None else copies.select(mine) for mine in rows]
        arguments = [
            (hidden[mine], base[mine], anchors[mine], part, streams, favour)
            for mine, part, favour in zip(rows, parts, favoured, strict=True)
        ]
        blocks = [self._at_once(*arguments[0]), self._slot_by_slot(*arguments[1], deadline)]
        return _joined(blocks, rows, copies)

    def _slot_by_slot(
        self,
        hidden: Tensor,
        base: Tensor,
        anchors: Tensor,
        sampling: SamplingBatch,
        streams: Streams,
        copies: CopyBias | None,
        deadline: float,
    ) -> DraftBlock:
        """One slot after the other, for every head, rule and control; a mask later than `deadline` ends a block."""
        requests, gamma = len(anchors), hidden.shape[1]
        uniforms = streams.uniform(Purpose.DRAFT, sampling, torch.arange(gamma))
        state = self.head.start(requests) if self.head else None
        best = self._shortlist.best(base) if self._shortlist else None
        previous, embedding, latent = anchors, None, None
        usable = torch.full_like(anchors, gamma)
        tokens: list[Tensor] = []
        laws, names, confidences, kept_logits = [], [], [], []
        for k in range(gamma):
            if self.head is not None:
                embedding = self.head.embedding(previous)
                latent, state = self.head.latent(embedding, hidden[:, k], state)
            columns, logits = self._corrected(base[:, k], None if best is None else best[:, k], previous, latent)
            finite = torch.isfinite(logits.amax(dim=-1))
            if self._confidence is not None:
                confidences.append(self._confidence.logit(hidden[:, k], embedding))
                finite &= ~torch.isnan(confidences[-1])
            usable = torch.where(finite, usable, usable.clamp(max=k))
            here = torch.nan_to_num(logits, neginf=-torch.inf)
            if copies is not None:
                here, columns = copies.favour(k, here, columns)
            at = sampling.ahead(k, tokens)
            if at.controls:
                here = permitted(here, at, columns, deadline)
                # The rules may leave no token that can be drafted, or a mask is late. Known before this slot is
                # sampled, so ending the block here depends on no token's own value (a rule: DSPARK.md, "No
                # value-dependent drop").
                dead = here.amax(dim=-1) == -torch.inf
                usable = torch.where(dead, usable.clamp(max=k), usable)
                here[dead] = 0.0
                at = at.without_controls()
            previous, law = sample(here, at, uniforms[:, k], streams, columns, self._vocabulary)
            if copies is not None:
                copies.follow(k, previous)
            tokens.append(previous)
            if law is not None:
                laws.append(law)
                names.append(columns)
            if self.keep_logits:
                kept_logits.append(logits)
        confidence = torch.stack(confidences, dim=1) if confidences else None
        return DraftBlock(
            tokens=torch.stack(tokens, dim=1),
            q=torch.stack(laws, dim=1) if laws else None,
            columns=torch.stack([c for c in names if c is not None], dim=1) if names and names[0] is not None else None,
            confidence=confidence,
            survival=self._survival(confidence, sampling, copies),
            has_confidence=confidence is not None,
            usable=usable,
            copies=copies,
            hidden=hidden if self.keep_logits else None,
            base_logits=base if self.keep_logits else None,
            logits=torch.stack(kept_logits, dim=1) if kept_logits else None,
        )

    def _corrected(
        self, base: Tensor, best: Tensor | None, previous: Tensor, latent: Tensor | None
    ) -> tuple[Tensor | None, Tensor]:
        """One slot's columns [R, C] (None: column v is token v) and their logits [R, C], given the token before [R].

        base [R, C] of the slot, best [R, K] its candidates with a shortlist, latent [R, r] the head's, if there is one.
        """
        if self._shortlist is not None and best is not None:
            columns, logits = self._shortlist.logits(base, best, previous, latent)
            return columns if self.draft_tokens is None else self.draft_tokens[columns], logits
        names = None if self.draft_tokens is None else self.draft_tokens.expand(len(previous), -1)
        if self.head is None or latent is None:
            return names, base
        return names, base + self.head.bias(latent)

    def _at_once(
        self,
        hidden: Tensor,
        base: Tensor,
        anchors: Tensor,
        sampling: SamplingBatch,
        streams: Streams,
        copies: CopyBias | None,
    ) -> DraftBlock:
        """The same in one native call, where the head is vanilla, for greedy and unseeded requests."""
        requests, gamma, vocabulary = base.shape
        favour, columns = copies.whole_block(base, self.draft_tokens) if copies is not None else (None, None)
        if columns is None and self.draft_tokens is not None:
            columns = self.draft_tokens.expand(requests, gamma, vocabulary)
        inverse, uniforms = self.whole_block_noise(sampling, streams, gamma)
        filters = sampling.filters(torch.arange(requests)) if sampling.filtered and not sampling.all_greedy else None
        ruled = sampling.ruled()
        if ruled is not None and self.draft_tokens is not None:
            ruled = replace(ruled, column=self._column)
        drawn, confidence = self.whole_block(hidden, base, anchors, inverse, uniforms, favour, filters, ruled)
        if copies is not None:
            copies.on, copies.odds = drawn.on, drawn.odds
        return DraftBlock(
            tokens=drawn.tokens,
            q=drawn.law,
            columns=None if drawn.law is None else columns,
            confidence=confidence,
            survival=self._survival(confidence, sampling, copies),
            has_confidence=confidence is not None,
            usable=drawn.usable,
            copies=copies,
        )

    def _needs_words(self, control: Control | None) -> bool:
        """Whether a control can only be applied slot by slot, in Python."""
        return control is not None and not (self._kernels.ruled and control.rules)

    @cached_property
    def _column(self) -> Tensor:
        """[V] int32: the column of each token, -1: it cannot be drafted."""
        assert self.draft_tokens is not None, "column v is token v"
        column = torch.full((self._vocabulary,), -1, dtype=torch.int32)
        column[self.draft_tokens] = torch.arange(len(self.draft_tokens), dtype=torch.int32)
        return column

    def takes_whole_blocks(self, sampling: SamplingBatch) -> bool:
        """Whether one kernel call draws whole blocks without device reads: a vanilla head, no seeds, no controls."""
        return self.in_one_call and sampling.at_once and not self.keep_logits

    def whole_block_noise(self, sampling: SamplingBatch, streams: Streams, gamma: int) -> tuple[Tensor, Tensor | None]:
        """Noise for `whole_block`: inverse temperatures [R] float32, 0 if greedy; uniforms [R, gamma] float64."""
        inverse = (1 / sampling.temperature).masked_fill(sampling.greedy, 0.0)
        slots = torch.arange(gamma)
        return inverse, None if sampling.all_greedy else streams.uniform(Purpose.DRAFT, sampling, slots)

    def whole_block(
        self,
        hidden: Tensor,
        base: Tensor,
        anchors: Tensor,
        inverse_temperature: Tensor,
        uniforms: Tensor | None,
        favour: Favour | None,
        filters: Filters | None = None,
        ruled: Ruled | None = None,
    ) -> tuple[DraftedTokens, Tensor | None]:
        """The blocks, and the confidence logits [R, gamma] if there is such a head; reads nothing on the host."""
        packed = None if self.head is None else self.head.packed
        drawn = self._kernels.draft_tokens(
            base, anchors, self.draft_tokens, packed, inverse_temperature, uniforms, favour, filters, ruled
        )
        if self._confidence is None:
            return drawn, None
        before = torch.cat([anchors.unsqueeze(1), drawn.tokens[:, :-1]], dim=1)
        embedding = None if self.head is None else self.head.embedding(before)
        confidence = self._confidence.logit(hidden, embedding)
        usable = drawn.usable.minimum((~confidence.isnan()).long().cumprod(1).sum(1))
        return replace(drawn, usable=usable), confidence

    def _survival(self, confidence: Tensor | None, sampling: SamplingBatch, copies: CopyBias | None) -> Tensor | None:
        return None if confidence is None else self.calibration.survival(confidence, sampling.temperature, copies)


class Draws(Protocol):
    """Draws the tokens of a draft's next slots."""

    previous: Tensor  # [R] int64, the tokens drawn last, at first the anchors

    def draw(self, hidden: Tensor, base: Tensor) -> None:
        """Draw the next n slots: hidden [R, n, D], base [R, n, C] float32 logits."""


class Drawing:
    """A draft's blocks as they are drawn from left to right, as many slots at a time as a pass of the drafter gives."""

    def __init__(
        self,
        sampler: BlockSampler,
        anchors: Tensor,
        sampling: SamplingBatch,
        streams: Streams,
        copies: CopyBias | None,
    ) -> None:
        """`anchors` [R] int64; the rest as in `BlockSampler.sample`, for whole blocks."""
        self.previous = anchors  # [R] the tokens drawn last
        self._sampler = sampler
        self._sampling = sampling
        self._streams = streams
        self._copies = copies
        self._patience = MASKS_WAIT
        self._blocks: list[DraftBlock] = []
        self._tokens: list[Tensor] = []  # [R] of each slot

    def draw(self, hidden: Tensor, base: Tensor) -> None:
        """See `Draws`."""
        first, count, copies = len(self._tokens), base.shape[1], self._copies
        whole = copies is None or count == copies.tokens.shape[1]
        here = copies if copies is None or whole else copies.slots(first, first + count)
        at = self._sampling.ahead(first, self._tokens)
        began = monotonic()
        block = self._sampler.sample(hidden, base, self.previous, at, self._streams, here, self._patience)
        self._patience = max(0.0, self._patience - (monotonic() - began))
        if copies is not None and here is not None and not whole:
            copies.drawn(first, block.tokens, here)
        self._blocks.append(replace(block, copies=copies))
        self._tokens += block.tokens.unbind(1)
        self.previous = self._tokens[-1]

    def block(self, gamma: int) -> DraftBlock:
        """The blocks of what was drawn, `gamma` slots wide; those not drawn cannot be verified."""
        blocks, whole = self._blocks, self._blocks[0]
        if len(blocks) > 1:
            usable = usable_slots([block.usable for block in blocks], [block.tokens.shape[1] for block in blocks])
            assert not whole.has_confidence, "survival is that of a whole block"
            names = ("tokens", "q", "columns", "hidden", "base_logits", "logits")
            parts = {name: [getattr(block, name) for block in blocks] for name in names}
            joined: dict[str, Any] = {
                n: None if values[0] is None else torch.cat(values, 1) for n, values in parts.items()
            }
            whole = replace(whole, usable=usable, **joined)
        missing = gamma - whole.tokens.shape[1]
        return replace(whole, tokens=F.pad(whole.tokens, (0, missing))) if missing else whole


def usable_slots(usable: Sequence[Tensor], widths: Sequence[int]) -> Tensor:
    """Number [R] of leading usable slots of parts of widths[i] slots that follow each other, from that of each part."""
    total = torch.zeros_like(usable[0])
    for part, width in zip(reversed(usable), reversed(widths), strict=True):
        total = torch.where(part == width, width + total, part)
    return total


def _joined(blocks: list[DraftBlock], rows: list[Tensor], copies: CopyBias | None) -> DraftBlock:
    """One block of all requests, those of blocks[i] being `rows[i]`. Fields of only some blocks are 0 for the others.

    `copies`, of all requests, receives the biased slots.
    """

    def join(name: str) -> Tensor | None:
        parts = [getattr(block, name) for block in blocks]
        known = next((part for part in parts if part is not None), None)
        if known is None:
            return None
        whole: Tensor = known.new_zeros((sum(map(len, rows)), *known.shape[1:]))
        for mine, part in zip(rows, parts, strict=True):
            if part is not None:
                whole[mine] = part
        return whole

    for mine, block in zip(rows, blocks, strict=True):
        if copies is not None and block.copies is not None:
            copies.on[mine], copies.odds[mine] = block.copies.on, block.copies.odds
    names = ("tokens", "q", "columns", "confidence", "survival", "usable")
    joined: dict[str, Any] = {name: join(name) for name in names}
    return DraftBlock(**joined, has_confidence=blocks[0].has_confidence, copies=copies)
