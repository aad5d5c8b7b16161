"""Sequential temperature scaling: from what the confidence head says to what really survives (DSpark §3.2.1).

One temperature per draft position divides the logit of c_k; they are fitted left to right on the cumulative product.
Survival depends on the sampling temperature, so there are two sets, and requests in between get what lies between.
Slots that follow a copy are judged by its length too (`CopyTables.trust`).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dspark_server.errors import CheckpointError
from dspark_server.speculation.copying import CopyBias, CopyTables

CALIBRATION_FILE = "calibration.json"


@dataclass(frozen=True)
class Calibration:
    """Temperatures by draft position [gamma]: `greedy` at sampling temperature 0, `sampled` at 1."""

    greedy: tuple[float, ...]
    sampled: tuple[float, ...]
    copying: CopyTables = field(default_factory=CopyTables)

    @classmethod
    def identity(cls, gamma: int) -> "Calibration":
        """What the head says is what is meant."""
        return cls((1.0,) * gamma, (1.0,) * gamma)

    @classmethod
    def load(cls, directory: Path, gamma: int) -> "Calibration":
        """Read the temperatures stored beside a checkpoint; the identity where there are none.

        Raises CheckpointError if the file is not gamma positive numbers for each of the two.
        """
        path = directory / CALIBRATION_FILE
        if not path.exists():
            return cls.identity(gamma)
        try:
            fields: Any = json.loads(path.read_text())
            greedy, sampled = (tuple(float(t) for t in fields["temperatures"][name]) for name in ("0", "1"))
            copying = CopyTables.parse(fields["copying"]) if "copying" in fields else CopyTables()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} holds no calibration: {error!r}. Run dspark-server calibrate.") from None
        if {len(greedy), len(sampled)} != {gamma} or not all(0 < t < float("inf") for t in greedy + sampled):
            raise CheckpointError(f"{path} must hold {gamma} positive temperatures each for 0 and 1.")
        return cls(greedy, sampled, copying)

    def save(self, directory: Path, about: dict[str, object]) -> None:
        """Store beside a checkpoint; `about` says how it was fitted."""
        temperatures = {"0": list(self.greedy), "1": list(self.sampled)}
        fields = {"temperatures": temperatures, "copying": asdict(self.copying), **about}
        (directory / CALIBRATION_FILE).write_text(json.dumps(fields, indent=2) + "\n")

    def survival(self, confidence: Tensor, temperature: Tensor, copies: CopyBias | None = None) -> Tensor:
        """a_k [R, gamma] from the logits of c_k [R, gamma] and each request's sampling temperature [R]."""
        trust = None if copies is None else (copies.on, copies.odds, *self.trust(temperature, copies.bucket))
        return survival_from(confidence, self.scale(temperature), trust)

    def scale(self, temperature: Tensor) -> Tensor:
        """What divides the logits of c_k [R, gamma], by sampling temperature [R]."""
        greedy, sampled = (logarithms.to(temperature.device) for logarithms in self._logarithms)
        share = temperature.clamp(0, 1).unsqueeze(1)
        return torch.exp(torch.lerp(greedy, sampled, share.to(greedy.dtype)))

    def trust(self, temperature: Tensor, bucket: Tensor) -> tuple[Tensor, Tensor]:
        """How far favoured tokens are believed: weights [R, 2] and offsets [R, gamma]. bucket [R, gamma]: `buckets`."""
        trust = self.copying.trust(temperature)
        return trust[:, :2], trust[:, 2:].gather(1, bucket)

    @cached_property
    def _logarithms(self) -> tuple[Tensor, Tensor]:
        return _log(self.greedy), _log(self.sampled)


def survival_from(confidence: Tensor, scale: Tensor, favoured: tuple[Tensor, Tensor, Tensor, Tensor] | None) -> Tensor:
    """a_k [R, gamma] from confidence logits and what `Calibration` makes of the requests.

    favoured: the slots that were, their log odds before the bias (`CopyBias`), and what `Calibration.trust` says.
    """
    chance = confidence / scale
    if favoured is not None:
        on, odds, weights, offsets = favoured
        copied = weights[:, :1] * confidence + weights[:, 1:] * odds + offsets
        chance = torch.where(on, copied, chance)
    return torch.sigmoid(chance).cumprod(dim=1)


def _log(temperatures: Sequence[float]) -> Tensor:
    return torch.tensor(temperatures, dtype=torch.float32).log()
