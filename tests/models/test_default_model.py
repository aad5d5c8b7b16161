"""The real model in bf16, 4,000 decoding steps: beside transformers in float32, whose greedy text it reads.

Where two tokens nearly tie, bf16 may put either on top. At each place of transformers' text (`greedy_reference`) our
choice must be transformers' own, or nearly tie with it by its logits; our logits of its best tokens must be close.
"""

from pathlib import Path

import pytest
import torch
from dspark_kernels import load
from torch import Tensor
from transformers import AutoTokenizer

from dspark_server.models.decoder import Decoder

from .greedy_reference import NEW_TOKENS, PROMPTS, Reference, conversations
from .support import PagedRunner

# Measured: our token is at most 0.177 below transformers' best (native products without bf16 instructions; 42 of 4,000
# differ), our logits of the best five differ by 0.084 on average. Other processors and oneDNN round otherwise; NEAR_TIE
# is four steps of a bf16 logit near 20.
NEAR_TIE = 0.5
MOST_DISAGREEMENTS = 0.03
MEAN_DISTANCE = 0.2


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference.read()


@pytest.fixture(scope="module")
def chosen(default_model: Path, reference: Reference) -> tuple[Tensor, Tensor]:
    """Our choices [20, 200] after each token of the reference, and our logits [20, 200, BEST] of its best tokens.

    All answers are decoded in one batch.
    """
    decoder = Decoder.load(default_model, torch.bfloat16, load("native"), max_model_len=512)
    prompts = conversations(default_model)
    texts = [prompt + tokens for prompt, tokens in zip(prompts, reference.tokens.tolist(), strict=True)]
    runner = PagedRunner(decoder, texts, reserve=0, dtype=torch.bfloat16)
    counts, tokens, logits = [len(prompt) for prompt in prompts], [], []
    for place in range(NEW_TOKENS):
        found, _taps = runner.step(counts, all_logits=False)
        tokens.append(found.argmax(-1))
        logits.append(found.gather(1, reference.best[:, place].long()))
        counts = [1] * len(prompts)
    return torch.stack(tokens, dim=1), torch.stack(logits, dim=1)


def test_its_choices_are_transformers_own_up_to_ties(chosen: tuple[Tensor, Tensor], reference: Reference) -> None:
    tokens, logits = chosen
    assert torch.equal(reference.best[..., 0], reference.tokens)
    ours = reference.best == tokens.unsqueeze(-1)
    below = reference.logits[..., 0] - torch.where(ours, reference.logits, -torch.inf).amax(-1)  # inf: not even near
    disagreements, largest = int((below > 0).sum()), below.max().item()
    distance = (logits - reference.logits).abs()
    print(
        f"{disagreements} of {below.numel()} tokens differ, the largest gap is {largest:.3f}; "
        f"logits differ by {distance.mean().item():.3f}, at most {distance.max().item():.3f}"
    )
    assert below.numel() == len(PROMPTS) * NEW_TOKENS
    assert largest <= NEAR_TIE
    assert disagreements <= MOST_DISAGREEMENTS * below.numel()
    assert distance.mean() <= MEAN_DISTANCE


def test_its_text_is_sensible_english(default_model: Path, chosen: tuple[Tensor, Tensor]) -> None:
    text = AutoTokenizer.from_pretrained(default_model).decode(chosen[0][0])
    assert "scattering" in text
    assert "atmosphere" in text
