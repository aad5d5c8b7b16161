"""The drafter as a trainable module, under the tensor names of DeepSpec's format A (DSpark §3.1-3.2).

The engine's `speculation.dspark` runs the same network over paged context; here a step's blocks share their
sequence's context. Shapes: N context tokens, B blocks of gamma slots, D hidden size, m taps, r Markov rank.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark_server.models.config import LayerConfig
from dspark_server.models.layers.rope import rotary_table
from dspark_server.speculation.dspark_formats import DSparkConfig


@dataclass(frozen=True)
class Blocks:
    """Training blocks of one step.

    taps [N, m * D] float32 and positions [N] of the context of all sequences, one after another; inputs [B, gamma, D]
    embeddings of (anchor, mask, ...); anchors [B] positions; previous [B, gamma] tokens x_{k-1}; spans: for each
    sequence its context rows [t0, t1) and its blocks [b0, b1).
    """

    taps: Tensor
    positions: Tensor
    inputs: Tensor
    anchors: Tensor
    previous: Tensor
    spans: list[tuple[int, int, int, int]]


class DraftLayer(nn.Module):
    """A Qwen3-style layer whose queries see their sequence's context before the anchor, and their whole block."""

    def __init__(self, config: LayerConfig, hidden: int, eps: float) -> None:
        super().__init__()
        attention, features = config.attention, config.mlp.features
        head_dim, queries, keys = attention.head_dim, attention.queries, attention.keys
        self._heads, self._kv_heads, self._head_dim = attention.heads, attention.kv_heads, head_dim
        self.input_layernorm = nn.RMSNorm(hidden, eps)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps)
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(hidden, queries, bias=False),
                "k_proj": nn.Linear(hidden, keys, bias=False),
                "v_proj": nn.Linear(hidden, keys, bias=False),
                "o_proj": nn.Linear(queries, hidden, bias=False),
                "q_norm": nn.RMSNorm(head_dim, eps),
                "k_norm": nn.RMSNorm(head_dim, eps),
            }
        )
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(hidden, features, bias=False),
                "up_proj": nn.Linear(hidden, features, bias=False),
                "down_proj": nn.Linear(features, hidden, bias=False),
            }
        )

    def forward(self, x: Tensor, context: Tensor, blocks: Blocks, table: Tensor) -> Tensor:
        """x [B, gamma, D] and context features [N, D] -> [B, gamma, D]; table [P, d] of cosines and sines."""
        attention, gamma = self.self_attn, x.shape[1]
        normed = self.input_layernorm(x)
        slots = table[blocks.anchors.unsqueeze(1) + torch.arange(gamma)].unsqueeze(2)  # [B, gamma, 1, d]

        def heads(projection: str, rows: Tensor) -> Tensor:
            return torch.unflatten(attention[projection](rows).float(), -1, (-1, self._head_dim))

        q = _rotate(attention["q_norm"](heads("q_proj", normed)), slots)
        k = _rotate(attention["k_norm"](heads("k_proj", normed)), slots)
        context_k = _rotate(attention["k_norm"](heads("k_proj", context)), table[blocks.positions].unsqueeze(1))
        attended = self._attend(q, k, heads("v_proj", normed), context_k, heads("v_proj", context), blocks)
        x = x + attention["o_proj"](attended)
        normed = self.post_attention_layernorm(x)
        inner = F.silu(self.mlp["gate_proj"](normed)) * self.mlp["up_proj"](normed)
        return x + torch.as_tensor(self.mlp["down_proj"](inner))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, context_k: Tensor, context_v: Tensor, blocks: Blocks) -> Tensor:
        """q [B, gamma, Hq, d], k and v [B, gamma, Hkv, d], context_k and context_v [N, Hkv, d] -> [B, gamma, Hq * d].

        No row is padded: each sequence's blocks attend to that sequence's context, and each block to itself.
        """
        gamma, group = q.shape[1], self._heads // self._kv_heads
        outputs = []
        for t0, t1, b0, b1 in blocks.spans:
            count = b1 - b0
            # [nb, gamma, Hkv, G, d] -> [Hkv, nb, gamma * G, d]
            query = q[b0:b1].unflatten(2, (self._kv_heads, group)).permute(2, 0, 1, 3, 4).flatten(2, 3)
            query = query * self._head_dim**-0.5
            scores = query.flatten(1, 2) @ context_k[t0:t1].permute(1, 2, 0)
            future = blocks.positions[t0:t1] >= blocks.anchors[b0:b1].unsqueeze(1)  # [nb, L]
            scores = scores.unflatten(1, (count, -1)).masked_fill(future.unsqueeze(1), float("-inf"))
            own = query @ k[b0:b1].permute(2, 0, 3, 1)  # [Hkv, nb, gamma * G, gamma]
            weights = torch.cat([scores, own], dim=-1).softmax(-1)
            from_context, from_own = weights.split([t1 - t0, gamma], dim=-1)
            mixed = (from_context.flatten(1, 2) @ context_v[t0:t1].transpose(0, 1)).unflatten(1, (count, -1))
            mixed = mixed + from_own @ v[b0:b1].permute(2, 0, 1, 3)
            outputs.append(mixed.unflatten(2, (gamma, group)).permute(1, 2, 0, 3, 4).flatten(2))
        return torch.cat(outputs)


class DraftModel(nn.Module):
    """All trained parts of a drafter; embedding and head are the target's.

    With `bfloat16` the backbone's products, including its attention's, are multiplied and rounded in bfloat16, and
    summed in float32; the weights, the residual stream, norms, softmaxes and the two heads stay float32.
    """

    def __init__(self, config: DSparkConfig, max_length: int, *, bfloat16: bool = False) -> None:
        super().__init__()
        self._bfloat16 = bfloat16
        decoder, rank = config.decoder, config.markov_rank
        hidden = decoder.hidden_size
        self.config = config
        self.fc = nn.Linear(len(config.taps) * hidden, hidden, bias=False)
        self.hidden_norm = nn.RMSNorm(hidden, decoder.rms_norm_eps)
        self.layers = nn.ModuleList(DraftLayer(each, hidden, decoder.rms_norm_eps) for each in decoder.layers)
        self.norm = nn.RMSNorm(hidden, decoder.rms_norm_eps)
        if rank:
            self.markov_head = nn.ModuleDict(
                {
                    "markov_w1": nn.Embedding(decoder.vocab_size, rank),
                    "markov_w2": nn.Linear(rank, config.draft_vocab_size or decoder.vocab_size, bias=False),
                }
            )
            nn.init.normal_(_weight(self.markov_head["markov_w1"]), std=0.05)
            nn.init.zeros_(_weight(self.markov_head["markov_w2"]))
            if config.markov_head_type == "gated":
                self.markov_head["gate_proj"] = nn.Linear(hidden + rank, rank)
            if config.markov_head_type == "rnn":
                self.markov_head["joint_proj"] = nn.Linear(2 * rank + hidden, 3 * rank)
        if config.confidence:
            width = hidden + (rank if config.confidence_with_markov else 0)
            self.confidence_head = nn.ModuleDict({"proj": nn.Linear(width, 1)})
            nn.init.zeros_(_weight(self.confidence_head["proj"]))
        attention = decoder.layers[0].attention
        positions = max_length + config.block_size
        table = rotary_table(attention.rope, attention.head_dim, max_length, positions)
        self.register_buffer("_table", table, persistent=False)

    def forward(self, blocks: Blocks) -> tuple[Tensor, Tensor, Tensor | None]:
        """h_k [B, gamma, D], the latent that w2 turns into B_k [B, gamma, r], confidence logits [B, gamma]."""
        x = blocks.inputs
        with torch.autocast("cpu", torch.bfloat16, enabled=self._bfloat16):
            context = self.hidden_norm(self.fc(blocks.taps).float())
            for layer in self.layers:
                x = layer(x, context, blocks, self._table)
        hidden = self.norm(x)
        embedding = self._embedding(blocks.previous)
        confidence = None
        if self.config.confidence:
            features = torch.cat([hidden, embedding], dim=-1) if self.config.confidence_with_markov else hidden
            confidence = self.confidence_head["proj"](features).squeeze(-1)
        return hidden, self._latent(hidden, embedding), confidence

    @property
    def w2(self) -> Tensor:
        """The Markov head's output matrix [Vd, r], a row for each token that may be drafted; [Vd, 0] without one."""
        if not self.config.markov_rank:
            return torch.empty(self.config.draft_vocab_size or self.config.decoder.vocab_size, 0)
        return _weight(self.markov_head["markov_w2"])

    def _embedding(self, previous: Tensor) -> Tensor:
        if not self.config.markov_rank:
            return torch.empty(*previous.shape, 0)
        return torch.as_tensor(self.markov_head["markov_w1"](previous))

    def _latent(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        kind = self.config.markov_head_type
        if kind == "gated":
            gate = self.markov_head["gate_proj"](torch.cat([hidden, embedding], dim=-1))
            return torch.sigmoid(gate) * embedding
        if kind == "rnn":
            state, outputs = torch.zeros_like(embedding[:, 0]), []
            for k in range(embedding.shape[1]):
                joint = self.markov_head["joint_proj"](torch.cat([state, embedding[:, k], hidden[:, k]], dim=-1))
                gate, candidate, output = joint.chunk(3, dim=-1)
                kept = torch.sigmoid(gate)
                state = kept * state + (1 - kept) * torch.tanh(candidate)
                outputs.append(torch.tanh(output))
            return torch.stack(outputs, dim=1)
        return embedding


def _weight(module: nn.Module) -> Tensor:
    return torch.as_tensor(module.weight)


def _rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    cos, sin = cos_sin.chunk(2, dim=-1)
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)
