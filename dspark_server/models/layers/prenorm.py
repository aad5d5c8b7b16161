"""The usual layer: a norm before attention, and a norm before the feed-forward; fused in one call where it can be.

The residual stream is explicit: a layer takes and returns (delta, residual), the stream being residual + delta, so
that each addition is fused with the norm after it.
"""

from collections.abc import Sequence

from dspark_kernels import FusedLayer, LayerParts
from torch import Tensor

from dspark_server.models.config import LayerConfig
from dspark_server.models.layers.attention import Attention
from dspark_server.models.layers.mlp import Mlp
from dspark_server.models.layers.moe import Moe, MoeConfig
from dspark_server.models.layers.parts import Parts
from dspark_server.runtime.batch import Batch
from dspark_server.runtime.kv import LayerCache
from dspark_server.runtime.linear import Linear


class PreNormLayer:
    """Attention and feed-forward over the residual stream; serves the target (causal) and a drafter (not causal)."""

    def __init__(self, parts: Parts, config: LayerConfig, prefix: str) -> None:
        """Read the weights under `prefix`, such as "model.layers.3."."""
        self._kernels = parts.kernels
        self._eps = parts.eps
        self._input_norm = parts.norm(f"{prefix}input_layernorm")
        self.attention = Attention.load(parts, config.attention, f"{prefix}self_attn.")
        self._post_attention_norm = parts.norm(f"{prefix}post_attention_layernorm")
        self.mlp: Mlp | Moe
        if isinstance(config.mlp, MoeConfig):
            self.mlp = Moe(parts, config.mlp, f"{prefix}mlp.")
        else:
            self.mlp = Mlp(parts, config.mlp, f"{prefix}mlp.")
        self._fused = self._fuse(parts)

    def _fuse(self, parts: Parts) -> FusedLayer | None:
        """Fuse the layer into one call, if the kernels can, have all packed weights, and there is one rank."""
        attention = self.attention
        if isinstance(self.mlp, Moe):
            return None
        qkv, output, gate_up, down = (product.packed for product in self.products)
        if parts.group.size > 1 or qkv is None or output is None or gate_up is None or down is None:
            return None
        return self._kernels.fuse_layer(
            LayerParts(
                self._input_norm,
                self._post_attention_norm,
                attention.q_norm,
                attention.k_norm,
                qkv,
                output,
                gate_up,
                down,
                q_heads=attention.config.heads,
                kv_heads=attention.config.kv_heads,
                head_dim=attention.config.head_dim,
                window=attention.config.window,
                eps=self._eps,
                scale=attention.scale,
            )
        )

    @property
    def products(self) -> list[Linear]:
        """The layer's matrix products in order; they are the lower bound of a pass's time (PERFORMANCE)."""
        return [*self.attention.products, *self.mlp.products]

    def forward(
        self, delta: Tensor | None, residual: Tensor, batch: Batch, caches: Sequence[LayerCache], causal: bool = True
    ) -> Tensor:
        """See `Layer.forward`."""
        (cache,) = caches
        if self._fused is not None:
            paging = batch.paging[cache.group]
            return self._fused(
                delta,
                residual,
                batch.positions,
                self.attention.table,
                paging.slots,
                cache.keys,
                cache.values,
                batch.query_start,
                paging.context_len,
                paging.block_tables,
                causal,
            )
        kernels, eps = self._kernels, self._eps
        if delta is None:
            x = kernels.rms_norm(residual, self._input_norm, eps)
        else:
            x = kernels.add_rms_norm(delta, residual, self._input_norm, eps)
        attended = self.attention.forward(x, batch, cache, causal)
        return self.mlp.forward(kernels.add_rms_norm(attended, residual, self._post_attention_norm, eps))
