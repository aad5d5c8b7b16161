"""The sequential heads that correct each draft position for the token before it, and the confidence head.

Shapes: R requests, D hidden size, r Markov rank, V vocabulary. W1 is [V, r], W2 is [V, r] (applied as r -> V).
Source: DSpark §3.1-3.2 and the DeepSpec checkpoint format.
"""

from abc import ABC, abstractmethod

import torch
from dspark_kernels import Kernels
from torch import Tensor

from dspark_server.errors import CheckpointError
from dspark_server.models.loading import WeightReader
from dspark_server.runtime.linear import Linear


class SequentialHead(ABC):
    """Gives the logit correction B_k from the token before position k. State is whatever a head carries along."""

    def __init__(self, w1: Tensor, w2: Linear) -> None:
        self._w1 = w1
        self._w2 = w2

    @property
    def rank(self) -> int:
        """r, the width of a token's Markov embedding."""
        return self._w1.shape[1]

    def embedding(self, previous: Tensor) -> Tensor:
        """W1[x_{k-1}]: tokens [R] -> [R, r]."""
        return self._w1[previous]

    def start(self, requests: int) -> Tensor | None:
        """State before the first position."""
        return None

    @abstractmethod
    def bias(self, embedding: Tensor, hidden: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """B_k [R, V] in float32 and the next state, from W1[x_{k-1}] [R, r] and h_k [R, D]."""

    def _project(self, latent: Tensor) -> Tensor:
        return self._w2(latent, out_float32=True)


class VanillaHead(SequentialHead):
    """B_k = W1[x_{k-1}] W2."""

    def bias(self, embedding: Tensor, hidden: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self._project(embedding), None


class GatedHead(SequentialHead):
    """B_k = (sigmoid(W_gate [h_k; W1[x_{k-1}]] + b) * W1[x_{k-1}]) W2."""

    def __init__(self, w1: Tensor, w2: Linear, gate: Linear) -> None:
        super().__init__(w1, w2)
        self._gate = gate

    def bias(self, embedding: Tensor, hidden: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        gate = torch.sigmoid(self._gate(torch.cat([hidden, embedding], dim=-1)))
        return self._project(gate * embedding), None


class RNNHead(SequentialHead):
    """A gated recurrence over the block: s_k = sig(g) s_{k-1} + (1 - sig(g)) tanh(c), B_k = W2 tanh(o), s_0 = 0."""

    def __init__(self, w1: Tensor, w2: Linear, joint: Linear) -> None:
        super().__init__(w1, w2)
        self._joint = joint

    def start(self, requests: int) -> Tensor | None:
        return torch.zeros(requests, self.rank, dtype=self._w1.dtype)

    def bias(self, embedding: Tensor, hidden: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert state is not None
        gate, candidate, output = self._joint(torch.cat([state, embedding, hidden], dim=-1)).chunk(3, dim=-1)
        kept = torch.sigmoid(gate)
        return self._project(torch.tanh(output)), kept * state + (1 - kept) * torch.tanh(candidate)


class ConfidenceHead:
    """Logit of c_k, the chance that x_k survives given its predecessors did; it never sees x_k (DSpark §3.2.1)."""

    def __init__(self, weight: Tensor, bias: Tensor, *, with_markov: bool) -> None:
        self._weight = weight.float()
        self._bias = bias.float()
        self._with_markov = with_markov

    def logit(self, hidden: Tensor, embedding: Tensor | None) -> Tensor:
        """[R] float32 from h_k [R, D] and, where the head was trained with it, W1[x_{k-1}] [R, r]."""
        features = hidden.float()
        if self._with_markov:
            assert embedding is not None
            features = torch.cat([features, embedding.float()], dim=-1)
        return features @ self._weight[0] + self._bias


def build_head(
    kind: str, reader: WeightReader, *, rank: int, hidden_size: int, vocab_size: int, kernels: Kernels
) -> SequentialHead | None:
    """The head that a checkpoint's `markov_head_type` and `markov_rank` name; rank 0 is none (DFlash).

    Raises CheckpointError for a kind that does not exist, or a tensor that is missing or misshapen.
    """
    if rank == 0:
        return None
    w1 = reader.take("markov_head.markov_w1.weight", (vocab_size, rank))
    w2 = Linear(reader.take("markov_head.markov_w2.weight", (vocab_size, rank)), None, kernels)
    if kind == "vanilla":
        return VanillaHead(w1, w2)
    if kind == "gated":
        gate = reader.take("markov_head.gate_proj.weight", (rank, hidden_size + rank))
        return GatedHead(w1, w2, Linear(gate, reader.take("markov_head.gate_proj.bias", (rank,)), kernels))
    if kind == "rnn":
        joint = reader.take("markov_head.joint_proj.weight", (3 * rank, 2 * rank + hidden_size))
        return RNNHead(w1, w2, Linear(joint, reader.take("markov_head.joint_proj.bias", (3 * rank,)), kernels))
    raise CheckpointError(f"markov_head_type {kind!r} is not known; vanilla, gated and rnn are.")
