"""A matrix stored in 8 or 4 bits: integers, and a scale for each group of them; what every integer format comes to.

Shapes: O output features, K input features, G groups of a row; the last group may be shorter.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class QuantizedMatrix:
    """W[o, k] = scales[o, g] codes[o, k] + offsets[o, g], g = k // group.

    `codes` [O, K] int8: of 8 `bits`, or of 4, signed where there are no offsets and unsigned where there are. `scales`
    [O, G] float32; `offsets` [O, G] float32, None: 0. `order` [K]: the columns are these of the input's, in this order
    (act-order); None: as they are.
    """

    codes: Tensor
    scales: Tensor
    group: int
    bits: int = 8
    offsets: Tensor | None = None
    order: Tensor | None = None

    def expanded(self, dtype: torch.dtype) -> Tensor:
        """The weight [O, K] that it stands for, in the order of the input's columns."""
        values = self.codes.float()
        of_column = torch.arange(values.shape[1]) // self.group
        values *= self.scales[:, of_column]
        if self.offsets is not None:
            values += self.offsets[:, of_column]
        if self.order is not None:
            values = torch.empty_like(values).index_copy_(1, self.order, values)
        return values.to(dtype)
