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
from dspark_server.speculation.model_drafter import ModelDrafter
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
    batch = Batch.of([Run(context, 0, [BlockTable(0, list(range(8)))], len(context))], pool.groups)
    states, outputs = target.forward(batch, pool.layers(0), taps)
    return Blocks(
        taps=torch.cat(outputs, dim=1),
        states=states,
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


@pytest.mark.parametrize(
    ("method", "kind", "vocabulary"),
    [
        *((method, "Qwen3", vocabulary) for method in ("eagle3", "mtp", "dflash2") for vocabulary in (None, 200)),
        ("eagle3", "SmolLM2", None),  # a layer without norms of heads, as the target's
    ],
)
def test_what_is_exported_is_what_was_trained(method: str, kind: str, vocabulary: int | None, tmp_path: Path) -> None:
    """Trainer and engine make the same logits of every slot from one checkpoint, and draft the same tokens."""
    directory = FIXTURES / "dspark_qwen3_vanilla" / "target" if kind == "Qwen3" else resolve_model(SMOLLM2)
    run = TrainConfig(
        "", "", str(directory), method, mask_token_id=3, target_layer_ids=(0, 1), block_size=5, vocabulary=vocabulary
    )
    embedding = target_head(directory).float()
    model = draft_model(run, directory, embedding, 256)
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter + 0.2 * torch.randn(parameter.shape, generator=noise)).bfloat16())
    kept = None if vocabulary is None else torch.randperm(len(embedding), generator=noise)[:vocabulary].sort().values
    export(model, run, directory, kept, tmp_path)
    core = drafting_core(directory, tmp_path)
    executor = core.loop.executor
    assert isinstance(executor, TorchExecutor)
    drafter = executor.drafter
    assert isinstance(drafter, ModelDrafter)
    assert (drafter.method, drafter.gamma) == (method, 5)
    drafter.sampler.keep_logits = True
    model.embedding = executor.target.embed.weight
    pool = KVPool(8, CacheLayout.of([executor.target.caches], 16, 4), torch.float32)
    head = embedding if kept is None else embedding[kept]
    if method == "eagle3" and kept is not None:  # its own head, which is written in bfloat16
        head = head.bfloat16().float()
    for tokens, block in blocks_of(core):
        drafted = block.tokens[0].tolist()
        with torch.inference_mode():
            blocks = block_at(tokens, drafted, run.target_layer_ids, executor.target, pool)
            drawn, latent, confidence = model(blocks)
            base = (drawn @ head.T)[0]
            logits = base + (latent @ model.w2.T)[0] if latent.shape[-1] else base
        assert confidence is None
        assert block.base_logits is not None
        slots = block.base_logits.shape[1]  # near its end, a request wants fewer
        torch.testing.assert_close(base[:slots], block.base_logits[0], atol=1e-3, rtol=1e-3)
        for slot in range(slots):
            among = torch.arange(len(head)) if method != "dflash2" else base[slot].topk(run.selector_top_k).indices
            best = int(among[logits[slot, among].argmax()])
            assert drafted[slot] == (best if kept is None else int(kept[best]))
