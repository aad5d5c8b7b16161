"""Greedy text of SmolLM2-135M-Instruct by transformers in float32: 20 answers of 200 tokens, kept as fixture data.

`python -m tests.models.greedy_reference` makes the file again, in a minute or two; it changes with the weights alone.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dspark_server.models.hub import resolve_model

FILE = Path(__file__).parents[1] / "fixtures" / "smollm2_greedy.npz"
MODEL = "SmolLM2-135M-Instruct"
NEW_TOKENS = 200
BEST = 5
PROMPTS = [
    "Why is the sky blue?",
    "Write a Python function that checks whether a word is a palindrome.",
    "Name three rivers in Europe and one fact about each.",
    "A train travels 60 km in 45 minutes. What is its speed in km/h?",
    "Explain photosynthesis to a child.",
    "Write a short poem about the sea in winter.",
    "What is the difference between a list and a tuple in Python?",
    "Give me a recipe for pancakes.",
    "Who wrote Romeo and Juliet, and when?",
    "Summarise the water cycle in two sentences.",
    "If I have 3 apples and buy 5 more, then eat 2, how many are left?",
    "Write a SQL query that counts the orders of each customer.",
    "How do vaccines work?",
    "Translate 'Good morning, my friend' into French.",
    "List five tips for sleeping better.",
    "What causes the tides?",
    "Write a polite e-mail that asks for a day off.",
    "Explain what a hash table is and when to use one.",
    "Tell me a story about a robot who learns to paint.",
    "What are the prime numbers below 30?",
]


class Reference(NamedTuple):
    """The answers of PROMPTS [20, 200], and at each place the best tokens with their float32 logits [20, 200, BEST]."""

    tokens: torch.Tensor
    best: torch.Tensor
    logits: torch.Tensor

    @classmethod
    def read(cls) -> "Reference":
        with np.load(FILE) as kept:
            return cls(*(torch.from_numpy(kept[name]) for name in cls._fields))


def conversations(directory: Path) -> list[list[int]]:
    """The prompts under the chat template, tokenized."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": p}], add_generation_prompt=True, tokenize=False)
        for p in PROMPTS
    ]
    return [tokenizer(text).input_ids for text in texts]


@torch.inference_mode()
def make() -> Reference:
    """Answer the prompts; end tokens end nothing."""
    directory = resolve_model(MODEL)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    prompts = conversations(directory)
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    texts = model.generate(padded, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
    tokens, best = texts[:, longest:], []
    for prompt, answer in zip(prompts, tokens.tolist(), strict=True):
        best.append(model(torch.tensor([prompt + answer[:-1]]), logits_to_keep=NEW_TOKENS).logits[0].topk(BEST))
    return Reference(tokens.int(), torch.stack([b.indices for b in best]).int(), torch.stack([b.values for b in best]))


if __name__ == "__main__":
    np.savez_compressed(FILE, **{name: tensor.numpy() for name, tensor in make()._asdict().items()})
