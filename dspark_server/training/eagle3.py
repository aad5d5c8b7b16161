"""Eagle3 as a trainable module: it drafts a block token by token in training, too (Li et al., 2025, §3.1).

Its own outputs take the place of the target's features from the second slot on, as in the engine
(`speculation.eagle3`). Each slot sees the context's pairs and the slots before it. Parameters bear the names of
speculators' `eagle3`. Shapes as in `training.model`.
"""

import torch
from torch import Tensor, nn

from dspark_server.models.config import LayerConfig
from dspark_server.models.layers.mlp import MlpConfig
from dspark_server.models.layers.rope import rotary_table
from dspark_server.speculation.eagle3_formats import Eagle3Config
from dspark_server.training.model import Blocks, DraftAttention, DraftMlp, TrainedDrafter


class PairLayer(nn.Module):
    """The layer over pairs: attention reads [norm(embedding); norm(features)], the residual is the features."""

    def __init__(self, config: LayerConfig, hidden: int, eps: float) -> None:
        super().__init__()
        assert isinstance(config.mlp, MlpConfig)
        self.hidden_norm = nn.RMSNorm(hidden, eps)
        self.input_layernorm = nn.RMSNorm(hidden, eps)
        self.self_attn = DraftAttention(config.attention, hidden, eps)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps)
        self.mlp = DraftMlp(config.mlp, hidden)

    def inputs(self, embedded: Tensor, features: Tensor) -> Tensor:
        """The input of attention [..., 2 D] for pairs of embeddings and features [..., D]."""
        return torch.cat([self.input_layernorm(embedded), self.hidden_norm(features)], dim=-1)

    def after(self, features: Tensor, attended: Tensor) -> Tensor:
        """The layer's output [..., D]."""
        x = features + attended
        return x + torch.as_tensor(self.mlp(self.post_attention_layernorm(x)))


class PairModel(TrainedDrafter):
    """All trained parts of an Eagle3 drafter."""

    def __init__(self, config: Eagle3Config, embedding: Tensor, max_length: int, *, bfloat16: bool = False) -> None:
        decoder, layer = config.decoder, config.layer
        hidden, eps = decoder.hidden_size, decoder.rms_norm_eps
        rope, size = layer.attention.rope, layer.attention.head_dim
        super().__init__(embedding, rotary_table(rope, size, max_length, max_length + config.depth), bfloat16=bfloat16)
        self.config = config
        self.fc = nn.Linear(len(config.taps) * hidden, hidden, bias=False)
        self.layers = nn.ModuleList([PairLayer(layer, hidden, eps)])
        self.norm = nn.RMSNorm(hidden, eps)

    @property
    def w2(self) -> Tensor:
        """There is no Markov head: each pass has read the token before."""
        return torch.empty(self.config.draft_vocab_size or self.config.decoder.vocab_size, 0)

    def forward(self, blocks: Blocks) -> tuple[Tensor, Tensor, Tensor | None]:
        """See TrainedDrafter: gamma passes, each a slot of every block."""
        (layer,) = self.layers
        assert isinstance(layer, PairLayer)
        attention, hidden = layer.self_attn, []
        with torch.autocast("cpu", torch.bfloat16, enabled=self.in_bfloat16):
            features = self.fc(blocks.taps).float()
            # The pair at a place holds the features of the place before; place 0 has none, and no query sees it.
            pairs = layer.inputs(self.embedding[blocks.tokens], features.roll(1, 0))
            context = attention.keys_values(pairs, self.table[blocks.positions])
            counts = torch.tensor([b1 - b0 for _, _, b0, b1 in blocks.spans])
            starts = torch.tensor([t0 for t0, *_ in blocks.spans]).repeat_interleave(counts)
            state = features[starts + blocks.anchors - 1]
            keys, values = [], []
            for slot, tokens in enumerate(blocks.previous.T):
                pair = layer.inputs(self.embedding[tokens], state).unsqueeze(1)
                rotation = self.table[blocks.anchors + slot].unsqueeze(1)
                key, value = attention.keys_values(pair, rotation)
                keys.append(key)
                values.append(value)
                own = torch.cat(keys, dim=1), torch.cat(values, dim=1)
                attended = attention.attend(attention.queries(pair, rotation), own, context, blocks)
                state = layer.after(state, attended.squeeze(1))
                hidden.append(state)
        drawn = self.norm(torch.stack(hidden, dim=1))
        return drawn, drawn.new_empty(*blocks.previous.shape, 0), None
