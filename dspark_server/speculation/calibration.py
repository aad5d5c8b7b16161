"""Sequential temperature scaling: from the confidence head's logits to calibrated survival (DSpark §3.2.1).

One temperature per draft position divides the logit of c_k. The paper has nothing else; here an offset is added, since
a temperature does not change a logit of 0, and a head may be wrong there as well (docs/experiments.md). Survival
depends on the sampling temperature, so there are two sets, and temperatures in between are interpolated. Survival of
slots that follow a copy also depends on its length (`CopyTables.trust`).
"""

import json
import math
from dataclasses import asdict, dataclass, field, replace
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
    """Temperatures by draft position [gamma]: `greedy` at sampling temperature 0, `sampled` at 1; likewise the offsets.

    Offsets are in units of a scaled logit; without any they are 0.
    """

    greedy: tuple[float, ...]
    sampled: tuple[float, ...]
    copying: CopyTables = field(default_factory=CopyTables)
    greedy_offset: tuple[float, ...] = ()
    sampled_offset: tuple[float, ...] = ()

    @classmethod
    def identity(cls, gamma: int) -> "Calibration":
        """Calibration that changes nothing: temperatures of 1."""
        return cls((1.0,) * gamma, (1.0,) * gamma)

    @classmethod
    def load(cls, directory: Path, gamma: int, *, confidence: bool = True) -> "Calibration":
        """Read the calibration stored beside a checkpoint; the identity if there is none.

        Without a `confidence` head there is nothing to scale, and a block may have any gamma: only `copying` counts.

        Raises CheckpointError if the file does not hold, for each of the two, gamma positive temperatures and as many
        offsets or none.
        """
        path = directory / CALIBRATION_FILE
        if not path.exists():
            return cls.identity(gamma)
        try:
            fields: Any = json.loads(path.read_text())
            greedy, sampled = (tuple(float(t) for t in fields["temperatures"][name]) for name in ("0", "1"))
            none = {name: [0.0] * gamma for name in ("0", "1")}
            offsets = [tuple(float(b) for b in fields.get("offsets", none)[name]) for name in ("0", "1")]
            copying = CopyTables.parse(fields["copying"]) if "copying" in fields else CopyTables()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} holds no calibration: {error!r}. Run dspark-server calibrate.") from None
        if not confidence:
            return replace(cls.identity(gamma), copying=copying)
        if {len(greedy), len(sampled)} != {gamma} or not all(0 < t < float("inf") for t in greedy + sampled):
            raise CheckpointError(f"{path} must hold {gamma} positive temperatures each for 0 and 1.")
        if any(len(values) != gamma or not all(map(math.isfinite, values)) for values in offsets):
            raise CheckpointError(f"{path} must hold {gamma} finite offsets each for 0 and 1, or no offsets.")
        return cls(greedy, sampled, copying, *offsets)

    def save(self, directory: Path, about: dict[str, object]) -> None:
        """Store beside a checkpoint; `about` describes the fit."""
        fields: dict[str, object] = {"temperatures": {"0": self.greedy, "1": self.sampled}}
        if self.greedy_offset:
            fields["offsets"] = {"0": self.greedy_offset, "1": self.sampled_offset}
        fields |= {"copying": asdict(self.copying), **about}
        (directory / CALIBRATION_FILE).write_text(json.dumps(fields, indent=2) + "\n")

    def survival(self, confidence: Tensor, temperature: Tensor, copies: CopyBias | None = None) -> Tensor:
        """a_k [R, gamma] from the logits of c_k [R, gamma] and each request's sampling temperature [R]."""
        trust = None if copies is None else (copies.on, copies.odds, *self.trust(temperature, copies.bucket))
        return survival_from(confidence, *self.scaling(temperature), trust)

    def scaling(self, temperature: Tensor) -> tuple[Tensor, Tensor]:
        """Divisors of the logits of c_k and offsets added afterwards, [R, gamma] each, by sampling temperature [R]."""
        share = temperature.clamp(0, 1).unsqueeze(1).float()
        logarithms, offsets = (
            torch.lerp(greedy.to(share.device), sampled.to(share.device), share) for greedy, sampled in self._tensors
        )
        return torch.exp(logarithms), offsets

    def trust(self, temperature: Tensor, bucket: Tensor) -> tuple[Tensor, Tensor]:
        """Trust in biased tokens: weights [R, 2] and offsets [R, gamma]. bucket [R, gamma]: `buckets`."""
        trust = self.copying.trust(temperature)
        return trust[:, :2], trust[:, 2:].gather(1, bucket)

    @cached_property
    def _tensors(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(greedy, sampled) logarithms of the temperatures, then offsets; [gamma] float32 each."""
        none = (0.0,) * len(self.greedy)
        temperatures = (torch.tensor(self.greedy).log(), torch.tensor(self.sampled).log())
        return temperatures, (torch.tensor(self.greedy_offset or none), torch.tensor(self.sampled_offset or none))


def survival_from(
    confidence: Tensor, scale: Tensor, shift: Tensor, favoured: tuple[Tensor, Tensor, Tensor, Tensor] | None
) -> Tensor:
    """a_k [R, gamma] from confidence logits and the requests' values from `Calibration`.

    scale and shift [R, gamma]: `Calibration.scaling`. favoured: the biased slots, their log odds before the bias
    (`CopyBias`), and the result of `Calibration.trust`.
    """
    chance = confidence / scale + shift
    if favoured is not None:
        on, odds, weights, offsets = favoured
        copied = weights[:, :1] * confidence + weights[:, 1:] * odds + offsets
        chance = torch.where(on, copied, chance)
    return torch.sigmoid(chance).cumprod(dim=1)
