"""Drafters as trainable modules: what they have in common, and those that draft in parallel (DSpark §3.1-3.2).

The engine runs the same networks over paged context; here a step's blocks share their sequence's context. Shapes:
N context tokens, B blocks of gamma slots, D hidden size, m taps, r Markov rank, Vd tokens that may be drafted.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark_server.models.config import LayerConfig
from dspark_server.models.layers.attention import AttentionConfig
from dspark_server.models.layers.conv import ConvConfig
from dspark_server.models.layers.mlp import MlpConfig
from dspark_server.models.layers.rope import rotary_table
from dspark_server.speculation.dspark_formats import DSparkConfig


@dataclass(frozen=True)
class Blocks:
    """Training blocks of one step.

    taps [N, m * D] and states [N, D], the target's last ones after its final norm, float32; tokens [N] and positions
    [N] of the context of all sequences, one after another; anchors [B] positions; previous [B, gamma] tokens x_{k-1},
    the anchor first; spans: for each sequence its context rows [t0, t1) and its blocks [b0, b1).
    """

    taps: Tensor
    states: Tensor
    tokens: Tensor
    positions: Tensor
    anchors: Tensor
    previous: Tensor
    spans: list[tuple[int, int, int, int]]


class TrainedDrafter(nn.Module):
    """A drafter whose embedding [V, D] and head are the target's, frozen; parameters bear their checkpoint's names.

    With `bfloat16` the backbone's products, including its attention's, are multiplied and rounded in bfloat16, and
    summed in float32; the weights, the residual stream, norms, softmaxes and the heads stay float32.
    """

    embedding: Tensor
    table: Tensor

    def __init__(self, embedding: Tensor, table: Tensor, *, bfloat16: bool) -> None:
        super().__init__()
        self.in_bfloat16 = bfloat16
        self.register_buffer("embedding", embedding, persistent=False)
        self.register_buffer("table", table, persistent=False)

    @property
    @abstractmethod
    def w2(self) -> Tensor:
        """The Markov head's output matrix [Vd, r], a row for each token that may be drafted; [Vd, 0] without one."""

    @abstractmethod
    def forward(self, blocks: Blocks) -> tuple[Tensor, Tensor, Tensor | None]:
        """h_k [B, gamma, D], the latent that w2 turns into B_k [B, gamma, r], confidence logits [B, gamma]."""


class DraftAttention(nn.Module):
    """Attention of blocks over their sequence's context before the anchor, and over slots of their own."""

    def __init__(self, config: AttentionConfig, hidden: int, eps: float) -> None:
        super().__init__()
        self._config = config
        width = config.inputs or hidden
        self.q_proj = nn.Linear(width, config.queries, bias=config.bias)
        self.k_proj = nn.Linear(width, config.keys, bias=config.bias)
        self.v_proj = nn.Linear(width, config.keys, bias=config.bias)
        self.o_proj = nn.Linear(config.queries, hidden, bias=config.output_bias)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, eps)
            self.k_norm = nn.RMSNorm(config.head_dim, eps)

    def queries(self, x: Tensor, cos_sin: Tensor) -> Tensor:
        """x [..., D] and its rotations [..., d] -> [..., Hq, d]."""
        q = self._heads(self.q_proj(x))
        return _rotate(self.q_norm(q) if self._config.qk_norm else q, cos_sin.unsqueeze(-2))

    def keys_values(self, x: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., D] and its rotations [..., d] -> keys and values [..., Hkv, d]."""
        k = self._heads(self.k_proj(x))
        k = _rotate(self.k_norm(k) if self._config.qk_norm else k, cos_sin.unsqueeze(-2))
        return k, self._heads(self.v_proj(x))

    def _heads(self, rows: Tensor) -> Tensor:
        return torch.unflatten(rows.float(), -1, (-1, self._config.head_dim))

    def attend(self, q: Tensor, own: tuple[Tensor, Tensor], context: tuple[Tensor, Tensor], blocks: Blocks) -> Tensor:
        """q [B, S, Hq, d]; keys and values of the block's slots [B, K, Hkv, d] and context [N, Hkv, d] -> [B, S, D].

        No row is padded: each sequence's blocks attend to that sequence's context, and each block to all K slots.
        """
        config = self._config
        slots, seen, group = q.shape[1], own[0].shape[1], config.heads // config.kv_heads
        outputs = []
        for t0, t1, b0, b1 in blocks.spans:
            count, positions = b1 - b0, blocks.positions[t0:t1]
            # [nb, S, Hkv, G, d] -> [Hkv, nb, S * G, d]
            query = q[b0:b1].unflatten(2, (config.kv_heads, group)).permute(2, 0, 1, 3, 4).flatten(2, 3)
            query = query * config.head_dim**-0.5
            scores = query.flatten(1, 2) @ context[0][t0:t1].permute(1, 2, 0)
            hidden = (positions >= blocks.anchors[b0:b1].unsqueeze(1)) | (positions < config.first_key)  # [nb, L]
            scores = scores.unflatten(1, (count, -1)).masked_fill(hidden.unsqueeze(1), float("-inf"))
            among = query @ own[0][b0:b1].permute(2, 0, 3, 1)  # [Hkv, nb, S * G, K]
            weights = torch.cat([scores, among], dim=-1).softmax(-1)
            from_context, from_own = weights.split([t1 - t0, seen], dim=-1)
            mixed = (from_context.flatten(1, 2) @ context[1][t0:t1].transpose(0, 1)).unflatten(1, (count, -1))
            mixed = mixed + from_own @ own[1][b0:b1].permute(2, 0, 1, 3)
            outputs.append(mixed.unflatten(2, (slots, group)).permute(1, 2, 0, 3, 4).flatten(2))
        return torch.as_tensor(self.o_proj(torch.cat(outputs)))


class DraftMlp(nn.Module):
    """A gated feed-forward."""

    def __init__(self, config: MlpConfig, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, config.features, bias=config.bias)
        self.up_proj = nn.Linear(hidden, config.features, bias=config.bias)
        self.down_proj = nn.Linear(config.features, hidden, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return torch.as_tensor(self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)))


class DraftConv(nn.Module):
    """DFlash2's convolutions around a sublayer, at first the identity: see `models.layers.conv.BlockConv`."""

    def __init__(self, config: ConvConfig, hidden: int) -> None:
        super().__init__()
        self._config = config
        base = torch.zeros(2, config.taps, hidden)
        base[:, 0] = 1
        self.base_kernel = nn.Parameter(base)
        self.kernel_projection = nn.Linear(hidden, 2 * config.taps * hidden // config.group_size, bias=False)
        nn.init.zeros_(self.kernel_projection.weight)

    def before(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The sublayer's input [B, W, D] for x [B, W, D], and the dynamic kernels [B, W, T, G] of its output."""
        dynamic = self.kernel_projection(x).float().unflatten(-1, (2, self._config.taps, -1))
        return self._convolve(x, dynamic[:, :, 0], 0), dynamic[:, :, 1]

    def after(self, x: Tensor, dynamic: Tensor) -> Tensor:
        """The convolution of the sublayer's output x [B, W, D] by the kernels that `before` gave."""
        return self._convolve(x, dynamic, 1)

    def _convolve(self, x: Tensor, dynamic: Tensor, side: int) -> Tensor:
        out = torch.zeros_like(x)
        for tap in range(self._config.taps):
            kernel = self.base_kernel[side, tap] + dynamic[:, :, tap].repeat_interleave(self._config.group_size, -1)
            out = out + kernel * F.pad(x, (0, 0, tap, 0))[:, : x.shape[1]]
        return out


class DraftLayer(nn.Module):
    """A layer of a parallel backbone; each slot sees the whole block. DFlash2's has convolutions around its halves."""

    def __init__(self, config: LayerConfig, hidden: int, eps: float, conv: ConvConfig | None) -> None:
        super().__init__()
        assert isinstance(config.mlp, MlpConfig)
        self.input_layernorm = nn.RMSNorm(hidden, eps)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps)
        self.self_attn = DraftAttention(config.attention, hidden, eps)
        self.mlp = DraftMlp(config.mlp, hidden)
        self.attention_conv = self.mlp_conv = None
        if conv is not None:
            self.attention_conv, self.mlp_conv = DraftConv(conv, hidden), DraftConv(conv, hidden)

    def forward(self, x: Tensor, context: Tensor, blocks: Blocks, table: Tensor) -> Tensor:
        """x [B, W, D] and context features [N, D] -> [B, W, D]; table [P, d] of cosines and sines."""
        attention = self.self_attn
        slots = table[blocks.anchors.unsqueeze(1) + torch.arange(x.shape[1])]

        def attend(normed: Tensor) -> Tensor:
            q, own = attention.queries(normed, slots), attention.keys_values(normed, slots)
            return attention.attend(q, own, attention.keys_values(context, table[blocks.positions]), blocks)

        x = x + _between(self.attention_conv, attend, self.input_layernorm(x))
        return x + _between(self.mlp_conv, self.mlp, self.post_attention_layernorm(x))


def _between(conv: DraftConv | None, sublayer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if conv is None:
        return sublayer(x)
    x, dynamic = conv.before(x)
    return conv.after(sublayer(x).float(), dynamic)


class CandidateSelector(nn.Module):
    """DFlash2's sequential head: see `speculation.heads.SelectorHead`. In training it scores all of the Vd tokens."""

    def __init__(self, vocabulary: int, drafted: int, rank: int, hidden: int) -> None:
        super().__init__()
        self.predecessor_codebook = nn.Parameter(torch.empty(vocabulary, rank).normal_(std=0.05))
        self.successor_codebook = nn.Parameter(torch.zeros(drafted, rank))
        self.hidden_projection = nn.Linear(hidden, rank, bias=False)


class DraftModel(TrainedDrafter):
    """DSpark, DFlash, which is DSpark without heads, and DFlash2, under the tensor names of DeepSpec and z-lab."""

    def __init__(self, config: DSparkConfig, embedding: Tensor, max_length: int, *, bfloat16: bool = False) -> None:
        decoder, rank = config.decoder, config.markov_rank
        hidden, attention = decoder.hidden_size, decoder.layers[0].attention
        positions = max_length + config.block_size
        table = rotary_table(attention.rope, attention.head_dim, max_length, positions)
        super().__init__(embedding, table, bfloat16=bfloat16)
        self.config = config
        self.fc = nn.Linear(len(config.taps) * hidden, hidden, bias=False)
        self.hidden_norm = nn.RMSNorm(hidden, decoder.rms_norm_eps)
        self.layers = nn.ModuleList(
            DraftLayer(each, hidden, decoder.rms_norm_eps, config.conv) for each in decoder.layers
        )
        self.norm = nn.RMSNorm(hidden, decoder.rms_norm_eps)
        drafted = config.draft_vocab_size or decoder.vocab_size
        if config.selector is not None:
            self.candidate_selector = CandidateSelector(decoder.vocab_size, drafted, config.selector[0], hidden)
        if rank:
            self.markov_head = nn.ModuleDict(
                {
                    "markov_w1": nn.Embedding(decoder.vocab_size, rank),
                    "markov_w2": nn.Linear(rank, drafted, bias=False),
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

    def forward(self, blocks: Blocks) -> tuple[Tensor, Tensor, Tensor | None]:
        """See TrainedDrafter. A pass holds the embeddings of (anchor, mask, ...); its last gamma slots predict."""
        config = self.config
        x = self.embedding[config.mask_token_id].repeat(len(blocks.previous), config.block_size, 1)
        x[:, 0] = self.embedding[blocks.previous[:, 0]]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.in_bfloat16):
            context = self.hidden_norm(self.fc(blocks.taps).float())
            for layer in self.layers:
                x = layer(x, context, blocks, self.table)
        hidden = self.norm(x[:, config.block_size - config.gamma :])
        embedding = self._markov_embedding(blocks.previous)
        confidence = None
        if config.confidence:
            features = torch.cat([hidden, embedding], dim=-1) if config.confidence_with_markov else hidden
            confidence = self.confidence_head["proj"](features).squeeze(-1)
        return hidden, self._latent(hidden, embedding), confidence

    @property
    def w2(self) -> Tensor:
        """See TrainedDrafter."""
        if self.config.selector is not None:
            return self.candidate_selector.successor_codebook
        if not self.config.markov_rank:
            return torch.empty(self.config.draft_vocab_size or self.config.decoder.vocab_size, 0)
        return _weight(self.markov_head["markov_w2"])

    def _markov_embedding(self, previous: Tensor) -> Tensor:
        if self.config.selector is not None:
            return self.candidate_selector.predecessor_codebook[previous]
        if not self.config.markov_rank:
            return torch.empty(*previous.shape, 0)
        return torch.as_tensor(self.markov_head["markov_w1"](previous))

    def _latent(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        if self.config.selector is not None:
            return embedding * torch.as_tensor(self.candidate_selector.hidden_projection(hidden))
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
