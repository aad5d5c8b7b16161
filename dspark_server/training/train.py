"""The training loop (DSpark §3.3): frozen target, random anchors, one optimizer step per batch of blocks.

A step depends on (seed, step) alone, and the whole state is saved every `save_every` steps, so that a run killed at any
moment continues to the same result.
"""

import csv
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import dspark_kernels
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from dspark_server import figures
from dspark_server.models.decoder import Decoder
from dspark_server.models.hub import cache_dir, resolve_model
from dspark_server.runtime.linear import has_amx, has_bfloat16_pairs
from dspark_server.runtime.memory import keep_freed_memory
from dspark_server.training.checkpoint import (
    draft_model,
    export,
    initialise_from_target,
    load_weights,
    target_head,
)
from dspark_server.training.config import TrainConfig
from dspark_server.training.corpus import Corpus, Integers, Split
from dspark_server.training.curve import plot_training
from dspark_server.training.features import TargetFeatures
from dspark_server.training.loss import FrozenHead, VocabularyLoss
from dspark_server.training.model import Blocks

SEQUENTIAL = ("markov_head.", "candidate_selector.")  # parameters that train at `markov_rate`
EVALUATED = 60  # held-out sequences evaluated during a run; calibration uses the rest too
LOG_FIELDS = (
    "step",
    "positions",
    "loss",
    "cross_entropy",
    "survival",
    "held_out_tau",
    "held_out_greedy_tau",
    "seconds",
)


@dataclass(frozen=True)
class Batch:
    """Blocks, and the labels and target rows of their slots.

    rows [M] picks the slots [B * gamma] that lie within their sequence; labels, weight [M]; target [U, D] holds the
    target's hidden rows, once each, target_rows [M] the index of each slot's; logsum [U]: log sum exp of their logits
    over the whole vocabulary, if the loss sees a part of it.
    """

    blocks: Blocks
    rows: Tensor
    labels: Tensor
    weight: Tensor
    target: Tensor
    target_rows: Tensor
    logsum: Tensor | None


@dataclass(frozen=True)
class Losses:
    """A step's loss; cross-entropy and survival c*_k = 1 - L1/2 of every row [M] (slots outside: see Batch.rows).

    tau is the acceptance length of blocks within their sequence at T = 1, the bonus token included.
    """

    total: Tensor
    cross_entropy: Tensor
    survival: Tensor
    tau: float


class Trainer:
    """Owns the frozen target, the model and the optimizer of one run."""

    def __init__(self, run: TrainConfig) -> None:
        self.run = run
        self.kernels = dspark_kernels.load()
        self.target_directory = resolve_model(run.model)
        corpus = Corpus.load(Path(run.corpus))
        longest = int(np.diff(corpus.start).max())
        self.split = Split.of(corpus, run.held_out, run.seed, run.reuse)
        target = Decoder.load(self.target_directory, torch.bfloat16, self.kernels)
        bfloat16 = multiplies_in_bfloat16(run.precision)
        torch.manual_seed(run.seed)
        embedding = target.embed.weight.float()
        self.model = draft_model(run, self.target_directory, embedding, longest, bfloat16=bfloat16)
        self.features = TargetFeatures(
            target, run.target_layer_ids, corpus, cache_dir() / "features" / self._features_key(), run.cache_gib
        )
        self._head = embedding if target.config.tie_word_embeddings else target_head(self.target_directory).float()
        # Rows of the head that the loss sees, and the index of each token among them (-1: not among them).
        drafted = self._head
        self._place: Tensor | None = None
        self.draft_tokens: Tensor | None = None
        if run.vocabulary is not None and run.vocabulary < len(self._head):
            kept = torch.from_numpy(corpus.frequent(run.vocabulary, len(self._head)))
            self._place = torch.full((len(self._head),), -1).scatter_(0, kept, torch.arange(len(kept)))
            self.draft_tokens = kept
            drafted = self._head[kept]
        self.drafted_head = FrozenHead(drafted, self.kernels, bfloat16=bfloat16)
        if run.weights:
            load_weights(self.model, self.draft_tokens, self.target_directory, Path(run.weights))
        elif run.init == "target":
            initialise_from_target(self.model, self.target_directory)
        named = list(self.model.named_parameters())
        markov = [parameter for name, parameter in named if name.startswith(SEQUENTIAL)]
        others = [parameter for name, parameter in named if not name.startswith(SEQUENTIAL)]
        self._rates = [run.learning_rate, run.learning_rate * run.markov_rate]
        groups = [{"params": others}, {"params": markov}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self._mean = [parameter.detach().clone() for _, parameter in named] if run.averaging else []
        self.step = 0
        self.positions = 0

    def _features_key(self) -> str:
        """Cache key of the features: they depend on the target, the taps and the corpus."""
        corpus = sha256(Path(self.run.corpus).read_bytes()).hexdigest()
        return sha256(f"{self.target_directory}|{self.run.target_layer_ids}|{corpus}".encode()).hexdigest()[:16]

    def batch(self, chosen: list[tuple[int, Integers]]) -> Batch:
        """Gather the blocks of `chosen` sequences: context only as far as the last anchor needs it."""
        gamma, corpus = self.run.block_size, self.split.corpus
        taps, states, context_tokens, positions, anchors, previous, labels, inside = [], [], [], [], [], [], [], []
        target: list[Tensor] = []
        target_rows: list[Tensor] = []
        logsums: list[Tensor] = []
        spans: list[tuple[int, int, int, int]] = []
        t0 = b0 = u0 = 0
        for index, starts in chosen:
            tokens = torch.from_numpy(corpus.sequence(index))
            at = torch.from_numpy(starts)
            features, hidden = self.features.of(index, min(len(tokens), int(at[-1]) + gamma))
            context = int(at[-1])
            taps.append(features[:context])
            states.append(hidden[:context])
            context_tokens.append(tokens[:context])
            positions.append(torch.arange(context))
            anchors.append(at)
            places = at.unsqueeze(1) + torch.arange(gamma)  # of x_{k-1}; the target's row there predicts x_k
            within = places + 1 < len(tokens)
            inside.append(within)
            previous.append(tokens[places.clamp(max=len(tokens) - 1)])
            labels.append(tokens[(places + 1).clamp(max=len(tokens) - 1)])
            distinct, which = places[within].unique(return_inverse=True)
            target.append(hidden[distinct])
            if self._place is not None:
                logsums.append(self.features.logsum(index, len(features))[distinct])
            target_rows.append(which + u0)
            spans.append((t0, t0 + context, b0, b0 + len(at)))
            t0, b0, u0 = t0 + context, b0 + len(at), u0 + len(distinct)
        rows = torch.cat(inside).flatten().nonzero().squeeze(1)
        return Batch(
            Blocks(
                torch.cat(taps).float(),
                torch.cat(states).float(),
                torch.cat(context_tokens),
                torch.cat(positions),
                torch.cat(anchors),
                torch.cat(previous),
                spans,
            ),
            rows,
            torch.cat(labels).flatten()[rows],
            torch.exp(-(rows % gamma) / self.run.decay),
            torch.cat(target).float(),
            torch.cat(target_rows),
            torch.cat(logsums) if logsums else None,
        )

    def losses(self, batch: Batch) -> Losses:
        """L = ce CE + tv L1 + confidence BCE, each a weighted mean over slots (DSPARK.md, "Training").

        If the loss sees a part of the vocabulary, the draft's distribution is over that part and the target's over all
        of it: survival is then the same as in the engine.
        """
        hidden, latent, confidence = self.model(batch.blocks)
        weight = batch.weight / batch.weight.sum()
        labels, ce_weight = batch.labels, self.run.ce_weight * weight
        if self._place is not None:
            labels = self._place[labels]
            ce_weight = ce_weight * (labels >= 0)
            labels = labels.clamp(min=0)
        total, cross_entropy, distance = VocabularyLoss.apply(
            hidden.flatten(0, 1)[batch.rows],
            latent.flatten(0, 1)[batch.rows],
            self.model.w2,
            self.drafted_head,
            batch.target,
            batch.target_rows,
            batch.logsum,
            labels,
            ce_weight,
            self.run.tv_weight * weight,
            self.kernels,
        )  # type: ignore[no-untyped-call]
        survival = (1 - distance / 2).clamp(0, 1)
        if confidence is not None:
            logits = confidence.flatten()[batch.rows]
            errors = F.binary_cross_entropy_with_logits(logits, survival, reduction="none")
            total = total + self.run.confidence_weight * (weight * errors).sum()
        return Losses(total, cross_entropy, survival, tau_and_positions(self._whole_blocks(batch, survival))[0])

    def train_step(self) -> Losses:
        """One optimizer step; the next call does the next one."""
        run = self.run
        factor = schedule(self.step, run.steps, run.warmup, constant=run.schedule == "constant")
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        batch = self.batch(self.split.step(self.step, run.sequences_per_step, run.anchors_per_sequence))
        losses = self.losses(batch)
        self.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), run.clip)
        self.optimizer.step()
        self.step += 1
        self.positions += len(batch.rows)
        if self._mean:
            # A short memory at first, so that the initial weights are soon forgotten.
            kept = min(run.averaging, self.step / (self.step + 10))
            current = [parameter.detach() for parameter in self.model.parameters()]
            torch._foreach_lerp_(self._mean, current, 1 - kept)
        return losses

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """A context in which the model holds the running mean of its weights, if the run keeps one."""
        current = [parameter.detach().clone() for parameter in self.model.parameters()] if self._mean else []
        self._fill(self._mean)
        try:
            yield
        finally:
            self._fill(current)

    @torch.no_grad()
    def _fill(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.model.parameters(), values, strict=False):
            parameter.copy_(value)

    @torch.no_grad()
    def evaluate(self, anchors: int = 16) -> tuple[list[float], list[float]]:
        """Held-out mean of 1 - TV and of argmax agreement, by position, over blocks that lie within their sequence.

        Along the target's own text, with the target over the whole vocabulary. Each list is tau, then the positions.
        """
        survivals, matches = [], []
        for index in self.split.held_out[:EVALUATED]:
            batch = self.batch(self.split.blocks([index], anchors, [index]))
            hidden, latent, _ = self.model(batch.blocks)
            logits = hidden.flatten(0, 1)[batch.rows] @ self.drafted_head.weight.T
            if latent.shape[-1]:
                logits += latent.flatten(0, 1)[batch.rows] @ self.model.w2.T
            if self.draft_tokens is not None:  # the engine never drafts what the loss never saw
                drafted, logits = logits, torch.full((len(logits), len(self._head)), -1e30)
                logits[:, self.draft_tokens] = drafted
            target = batch.target @ self._head.T
            match = self.kernels.argmax(logits) == self.kernels.argmax(target)[batch.target_rows]
            zeros, ones = torch.zeros(len(logits)), torch.ones(len(target))
            _, distance = self.kernels.draft_loss(logits, target, batch.target_rows, batch.labels, ones, zeros, zeros)
            survivals.append(self._whole_blocks(batch, 1 - distance / 2))
            matches.append(self._whole_blocks(batch, match.float()))
        return tau_and_positions(torch.cat(survivals)), tau_and_positions(torch.cat(matches))

    def _whole_blocks(self, batch: Batch, values: Tensor) -> Tensor:
        slots = torch.full((batch.blocks.previous.numel(),), -1.0)
        slots[batch.rows] = values
        slots = slots.view(-1, self.run.block_size)
        return slots[(slots >= 0).all(1)]

    def save(self, path: Path) -> None:
        """Save the whole state atomically: the file is either the old or the new one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "step": self.step,
            "positions": self.positions,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "mean": self._mean,
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def restore(self, path: Path) -> None:
        """Continue from a saved state."""
        state: dict[str, Any] = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.positions, self._mean = state["step"], state["positions"], state["mean"]


def schedule(step: int, steps: int, warmup: float, *, constant: bool = False) -> float:
    """Linear warm-up, then a cosine to zero at the last step, or no change; a factor of the learning rate."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    if constant:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def tau_and_positions(survival: Tensor) -> list[float]:
    """[tau, then the mean by position] of conditional survivals [blocks, gamma]; tau counts the bonus token."""
    tau = 1 + survival.cumprod(dim=1).sum(dim=1).mean()
    return [float(tau), *survival.mean(dim=0).tolist()]


def train(run: TrainConfig) -> Path:
    """Run a training to its end, or continue one; returns the checkpoint's directory.

    The state is in the user's cache, the log and the checkpoint in `run.output`. Raises ConfigError without matplotlib,
    which draws the learning curve.
    """
    figures.check()
    keep_freed_memory()
    with products_in(run.precision):
        return _train(run)


def multiplies_in_bfloat16(precision: str) -> bool:
    """Whether a run of this `precision` multiplies in bfloat16 on this processor."""
    return precision == "bfloat16" or (precision == "auto" and (has_amx() or has_bfloat16_pairs()))


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """A context in which, with AMX, products of float32 tensors too are multiplied in bfloat16, if the run does so.

    oneDNN then rounds the factors itself. Without AMX tiles that costs as much as it gains (docs/experiments.md).
    """
    before = torch.get_float32_matmul_precision()
    if multiplies_in_bfloat16(precision) and has_amx():
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _train(run: TrainConfig) -> Path:
    output = Path(run.output)
    output.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(run)
    state = cache_dir() / "training" / sha256(run.identity.encode()).hexdigest()[:16] / "state.pt"
    if state.exists():
        trainer.restore(state)
    log = output / "log.csv"
    earlier = list(_rows_before(log, trainer.step))
    began = time.monotonic()
    with log.open("w", newline="") as file, tqdm(total=run.steps, initial=trainer.step, unit="step") as bar:
        writer = csv.DictWriter(file, LOG_FIELDS)
        writer.writeheader()
        writer.writerows(earlier)
        seconds = float(earlier[-1]["seconds"]) if earlier else 0.0
        recent: list[tuple[float, float, float]] = []
        since, tau = trainer.positions, 0.0
        while trainer.step < run.steps:
            losses = trainer.train_step()
            recent.append(
                (float(losses.total.detach()), float(losses.cross_entropy.mean()), float(losses.survival.mean()))
            )
            tau += (losses.tau - tau) / min(len(recent), 50)
            rate = (trainer.positions - since) / (time.monotonic() - began)
            bar.update()
            bar.set_postfix(loss=f"{recent[-1][0]:.3f}", tau=f"{tau:.2f}", pos_s=f"{rate:.0f}")
            done = trainer.step == run.steps
            if trainer.step % run.eval_every == 0 or done:
                loss, cross_entropy, survival = np.mean(recent, axis=0).tolist()
                with trainer.averaged():
                    held_out, greedy = trainer.evaluate()
                row = {
                    "step": trainer.step,
                    "positions": trainer.positions,
                    "loss": loss,
                    "cross_entropy": cross_entropy,
                    "survival": survival,
                    "held_out_tau": held_out[0],
                    "held_out_greedy_tau": greedy[0],
                    "seconds": seconds + time.monotonic() - began,
                }
                by_position = " ".join(f"{value:.2f}" for value in held_out[1:])
                writer.writerow({k: round(v, 4) for k, v in row.items()})
                file.flush()
                plot_training(log, output / "curve.png")
                recent = []
                bar.write(
                    f"step {trainer.step}: {trainer.positions / 1e6:.2f} M positions, held-out tau {held_out[0]:.3f} "
                    f"(greedy {greedy[0]:.3f}), by position {by_position}"
                )
            if trainer.step % run.save_every == 0 or done:
                trainer.save(state)
                with trainer.averaged():
                    export(trainer.model, run, trainer.target_directory, trainer.draft_tokens, output)
    return output


def _rows_before(log: Path, step: int) -> Iterator[dict[str, str]]:
    """Log rows of an earlier part of the run, up to the step of the restored state."""
    if not log.exists():
        return
    with log.open(newline="") as file:
        yield from (row for row in csv.DictReader(file) if int(row["step"]) <= step)
