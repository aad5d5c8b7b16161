"""How a model is shared: the sizes that work, what each rank holds, and three ranks that together are one model."""

from pathlib import Path

import pytest
import torch
from dspark_kernels import load

from dspark_server.errors import CheckpointError, ConfigError
from dspark_server.models.decoder import Decoder
from dspark_server.models.registry import load_config

from ..engine.support import prompts
from ..engine.test_lossless import mixed
from ..models.support import save_tiny
from .support import Share, Together, one_rank, tiny_config


def test_three_ranks(tmp_path: Path) -> None:
    """One key/value head each, as SmolLM2-135M has three; 199 tokens are 67, 67 and 65."""
    save_tiny(tmp_path, "llama", hidden_size=96, num_attention_heads=6, num_key_value_heads=3, attention_bias=True)
    config = tiny_config(drafter=False, model=str(tmp_path))
    texts = [[token % 190 for token in prompt] for prompt in prompts(4)]
    expected = one_rank(config).generate(texts, mixed(4))
    with Together.start(3) as three, three.core(config) as core:
        assert core.generate(texts, mixed(4)) == expected


@pytest.mark.parametrize(
    ("heads", "feed_forward", "size", "message"),
    [
        (3, 1536, 2, r"3 key/value heads and 1536 feed-forward units: it can be 1 or 3, not 2"),
        (8, 96, 16, "it can be 1 or 2 or 4 or 8, not 16"),
        (1, 96, 2, "it can be 1, not 2"),
        (4, 90, 4, "it can be 1 or 2, not 4"),
    ],
)
def test_a_size_that_does_not_divide_the_model_is_refused(
    heads: int, feed_forward: int, size: int, message: str, tmp_path: Path
) -> None:
    save_tiny(
        tmp_path,
        hidden_size=32 * heads,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=feed_forward,
    )
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path).shared_by(size)


def test_ranks_hold_shares_and_no_more(tmp_path: Path) -> None:
    """Every tensor is asked for on every rank (strict loading), and what they keep adds up to the model."""
    save_tiny(tmp_path, attention_bias=True)
    whole = Decoder.load(tmp_path, torch.float32, load("reference"))
    shares = [Decoder.load(tmp_path, torch.float32, load("reference"), group=Share(rank, 2)) for rank in range(2)]
    for share in shares:
        assert [each.heads * 2 for each in share.caches] == [each.heads for each in whole.caches]
        for mine, all_of_it in zip(share.layers[0].products, whole.layers[0].products, strict=True):
            assert mine.in_features * mine.out_features * 2 == all_of_it.in_features * all_of_it.out_features
    hidden = torch.randn(3, 64)
    logits = torch.cat([share.head(hidden) for share in shares], dim=1)
    assert torch.equal(logits[:, 199:], torch.zeros(3, 1))
    torch.testing.assert_close(logits[:, :199], whole.logits(hidden))
    (tmp_path / "model.safetensors").rename(tmp_path / "gone")
    with pytest.raises(CheckpointError):
        Decoder.load(tmp_path, torch.float32, load("reference"), group=Share(1, 2))
