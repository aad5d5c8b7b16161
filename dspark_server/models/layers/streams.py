"""Hyper-connections: several residual streams, mixed anew around each half of a layer (DeepSeek-V4, mHC).

The streams of a token are one row of the residual. Everything here is computed in float32.

Shapes: N tokens, n streams of width D.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dspark_server.models.layers.parts import Parts


@dataclass(frozen=True)
class StreamConfig:
    """`count` streams; Sinkhorn's `iterations`, floored by `eps`, make their mixing matrix doubly stochastic."""

    count: int
    iterations: int
    eps: float


class StreamMix:
    """Reads one normalised input from the streams, and writes an output into them."""

    def __init__(self, parts: Parts, config: StreamConfig, prefix: str, norm: str) -> None:
        """Read the weights under `prefix`, such as "layers.3.hc_attn_", and `norm`, the norm of what is read."""
        count = config.count
        rows = (2 + count) * count
        self._config, self._eps, self._kernels = config, parts.eps, parts.kernels
        self._fn = parts.reader.take(f"{prefix}fn", (rows, count * parts.hidden), dtype=torch.float32)
        self._base = parts.reader.take(f"{prefix}base", (rows,), dtype=torch.float32)
        self._scale = parts.reader.take(f"{prefix}scale", (3,), dtype=torch.float32)
        self._norm = parts.norm(norm)

    def read(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The input [N, D] for streams [N, n D]; for `write` the output's weights [N, n] and the mixing [N, n, n]."""
        config = self._config
        return self._kernels.read_streams(
            streams, self._fn, self._base, self._scale, self._norm, config.iterations, config.eps, self._eps
        )

    def write(self, streams: Tensor, output: Tensor, post: Tensor, mixing: Tensor) -> None:
        """Write the output [N, D] into the streams [N, n D], in place."""
        self._kernels.write_streams(streams, output, post, mixing)


class StreamHead:
    """One hidden row of a token's streams, for the final norm."""

    def __init__(self, parts: Parts, config: StreamConfig, prefix: str) -> None:
        """Read the weights under `prefix`, such as "hc_head_"."""
        self.count = config.count
        self._config, self._eps = config, parts.eps
        self._fn = parts.reader.take(f"{prefix}fn", (config.count, config.count * parts.hidden), dtype=torch.float32)
        self._base = parts.reader.take(f"{prefix}base", (config.count,), dtype=torch.float32)
        self._scale = parts.reader.take(f"{prefix}scale", (1,), dtype=torch.float32)

    def begin(self, embedded: Tensor) -> Tensor:
        """The streams [N, n D] of embeddings [N, D], all equal."""
        return embedded.repeat(1, self.count)

    def end(self, streams: Tensor) -> Tensor:
        """Streams [N, n D] -> [N, D]."""
        wide = streams.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self._eps)
        pre = torch.sigmoid(normed @ self._fn.T * self._scale + self._base) + self._config.eps
        return (pre.unsqueeze(-1) * torch.unflatten(wide, -1, (self.count, -1))).sum(1).to(streams.dtype)

    def mean(self, streams: Tensor) -> Tensor:
        """The mean [N, D] of the streams [N, n D], a tap."""
        return torch.unflatten(streams.float(), -1, (self.count, -1)).mean(1).to(streams.dtype)
