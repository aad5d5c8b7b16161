"""A mixture of experts: a router chooses the feed-forwards of each token; some configs add one that all tokens share.

Shapes: N tokens, D the model's width, E experts of F features, of which a token has K.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dspark_server.models.layers.mlp import Mlp, MlpConfig
from dspark_server.models.layers.parts import Parts
from dspark_server.runtime.group import Group
from dspark_server.runtime.linear import Experts, Linear, limited


@dataclass(frozen=True)
class MoeConfig:
    """`features` of each of `experts`; a token has `chosen` of them, whose shares add up to 1 if they are `normalised`.

    `shared` is the width of the feed-forward that every token has beside these, 0: none. Where ranks share the model,
    an expert is divided among them, or is `whole` on one of them (expert parallelism).
    """

    experts: int
    chosen: int
    features: int
    normalised: bool
    shared: int = 0
    whole: bool = False

    @property
    def parts(self) -> int:
        """The number of features of an expert, or of experts if they are whole: ranks divide these."""
        return self.experts if self.whole else self.features

    def shared_by(self, size: int) -> "MoeConfig":
        """Return the share of one of `size` ranks: some of the experts, or a part of each one's features.

        Of the shared one the largest part, where the ranks' are not equal.
        """
        features = self.features if self.whole else self.features // size
        return replace(self, features=features, shared=-(-self.shared // size))

    def own(self, group: Group) -> tuple[range, slice]:
        """The experts of this rank, and its part of the features of each."""
        if self.whole:
            return range(self.experts)[group.share(self.experts)], slice(None)
        return range(self.experts), group.share(self.features)


@dataclass(frozen=True)
class ScoredMoeConfig(MoeConfig):
    """DeepSeek-V4's: each expert's score is of its own, shares are scores over their sum, times `scale`.

    The experts of a token are `hashed` by its id, or those of the highest scores plus a bias. Gates are cut at `limit`,
    what they multiply at +-`limit`, in the shared expert, too.
    """

    vocabulary: int = 0
    scale: float = 1.0
    limit: float = float("inf")
    hashed: bool = False


class Moe:
    """The mixture of one layer, without the norm before it."""

    def __init__(self, parts: Parts, config: MoeConfig, prefix: str) -> None:
        """Read this rank's share of the weights under `prefix`, such as "model.layers.3.mlp."."""
        self.config = config
        self._group = parts.group
        self._router = Linear(parts.matrix(f"{prefix}gate", config.experts), None, parts.kernels)
        self._own, own = config.own(parts.group)

        def expert(name: str) -> tuple[Tensor, Tensor]:
            rows = {f"{name}gate_proj": (config.features, own), f"{name}up_proj": (config.features, own)}
            down = parts.summed(f"{name}down_proj", config.features, own, bias=False)[0]
            return parts.fused(rows, parts.hidden, bias=False)[0], down

        every = (expert(f"{prefix}experts.{i}.") for i in self._own)
        self._experts = Experts(len(self._own), every, parts.kernels)
        _leave_others(parts, config, self._own, f"{prefix}experts.")
        self._shared = self._shared_gate = None
        if config.shared:
            self._shared = Mlp(parts, MlpConfig(config.shared), f"{prefix}shared_expert.")
            self._shared_gate = Linear(parts.matrix(f"{prefix}shared_expert_gate", 1), None, parts.kernels)

    @property
    def products(self) -> list[Linear]:
        """Its matrix products beside those of the experts."""
        return [self._router, *(self._shared.products if self._shared else [])]

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The experts [N, K] int32 of each token of x [N, D], and their shares [N, K] float32."""
        shares, chosen = self._router(x, out_float32=True).softmax(-1).topk(self.config.chosen)
        if self.config.normalised:
            shares = shares / shares.sum(-1, keepdim=True)
        return chosen.int(), shares.contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """x [N, D] -> [N, D], the sum of all ranks."""
        chosen, shares = self.route(x)
        mixed = self._group.all_reduce(self._experts(x, numbered(chosen, self._own), shares))
        if self._shared is None or self._shared_gate is None:
            return mixed
        gate = self._shared_gate(x, out_float32=True).sigmoid()
        return mixed + (gate * self._shared.forward(x)).to(x.dtype)


class ScoredMoe:
    """The mixture of one layer of DeepSeek-V4, without the norm before it."""

    def __init__(self, parts: Parts, config: ScoredMoeConfig, prefix: str) -> None:
        """Read this rank's share of the weights under `prefix`, such as "layers.3.ffn."."""
        self.config = config
        self._group, self._kernels = parts.group, parts.kernels
        reader, experts = parts.reader, config.experts
        self._router = Linear(parts.matrix(f"{prefix}gate", experts), None, parts.kernels)
        self._by_token = self._bias = None
        if config.hashed:
            self._by_token = reader.integers(f"{prefix}gate.tid2eid", (config.vocabulary, config.chosen)).int()
        else:
            self._bias = reader.take(f"{prefix}gate.bias", (experts,), dtype=torch.float32)
        self._own, own = config.own(parts.group)
        every = (_expert(parts, f"{prefix}experts.{i}.", config.features, own) for i in self._own)
        self._experts = Experts(len(self._own), every, parts.kernels, config.limit)
        _leave_others(parts, config, self._own, f"{prefix}experts.")
        gates, out = _expert(parts, f"{prefix}shared_experts.", config.shared, parts.group.share(config.shared))
        self._shared = Linear(gates, None, parts.kernels), Linear(out, None, parts.kernels)

    @property
    def products(self) -> list[Linear]:
        """Its matrix products beside those of the experts."""
        return [self._router, *self._shared]

    def route(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The experts [N, K] int32 of each token [N] and its x [N, D], and their shares [N, K] float32."""
        config, logits = self.config, self._router(x, out_float32=True)
        given = None if self._by_token is None else self._by_token[tokens]
        return self._kernels.score_experts(logits, self._bias, given, config.chosen, config.scale)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """x [N, D] of tokens [N] -> [N, D], the sum of all ranks."""
        chosen, shares = self.route(x, tokens)
        mixed = self._experts(x, numbered(chosen, self._own), shares)
        gate_up, down = self._shared
        return self._group.all_reduce(mixed + down(limited(gate_up(x), self.config.limit, self._kernels)))


def numbered(chosen: Tensor, own: range) -> Tensor:
    """Numbers of chosen experts among a rank's own; len(own) for those of others."""
    if own.start == 0:
        return chosen  # those of others are at least len(own) already
    number = chosen - own.start
    return torch.where((number < 0) | (number > len(own)), len(own), number)


def _leave_others(parts: Parts, config: MoeConfig, own: range, prefix: str) -> None:
    """Tell the reader that other ranks read the other experts."""
    for expert in set(range(config.experts)) - set(own):
        parts.reader.leave(f"{prefix}{expert}.")


def _expert(parts: Parts, prefix: str, features: int, own: slice) -> tuple[Tensor, Tensor]:
    """Gates and what they multiply [2F, D] of this rank, and its columns of the output [D, F]."""
    rows = {f"{prefix}w1": (features, own), f"{prefix}w3": (features, own)}
    return parts.fused(rows, parts.hidden, bias=False)[0], parts.summed(f"{prefix}w2", features, own, bias=False)[0]
