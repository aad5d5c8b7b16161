"""Eagle3 and MTP layers as trainable modules: they draft a block token by token in training, too.

Their own outputs take the place of the target's features from the second slot on, as in the engine
(`speculation.pairs`; Li et al., 2025, §3.1; FastMTP, arXiv 2509.18362). Each slot sees the context's pairs and the
slots before it. Parameters bear the names of speculators' `eagle3` and `mtp`. Shapes as in `training.model`.
"""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from dspark_server.models.config import LayerConfig, ModelConfig
from dspark_server.models.layers.mlp import MlpConfig
from dspark_server.models.layers.rope import rotary_table
from dspark_server.speculation.eagle3_formats import Eagle3Config
from dspark_server.speculation.mtp import MtpConfig
from dspark_server.training.model import Blocks, DraftAttention, DraftMlp, TrainedDrafter


class PairModel(TrainedDrafter):
    """All trained parts of a drafter that pairs features with the next token."""

    def __init__(
        self, config: Eagle3Config | MtpConfig, embedding: Tensor, max_length: int, *, bfloat16: bool = False
    ) -> None:
        rope, size = config.layer.attention.rope, config.layer.attention.head_dim
        super().__init__(embedding, rotary_table(rope, size, max_length, max_length + config.depth), bfloat16=bfloat16)
        self.drafted = config.draft_vocab_size or config.decoder.vocab_size

    @property
    def w2(self) -> Tensor:
        """There is no Markov head: each pass has read the token before."""
        return torch.empty(self.drafted, 0)

    @property
    @abstractmethod
    def layer(self) -> "PairLayer":
        """Its layer."""

    @abstractmethod
    def features(self, blocks: Blocks) -> Tensor:
        """Features [N, D] of the context's tokens."""

    @abstractmethod
    def begin(self, embedded: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """The input of attention [..., .] and the residual [..., D] for pairs of embeddings and features [..., D]."""

    @abstractmethod
    def end(self, residual: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        """The features of the next pair, and the input of the head [..., D]."""

    def forward(self, blocks: Blocks) -> tuple[Tensor, Tensor, Tensor | None]:
        """See TrainedDrafter: gamma passes, each a slot of every block."""
        attention, drawn = self.layer.self_attn, []
        with torch.autocast("cpu", torch.bfloat16, enabled=self.in_bfloat16):
            features = self.features(blocks)
            # The pair at a place holds the features of the place before; place 0 has none, and no query sees it.
            pairs, _ = self.begin(self.embedding[blocks.tokens], features.roll(1, 0))
            context = attention.keys_values(pairs, self.table[blocks.positions])
            counts = torch.tensor([b1 - b0 for _, _, b0, b1 in blocks.spans])
            starts = torch.tensor([t0 for t0, *_ in blocks.spans]).repeat_interleave(counts)
            before = features[starts + blocks.anchors - 1]
            keys, values = [], []
            for slot, tokens in enumerate(blocks.previous.T):
                pair, residual = self.begin(self.embedding[tokens], before)
                pair, rotation = pair.unsqueeze(1), self.table[blocks.anchors + slot].unsqueeze(1)
                key, value = attention.keys_values(pair, rotation)
                keys.append(key)
                values.append(value)
                own = torch.cat(keys, dim=1), torch.cat(values, dim=1)
                attended = attention.attend(attention.queries(pair, rotation), own, context, blocks)
                before, normed = self.end(residual, attended.squeeze(1))
                drawn.append(normed)
        hidden = torch.stack(drawn, dim=1)
        return hidden, hidden.new_empty(*blocks.previous.shape, 0), None


class PairLayer(nn.Module):
    """The parts of a layer that Eagle3 and MTP have in common; attention projects `inputs` channels, if not D."""

    def __init__(self, config: LayerConfig, decoder: ModelConfig) -> None:
        super().__init__()
        hidden, eps = decoder.hidden_size, decoder.rms_norm_eps
        assert isinstance(config.mlp, MlpConfig)
        self.input_layernorm = nn.RMSNorm(hidden, eps)
        self.self_attn = DraftAttention(config.attention, hidden, eps)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps)
        self.mlp = DraftMlp(config.mlp, hidden)

    def end(self, residual: Tensor, attended: Tensor) -> Tensor:
        """The layer's output [..., D]."""
        x = residual + attended
        return x + torch.as_tensor(self.mlp(self.post_attention_layernorm(x)))


class Eagle3Layer(PairLayer):
    """Attention reads [norm(embedding); norm(features)]."""

    def __init__(self, config: LayerConfig, decoder: ModelConfig) -> None:
        super().__init__(config, decoder)
        self.hidden_norm = nn.RMSNorm(decoder.hidden_size, decoder.rms_norm_eps)


class MtpLayer(PairLayer):
    """The layer stands between a projection of [norm(embedding); norm(features)] and a norm."""

    def __init__(self, config: LayerConfig, decoder: ModelConfig) -> None:
        super().__init__(config, decoder)
        hidden, eps = decoder.hidden_size, decoder.rms_norm_eps
        self.token_layernorm = nn.RMSNorm(hidden, eps)
        self.hidden_layernorm = nn.RMSNorm(hidden, eps)
        self.input_proj = nn.Linear(2 * hidden, hidden, bias=False)
        self.final_layernorm = nn.RMSNorm(hidden, eps)


class Eagle3Model(PairModel):
    """An Eagle3 drafter: features are a projection of the taps, and the residual of its layer."""

    def __init__(self, config: Eagle3Config, embedding: Tensor, max_length: int, *, bfloat16: bool = False) -> None:
        super().__init__(config, embedding, max_length, bfloat16=bfloat16)
        hidden, eps = config.decoder.hidden_size, config.decoder.rms_norm_eps
        self.fc = nn.Linear(len(config.taps) * hidden, hidden, bias=False)
        self.layers = nn.ModuleList([Eagle3Layer(config.layer, config.decoder)])
        self.norm = nn.RMSNorm(hidden, eps)

    @property
    def layer(self) -> Eagle3Layer:
        """See PairModel."""
        (layer,) = self.layers
        assert isinstance(layer, Eagle3Layer)
        return layer

    def features(self, blocks: Blocks) -> Tensor:
        """See PairModel."""
        return torch.as_tensor(self.fc(blocks.taps)).float()

    def begin(self, embedded: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """See PairModel."""
        layer = self.layer
        return torch.cat([layer.input_layernorm(embedded), layer.hidden_norm(before)], dim=-1), before

    def end(self, residual: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        """See PairModel."""
        hidden = self.layer.end(residual, attended)
        return hidden, torch.as_tensor(self.norm(hidden))


class MtpModel(PairModel):
    """An MTP layer: features are the target's last states, after its final norm."""

    def __init__(self, config: MtpConfig, embedding: Tensor, max_length: int, *, bfloat16: bool = False) -> None:
        super().__init__(config, embedding, max_length, bfloat16=bfloat16)
        self.mtp_layers = nn.ModuleList([MtpLayer(config.layer, config.decoder)])

    @property
    def layer(self) -> MtpLayer:
        """See PairModel."""
        (layer,) = self.mtp_layers
        assert isinstance(layer, MtpLayer)
        return layer

    def features(self, blocks: Blocks) -> Tensor:
        """See PairModel."""
        return blocks.states

    def begin(self, embedded: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """See PairModel."""
        layer = self.layer
        both = torch.cat([layer.token_layernorm(embedded), layer.hidden_layernorm(before)], dim=-1)
        residual = torch.as_tensor(layer.input_proj(both)).float()
        return torch.as_tensor(layer.input_layernorm(residual)), residual

    def end(self, residual: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        """See PairModel."""
        normed = torch.as_tensor(self.layer.final_layernorm(self.layer.end(residual, attended)))
        return normed, normed
