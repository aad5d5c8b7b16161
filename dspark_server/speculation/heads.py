"""The sequential heads that correct each draft position for the token before it, and the confidence head.

Shapes: R requests, D hidden size, r Markov rank, V vocabulary, Vd draft vocabulary (the tokens that may be drafted: all
of V, or a part). W1 is [V, r], W2 is [Vd, r] (applied as r -> Vd).
Source: DSpark §3.1-3.2 and the DeepSpec checkpoint format.
"""

from abc import ABC, abstractmethod

import torch
from dspark_kernels import Kernels, PackedLinear
from torch import Tensor

from dspark_server.errors import CheckpointError
from dspark_server.models.loading import WeightReader
from dspark_server.runtime.linear import Linear


class SequentialHead(ABC):
    """Gives the logit correction B_k = W2 z_k from the token before position k. State is passed from slot to slot."""

    def __init__(self, w1: Tensor, w2: Tensor, kernels: Kernels) -> None:
        self._w1 = w1
        self._w2 = w2
        self._product = Linear(w2, None, kernels)
        # W1 and W2 for `Kernels.draft_tokens`, if it can run this head.
        self.packed: tuple[Tensor, PackedLinear] | None = None

    @property
    def rank(self) -> int:
        """r, the width of a token's Markov embedding."""
        return self._w1.shape[1]

    @property
    def device(self) -> torch.device:
        """The device of its weights."""
        return self._w1.device

    @property
    def vocab_size(self) -> int:
        """V, the number of tokens that may come before."""
        return self._w1.shape[0]

    def embedding(self, previous: Tensor) -> Tensor:
        """W1[x_{k-1}]: tokens [...] -> [..., r]."""
        return self._w1[previous]

    def start(self, requests: int) -> Tensor | None:
        """State before the first position."""
        return None

    @abstractmethod
    def latent(self, embedding: Tensor, hidden: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """z_k [R, r] and the next state, from W1[x_{k-1}] [R, r] and h_k [R, D]."""

    def bias(self, latent: Tensor) -> Tensor:
        """B_k [R, Vd] in float32 from z_k [R, r]."""
        return self._product(latent, out_float32=True)

    def bias_of(self, latent: Tensor, columns: Tensor) -> Tensor:
        """B_k at some columns: z_k [R, r], columns [R, C] -> [R, C] in float32."""
        return torch.einsum("rcd,rd->rc", self._w2[columns].float(), latent.float())


class VanillaHead(SequentialHead):
    """B_k = W1[x_{k-1}] W2."""

    def __init__(self, w1: Tensor, w2: Tensor, kernels: Kernels) -> None:
        super().__init__(w1, w2, kernels)
        packed = self._product.packed
        if packed is None and (w2.dtype != torch.float32 or kernels.name == "reference"):
            packed = kernels.pack_linear(w2)
        if packed is not None:
            self.packed = (w1.contiguous(), packed)

    def latent(self, embedding: Tensor, hidden: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return embedding, None


class GatedHead(SequentialHead):
    """B_k = (sigmoid(W_gate [h_k; W1[x_{k-1}]] + b) * W1[x_{k-1}]) W2."""

    def __init__(self, w1: Tensor, w2: Tensor, gate: Linear, kernels: Kernels) -> None:
        super().__init__(w1, w2, kernels)
        self._gate = gate

    def latent(self, embedding: Tensor, hidden: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        gate = torch.sigmoid(self._gate(torch.cat([hidden, embedding], dim=-1)))
        return gate * embedding, None


class RNNHead(SequentialHead):
    """A gated recurrence over the block: s_k = sig(g) s_{k-1} + (1 - sig(g)) tanh(c), B_k = W2 tanh(o), s_0 = 0."""

    def __init__(self, w1: Tensor, w2: Tensor, joint: Linear, kernels: Kernels) -> None:
        super().__init__(w1, w2, kernels)
        self._joint = joint

    def start(self, requests: int) -> Tensor | None:
        return torch.zeros(requests, self.rank, dtype=self._w1.dtype, device=self._w1.device)

    def latent(self, embedding: Tensor, hidden: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert state is not None
        gate, candidate, output = self._joint(torch.cat([state, embedding, hidden], dim=-1)).chunk(3, dim=-1)
        kept = torch.sigmoid(gate)
        return torch.tanh(output), kept * state + (1 - kept) * torch.tanh(candidate)


class SelectorHead(SequentialHead):
    """DFlash2's candidate selector: B_k = W2 (W1[x_{k-1}] * (P h_k)), for a few candidates of the position."""

    def __init__(self, w1: Tensor, w2: Tensor, project: Linear, kernels: Kernels) -> None:
        super().__init__(w1, w2, kernels)
        self._project = project

    def latent(self, embedding: Tensor, hidden: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return embedding * self._project(hidden), None

    @classmethod
    def load(
        cls,
        reader: WeightReader,
        rank: int,
        hidden_size: int,
        vocab_size: int,
        draft_vocab_size: int,
        kernels: Kernels,
    ) -> "SelectorHead":
        """Read a checkpoint's `candidate_selector`. W1 is [vocab_size, rank], W2 [draft_vocab_size, rank]."""
        prefix = "candidate_selector."
        w1 = reader.take(f"{prefix}predecessor_codebook", (vocab_size, rank))
        w2 = reader.take(f"{prefix}successor_codebook", (draft_vocab_size, rank))
        project = reader.take(f"{prefix}hidden_projection.weight", (rank, hidden_size))
        return cls(w1, w2, Linear(project, None, kernels), kernels)


class ConfidenceHead:
    """Logit of c_k, the probability that x_k survives if its predecessors did; it never sees x_k (DSpark §3.2.1)."""

    def __init__(self, weight: Tensor, bias: Tensor, *, with_markov: bool) -> None:
        self._weight = weight.float()
        self._bias = bias.float()
        self._with_markov = with_markov

    def logit(self, hidden: Tensor, embedding: Tensor | None) -> Tensor:
        """[...] float32 from h_k [..., D] and, where the head was trained with it, W1[x_{k-1}] [..., r]."""
        features = hidden.float()
        if self._with_markov:
            assert embedding is not None
            features = torch.cat([features, embedding.float()], dim=-1)
        return features @ self._weight[0] + self._bias


def build_head(
    kind: str,
    reader: WeightReader,
    *,
    rank: int,
    hidden_size: int,
    vocab_size: int,
    draft_vocab_size: int,
    kernels: Kernels,
    prefix: str = "",
) -> SequentialHead | None:
    """The head named by a checkpoint's `markov_head_type` and `markov_rank`; rank 0 is none (DFlash).

    W1 is [vocab_size, rank], W2 [draft_vocab_size, rank]. Names of tensors begin with `prefix`.

    Raises CheckpointError for a kind that does not exist, or a tensor that is missing or misshapen.
    """
    if rank == 0:
        return None
    w1 = reader.take(f"{prefix}markov_head.markov_w1.weight", (vocab_size, rank))
    w2 = reader.take(f"{prefix}markov_head.markov_w2.weight", (draft_vocab_size, rank))
    if kind == "vanilla":
        return VanillaHead(w1, w2, kernels)
    if kind == "gated":
        gate = reader.take("markov_head.gate_proj.weight", (rank, hidden_size + rank))
        return GatedHead(w1, w2, Linear(gate, reader.take("markov_head.gate_proj.bias", (rank,)), kernels), kernels)
    if kind == "rnn":
        joint = reader.take("markov_head.joint_proj.weight", (3 * rank, 2 * rank + hidden_size))
        bias = reader.take("markov_head.joint_proj.bias", (3 * rank,))
        return RNNHead(w1, w2, Linear(joint, bias, kernels), kernels)
    raise CheckpointError(f"markov_head_type {kind!r} is not known; vanilla, gated and rnn are.")
