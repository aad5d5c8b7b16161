"""A family of decoders: what a file of a family provides, and the registry lists."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from dspark_server.models.config import LayerConfig, ModelConfig
from dspark_server.models.fields import Fields
from dspark_server.models.layers.parts import Parts
from dspark_server.runtime.batch import Batch
from dspark_server.runtime.kv import LayerCache
from dspark_server.runtime.linear import Linear
from dspark_server.runtime.paging import CacheRows


class KeepsRows(Protocol):
    """A layer's attention, of any kind."""

    def caches(self, length: int) -> list[CacheRows]:
        """The kinds of rows that it keeps, with this rank's heads, for sequences of up to `length` tokens."""


class Layer(Protocol):
    """A decoder layer over the residual stream; serves the target (causal) and a drafter (not causal)."""

    @property
    def attention(self) -> KeepsRows:
        """Its attention."""

    @property
    def products(self) -> list[Linear]:
        """The layer's matrix products in order; they are the lower bound of a pass's time (PERFORMANCE)."""

    def forward(
        self, delta: Tensor | None, residual: Tensor, batch: Batch, caches: Sequence[LayerCache], causal: bool = True
    ) -> Tensor | None:
        """Run the layer and return its delta [N, D]; the layer's output is `residual` + the returned delta.

        `residual` [N, D] is updated in place; `delta` [N, D] is the previous layer's result (it may be overwritten).
        None stands for zero. `caches`, one for each kind of rows, receive the rows of this batch's tokens. With
        causal=False each token sees all tokens of its run (a draft block).
        """


@dataclass(frozen=True)
class Family:
    """Functions that read a family's config.json, and build a layer from the tensors under a prefix.

    `parse` takes the fields of config.json and of generation_config.json. `prefixes` are those that the model's own
    tensors may have, `embedding` and `head` the names of these matrices. Tensors whose names begin with one of `unused`
    are not needed for text. `chat_template` is a Jinja file for checkpoints that have none.
    """

    parse: Callable[[Fields, Fields], ModelConfig]
    layer: Callable[[Parts, LayerConfig, str], Layer]
    prefixes: tuple[str, ...] = ("model.",)
    embedding: str = "embed_tokens.weight"  # after the prefix
    head: str = "lm_head.weight"
    unused: tuple[str, ...] = ()
    chat_template: Path | None = None
