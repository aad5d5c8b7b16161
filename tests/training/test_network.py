"""The trainable network is the one the engine runs: same weights, same context, same numbers."""

from pathlib import Path

import pytest
import torch

from dspark_server.config import EngineConfig, SpeculativeConfig
from dspark_server.engine.core import EngineCore
from dspark_server.engine.executor import TorchExecutor
from dspark_server.engine.request import SamplingParams
from dspark_server.engine.trace import StepTrace
from dspark_server.models.decoder import Decoder
from dspark_server.models.hub import resolve_model
from dspark_server.runtime.batch import Batch, Run
from dspark_server.runtime.kv import KVPool
from dspark_server.runtime.paging import BlockTable, CacheLayout
from dspark_server.speculation.draft_block import DraftBlock
from dspark_server.speculation.dspark import DSparkDrafter
from dspark_server.speculation.eagle3 import Eagle3Drafter
from dspark_server.training.checkpoint import draft_model, export, load_weights, target_head
from dspark_server.training.config import TrainConfig
from dspark_server.training.model import Blocks, DraftModel

SMOLLM2 = "SmolLM2-135M-Instruct"
FIXTURES = Path(__file__).parent.parent / "fixtures"
PROMPT = [7, 300, 41, 5, 5, 90, 211, 12, 480, 33, 8, 17, 260, 100, 3, 77, 19, 4]


def blocks_of(core: EngineCore) -> list[tuple[list[int], DraftBlock]]:
    """Draft blocks of a greedy answer, each with the tokens before it, the anchor included."""
    seen: list[tuple[list[int], DraftBlock]] = []

    def record(trace: StepTrace) -> None:
        if trace.block:
            seen.append((list(trace.drafting[0].tokens), trace.block))

    core.loop.watch(record)
    core.generate([PROMPT], SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True))
    assert len(seen) >= 3
    return seen


def block_at(tokens: list[int], drafted: list[int], taps: tuple[int, ...], target: Decoder, pool: KVPool) -> Blocks:
    """The block whose anchor is the last of `tokens`, as training sees it."""
    context, anchor = tokens[:-1], tokens[-1]
    batch = Batch.of([Run(context, 0, [BlockTable(0, list(range(8)))], 0)], pool.groups)
    return Blocks(
        taps=torch.cat(target.forward(batch, pool.layers(0), taps)[1], dim=1),
        tokens=torch.tensor(context),
        positions=torch.arange(len(context)),
        anchors=torch.tensor([len(context)]),
        previous=torch.tensor([[anchor, *drafted[:-1]]]),
        spans=[(0, len(context), 0, 1)],
    )


def drafting_core(target: Path, draft: Path) -> EngineCore:
    speculative = SpeculativeConfig(model=str(draft), selection="fixed", copying=False)
    config = EngineConfig(model=str(target), dtype="float32", kv_cache_memory_bytes=16 << 20, speculative=speculative)
    return EngineCore.load(config)


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_trained_network_is_the_engines(kind: str) -> None:
    directory = FIXTURES / f"dspark_qwen3_{kind}"
    core = drafting_core(directory / "target", directory / "draft")
    executor = core.loop.executor
    assert isinstance(executor, TorchExecutor)
    drafter, target = executor.drafter, executor.target
    assert isinstance(drafter, DSparkDrafter)
    drafter.sampler.keep_logits = True
    model = DraftModel(drafter.config, target.embed.weight, 256)
    load_weights(model, None, directory / "target", directory / "draft")
    pool = KVPool(8, CacheLayout.of([target.caches], 16, 4), torch.float32)
    for tokens, block in blocks_of(core):
        with torch.inference_mode():
            blocks = block_at(tokens, block.tokens[0].tolist(), drafter.config.taps, target, pool)
            hidden, latent, confidence = model(blocks)
            bias = latent @ model.w2.T
        assert block.logits is not None
        assert block.base_logits is not None
        torch.testing.assert_close(hidden, block.hidden, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(bias, block.logits - block.base_logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(confidence, block.confidence, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["Qwen3", "SmolLM2"])
def test_trained_eagle3_is_the_engines(kind: str, tmp_path: Path) -> None:
    """From the same checkpoint, both make the same logits of every slot, with norms of heads and without."""
    directory = FIXTURES / "dspark_qwen3_vanilla" / "target" if kind == "Qwen3" else resolve_model(SMOLLM2)
    run = TrainConfig("", "", str(directory), method="eagle3", target_layer_ids=(0, 1), block_size=5)
    embedding = target_head(directory).float()
    model = draft_model(run, directory, embedding, 256)
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter + 0.2 * torch.randn(parameter.shape, generator=noise)).bfloat16())
    export(model, run, directory, None, tmp_path)
    core = drafting_core(directory, tmp_path)
    executor = core.loop.executor
    assert isinstance(executor, TorchExecutor)
    assert isinstance(executor.drafter, Eagle3Drafter)
    executor.drafter.sampler.keep_logits = True
    model.embedding = executor.target.embed.weight
    pool = KVPool(8, CacheLayout.of([executor.target.caches], 16, 4), torch.float32)
    for tokens, block in blocks_of(core):
        with torch.inference_mode():
            blocks = block_at(tokens, block.tokens[0].tolist(), run.target_layer_ids, executor.target, pool)
            drawn, _, confidence = model(blocks)
        assert confidence is None
        assert block.logits is not None
        slots = block.logits.shape[1]  # near its end, a request wants fewer
        torch.testing.assert_close(drawn[:, :slots] @ embedding.T, block.logits, atol=1e-3, rtol=1e-3)
