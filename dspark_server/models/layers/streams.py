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
    """Reads one input from the streams, and writes an output into them."""

    def __init__(self, parts: Parts, config: StreamConfig, prefix: str) -> None:
        """Read the weights under `prefix`, such as "layers.3.hc_attn_"."""
        count = config.count
        rows = (2 + count) * count
        self._config, self._eps = config, parts.eps
        self._fn = parts.reader.take(f"{prefix}fn", (rows, count * parts.hidden), dtype=torch.float32)
        self._base = parts.reader.take(f"{prefix}base", (rows,), dtype=torch.float32)
        self._scale = parts.reader.take(f"{prefix}scale", (3,), dtype=torch.float32)

    def read(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The input [N, D] for streams [N, n D]; for `write` the output's weights [N, n] and the mixing [N, n, n]."""
        count, eps = self._config.count, self._config.eps
        wide = streams.float()
        mixes = normed(wide, self._eps) @ self._fn.T
        before, after, among = mixes.split([count, count, count * count], dim=-1)
        base = self._base.split([count, count, count * count])
        pre = torch.sigmoid(before * self._scale[0] + base[0]) + eps
        post = 2 * torch.sigmoid(after * self._scale[1] + base[1])
        mixing = (among * self._scale[2] + base[2]).unflatten(-1, (count, count)).softmax(-1) + eps
        mixing = mixing / (mixing.sum(-2, keepdim=True) + eps)
        for _ in range(self._config.iterations - 1):
            mixing = mixing / (mixing.sum(-1, keepdim=True) + eps)
            mixing = mixing / (mixing.sum(-2, keepdim=True) + eps)
        x = (pre.unsqueeze(-1) * wide.unflatten(-1, (count, -1))).sum(1)
        return x.to(streams.dtype), post, mixing

    def write(self, streams: Tensor, output: Tensor, post: Tensor, mixing: Tensor) -> None:
        """Mix the streams [N, n D] in place, and add the output [N, D]: X'_k = post_k output + sum_j mixing_jk X_j."""
        wide = streams.float().unflatten(-1, (self._config.count, -1))
        mixed = (mixing.unsqueeze(-1) * wide.unsqueeze(2)).sum(1)
        streams.copy_((mixed + post.unsqueeze(-1) * output.float().unsqueeze(1)).flatten(1))


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
        pre = torch.sigmoid(normed(wide, self._eps) @ self._fn.T * self._scale + self._base) + self._config.eps
        return (pre.unsqueeze(-1) * torch.unflatten(wide, -1, (self.count, -1))).sum(1).to(streams.dtype)

    def mean(self, streams: Tensor) -> Tensor:
        """The mean [N, D] of the streams [N, n D], a tap."""
        return torch.unflatten(streams.float(), -1, (self.count, -1)).mean(1).to(streams.dtype)


def normed(x: Tensor, eps: float) -> Tensor:
    """x [..., C] float32 over its root mean square."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
