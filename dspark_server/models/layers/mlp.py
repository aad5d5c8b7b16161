"""The gated feed-forward: down(activation(gate x) * up x)."""

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from dspark_server.models.layers.parts import Parts
from dspark_server.runtime.linear import Linear

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True)
class MlpConfig:
    """`features` is the width between the projections."""

    features: int
    activation: Activation = "silu"
    bias: bool = False

    @property
    def parts(self) -> int:
        """The number of features, which ranks divide."""
        return self.features

    def shared_by(self, size: int) -> "MlpConfig":
        """Return the share of one of `size` ranks."""
        return replace(self, features=self.features // size)


class Mlp:
    """The feed-forward of one layer, without the norm before it."""

    def __init__(self, parts: Parts, config: MlpConfig, prefix: str) -> None:
        """Read this rank's share of the weights under `prefix`, such as "model.layers.3.mlp."."""
        features = config.features
        own = parts.group.share(features)
        rows = {f"{prefix}gate_proj": (features, own), f"{prefix}up_proj": (features, own)}
        self.gate_up = Linear(*parts.fused(rows, parts.hidden, config.bias), parts.kernels)
        self.down = Linear(*parts.summed(f"{prefix}down_proj", features, own, config.bias), parts.kernels)
        self._activate = {"silu": parts.kernels.silu_mul, "gelu_tanh": parts.kernels.gelu_tanh_mul}[config.activation]
        self._group = parts.group

    @property
    def products(self) -> list[Linear]:
        """Its matrix products, in order."""
        return [self.gate_up, self.down]

    def forward(self, x: Tensor) -> Tensor:
        """x [N, D] -> [N, D], the sum of all ranks."""
        return self._group.all_reduce(self.down(self._activate(self.gate_up(x))))
