"""DFlash2's layer: a short dynamic convolution along each block before and after attention and the feed-forward.

Shapes: N tokens, blocks of W after another; D the model's width, G groups of channels, T taps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_server.errors import CheckpointError
from dspark_server.models.config import LayerConfig
from dspark_server.models.layers.attention import Attention
from dspark_server.models.layers.mlp import Mlp, MlpConfig
from dspark_server.models.layers.parts import Parts
from dspark_server.runtime.batch import Batch
from dspark_server.runtime.kv import LayerCache
from dspark_server.runtime.linear import Linear


@dataclass(frozen=True)
class ConvConfig:
    """`taps` tokens of a block of `width` make one: itself and those before; `group_size` channels share a kernel."""

    taps: int
    group_size: int
    width: int


class BlockConv:
    """out_i = sum_t (base_t + dynamic_t(x_i)) * in_{i-t}, tap 0 being the token itself; two of them, around a sublayer.

    The dynamic parts of both come from the input of the first.
    """

    def __init__(self, parts: Parts, config: ConvConfig, prefix: str) -> None:
        """Read the weights under `prefix`, such as "layers.0.attention_conv."."""
        if parts.hidden % config.group_size:
            raise CheckpointError(f"conv_group_size {config.group_size} does not divide hidden_size {parts.hidden}.")
        self._config = config
        groups = parts.hidden // config.group_size
        base = parts.reader.take(f"{prefix}base_kernel", (2, config.taps, parts.hidden))
        self._base = base.float().view(2, config.taps, groups, config.group_size)
        self.kernels = Linear(parts.matrix(f"{prefix}kernel_projection", 2 * config.taps * groups), None, parts.kernels)

    def before(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The sublayer's input [N, D] for x [N, D], and the dynamic kernels [N, T, G] of its output."""
        dynamic = self.kernels(x).float().view(len(x), 2, self._config.taps, -1)
        return self._convolve(x, dynamic[:, 0], 0), dynamic[:, 1]

    def after(self, x: Tensor, dynamic: Tensor) -> Tensor:
        """The convolution of the sublayer's output x [N, D] by the kernels that `before` gave."""
        return self._convolve(x, dynamic, 1)

    def _convolve(self, x: Tensor, dynamic: Tensor, side: int) -> Tensor:
        width, taps = self._config.width, self._config.taps
        blocks = x.float().view(-1, width, *self._base.shape[2:])  # [blocks, W, G, g]
        kernels = dynamic.view(-1, width, taps, self._base.shape[2], 1)
        out = torch.zeros_like(blocks)
        for tap in range(taps):
            shifted = F.pad(blocks, (0, 0, 0, 0, tap, 0))[:, :width]
            out += (self._base[side, tap] + kernels[:, :, tap]) * shifted
        return out.view(x.shape).to(x.dtype)


class ConvLayer:
    """A layer of norms before attention and feed-forward, each between two convolutions."""

    def __init__(self, parts: Parts, config: LayerConfig, prefix: str, conv: ConvConfig) -> None:
        """Read the weights under `prefix`, such as "layers.0."."""
        assert isinstance(config.mlp, MlpConfig)
        self._kernels, self._eps = parts.kernels, parts.eps
        self._input_norm = parts.norm(f"{prefix}input_layernorm")
        self._post_attention_norm = parts.norm(f"{prefix}post_attention_layernorm")
        self.attention = Attention.load(parts, config.attention, f"{prefix}self_attn.")
        self.mlp = Mlp(parts, config.mlp, f"{prefix}mlp.")
        self._attention_conv = BlockConv(parts, conv, f"{prefix}attention_conv.")
        self._mlp_conv = BlockConv(parts, conv, f"{prefix}mlp_conv.")

    @property
    def products(self) -> list[Linear]:
        """The layer's matrix products in order."""
        convolutions = (self._attention_conv.kernels, self._mlp_conv.kernels)
        return [convolutions[0], *self.attention.products, convolutions[1], *self.mlp.products]

    def forward(
        self, delta: Tensor | None, residual: Tensor, batch: Batch, caches: Sequence[LayerCache], causal: bool = True
    ) -> Tensor:
        """See `Layer.forward`, for whole blocks."""
        (cache,) = caches
        kernels, eps = self._kernels, self._eps
        if delta is None:
            x = kernels.rms_norm(residual, self._input_norm, eps)
        else:
            x = kernels.add_rms_norm(delta, residual, self._input_norm, eps)
        x, dynamic = self._attention_conv.before(x)
        attended = self._attention_conv.after(self.attention.forward(x, batch, cache, causal), dynamic)
        x, dynamic = self._mlp_conv.before(kernels.add_rms_norm(attended, residual, self._post_attention_norm, eps))
        return self._mlp_conv.after(self.mlp.forward(x), dynamic)
