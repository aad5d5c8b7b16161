"""Builder of a model's parts: the reader, kernels, ranks and rotary tables that they have in common."""

from dataclasses import dataclass, field

import torch
from dspark_kernels import Kernels
from torch import Tensor

from dspark_server.models.layers.rope import RopeConfig, rotary_table
from dspark_server.models.loading import WeightReader
from dspark_server.runtime.group import ONE_RANK, Group


@dataclass(frozen=True)
class Parts:
    """Builds the parts of a model of width `hidden` for sequences of `length` tokens.

    Rotary tables have `positions` rows, a few more than `length`: a draft block may begin at the last position.
    """

    reader: WeightReader
    kernels: Kernels
    hidden: int
    eps: float
    length: int
    positions: int
    group: Group = ONE_RANK
    _tables: dict[tuple[RopeConfig, int], Tensor] = field(default_factory=dict)

    def norm(self, name: str, size: int | None = None) -> Tensor:
        """The weight of a norm over `size` channels (None: the model's width)."""
        return self.reader.take(f"{name}.weight", (size or self.hidden,))

    def matrix(self, name: str, rows: int) -> Tensor:
        """A projection of the model's width to `rows` features, whole on every rank."""
        return self.reader.take(f"{name}.weight", (rows, self.hidden))

    def fused(self, rows: dict[str, tuple[int, slice]], columns: int, bias: bool) -> tuple[Tensor, Tensor | None]:
        """Projections of one input as one matrix: by name the rows of the whole, and those of this rank."""
        weights = [self.reader.take(f"{name}.weight", (n, columns), own) for name, (n, own) in rows.items()]
        biases = [self.reader.take(f"{name}.bias", (n,), own) for name, (n, own) in rows.items() if bias]
        return torch.cat(weights), torch.cat(biases) if bias else None

    def summed(self, name: str, columns: int, own: slice, bias: bool) -> tuple[Tensor, Tensor | None]:
        """This rank's columns of a projection to the model's width, whose products are summed over the ranks."""
        weight = self.reader.take(f"{name}.weight", (self.hidden, columns), columns=own)
        added = self.reader.take(f"{name}.bias", (self.hidden,)) if bias else None
        # A copy, not a view of the file's rows; only one rank adds the bias.
        return weight.clone(memory_format=torch.contiguous_format), added if self.group.rank == 0 else None

    def rotary_table(self, rope: RopeConfig, head_dim: int) -> Tensor:
        """The rotary table [P, d] float32, one for all layers that have the same."""
        if (rope, head_dim) not in self._tables:
            table = rotary_table(rope, head_dim, self.length, positions=self.positions)
            self._tables[rope, head_dim] = table.to(self.reader.where)
        return self._tables[rope, head_dim]
