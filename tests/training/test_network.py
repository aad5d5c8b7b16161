"""The trainable network is the one the engine runs: same weights, same context, same numbers."""

from pathlib import Path

import pytest
import torch

from dspark_server.config import EngineConfig, SpeculativeConfig
from dspark_server.engine.core import EngineCore
from dspark_server.engine.executor import TorchExecutor
from dspark_server.engine.request import SamplingParams
from dspark_server.engine.trace import StepTrace
from dspark_server.runtime.batch import Batch, Run
from dspark_server.runtime.kv import KVPool
from dspark_server.runtime.paging import BlockTable, CacheLayout
from dspark_server.speculation.draft_block import DraftBlock
from dspark_server.speculation.dspark import DSparkDrafter
from dspark_server.training.checkpoint import load_weights
from dspark_server.training.model import Blocks, DraftModel

FIXTURES = Path(__file__).parent.parent / "fixtures"
PROMPT = [7, 300, 41, 5, 5, 90, 211, 12, 480, 33, 8, 17, 260, 100, 3, 77, 19, 4]


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_trained_network_is_the_engines(kind: str) -> None:
    directory = FIXTURES / f"dspark_qwen3_{kind}"
    seen: list[tuple[list[int], DraftBlock]] = []

    def record(trace: StepTrace) -> None:
        if trace.block:
            seen.append((list(trace.drafting[0].tokens), trace.block))

    speculative = SpeculativeConfig("dspark", str(directory / "draft"), selection="fixed", copying=False)
    config = EngineConfig(
        model=str(directory / "target"), dtype="float32", kv_cache_memory_bytes=16 << 20, speculative=speculative
    )
    core = EngineCore.load(config, trace=record)
    executor = core.loop.executor
    assert isinstance(executor, TorchExecutor)
    drafter, target = executor.drafter, executor.target
    assert isinstance(drafter, DSparkDrafter)
    drafter.sampler.keep_logits = True
    core.generate([PROMPT], SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True))
    assert len(seen) >= 3

    model = DraftModel(drafter.config, 256)
    load_weights(model, None, directory / "target", directory / "draft")
    pool = KVPool(8, CacheLayout.of([target.caches], 16, 4), torch.float32)
    for tokens, block in seen:
        context, anchor = tokens[:-1], tokens[-1]
        with torch.inference_mode():
            batch = Batch.of([Run(context, 0, [BlockTable(0, list(range(8)))], 0)], pool.groups)
            taps = torch.cat(target.forward(batch, pool.layers(0), drafter.config.taps)[1], dim=1)
            inputs = target.embed(torch.tensor([anchor, *[drafter.config.mask_token_id] * (drafter.gamma - 1)]))
            hidden, latent, confidence = model(
                Blocks(
                    taps=taps,
                    positions=torch.arange(len(context)),
                    inputs=inputs.unsqueeze(0),
                    anchors=torch.tensor([len(context)]),
                    previous=torch.tensor([[anchor, *block.tokens[0, :-1].tolist()]]),
                    spans=[(0, len(context), 0, 1)],
                )
            )
            bias = latent @ model.w2.T
        assert block.logits is not None
        assert block.base_logits is not None
        torch.testing.assert_close(hidden, block.hidden, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(bias, block.logits - block.base_logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(confidence, block.confidence, atol=1e-4, rtol=1e-4)
