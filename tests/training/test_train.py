"""Training: the loss is §3.3's, its gradient autograd's, a killed run ends like one that was not, and a run learns."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from dspark_server.config import EngineConfig, SpeculativeConfig
from dspark_server.engine.core import EngineCore
from dspark_server.engine.request import SamplingParams
from dspark_server.engine.trace import StepTrace
from dspark_server.errors import ConfigError
from dspark_server.models.hub import cache_dir
from dspark_server.runtime.linear import has_amx
from dspark_server.training import train as train_module
from dspark_server.training.config import TrainConfig
from dspark_server.training.corpus import Corpus, Split
from dspark_server.training.train import Batch, Trainer, multiplies_in_bfloat16, products_in, schedule, train

TARGET = Path(__file__).parent.parent / "fixtures" / "dspark_qwen3_vanilla" / "target"


def fresh_cache(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache but for the kernels built already."""
    kernels = cache_dir() / "kernels"
    directory.mkdir()
    (directory / "kernels").symlink_to(kernels.resolve())
    monkeypatch.setenv("DSPARK_CACHE_DIR", str(directory))


def small_run(directory: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """A run on the fixtures' target, on 12 random sequences, with a cache of its own."""
    fresh_cache(directory / "cache", monkeypatch)
    noise = np.random.default_rng(3)
    length = noise.integers(24, 60, 12)
    np.savez(
        directory / "corpus.npz",
        tokens=noise.integers(0, 500, length.sum()).astype(np.uint16),
        length=length.astype(np.int32),
        prompt_length=np.full(12, 9, np.int32),
    )
    return TrainConfig(
        corpus=str(directory / "corpus.npz"),
        output=str(directory / "out"),
        model=str(TARGET),
        mask_token_id=511,
        target_layer_ids=(1, 3, 4),
        precision="float32",
        markov_rank=8,
        sequences_per_step=2,
        anchors_per_sequence=5,
        held_out=2,
        steps=12,
        eval_every=4,
        save_every=4,
    )


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    return small_run(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Path]:
    """A run that is long enough to learn, and keeps the mean of its weights; its checkpoint."""
    once: dict[str, Any] = {"steps": 150, "eval_every": 150, "save_every": 150}
    with pytest.MonkeyPatch.context() as patch:
        run = replace(small_run(tmp_path_factory.mktemp("learnt"), patch), **once, learning_rate=3e-3, averaging=0.9)
        return run, train(run)


def plain_loss(trainer: Trainer, batch: Batch) -> Tensor:
    """§3.3 as it is written, over whole rows, by autograd."""
    run = trainer.run
    hidden, latent, confidence = trainer.model(batch.blocks)
    logits = (hidden @ trainer.drafted_head.weight.T + latent @ trainer.model.w2.T).flatten(0, 1)[batch.rows]
    if trainer.draft_tokens is not None:  # all others have no chance in the draft
        logits = torch.full((len(logits), len(trainer._head)), -torch.inf).index_copy(1, trainer.draft_tokens, logits)
    p, t = logits.softmax(-1), (batch.target @ trainer._head.T).softmax(-1)[batch.target_rows]
    position = batch.rows % run.block_size
    weight = torch.exp(-position / run.decay)
    distance = (p - t).abs().sum(-1)
    cross_entropy = F.cross_entropy(logits, batch.labels, reduction="none")
    terms = 0.1 * cross_entropy.where(cross_entropy.isfinite(), 0) + 0.9 * distance
    if confidence is not None:
        c = torch.sigmoid(confidence.flatten()[batch.rows])
        survival = (1 - distance / 2).detach()
        terms = terms - survival * c.log() - (1 - survival) * (1 - c).log()
    return (weight * terms).sum() / weight.sum()


def away_from_zeros(trainer: Trainer) -> None:
    """Off the zeros of the start, where half of the gradients vanish."""
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("kind", "rank", "vocabulary"),
    [("vanilla", 8, None), ("gated", 8, None), ("rnn", 8, None), ("vanilla", 0, None), ("vanilla", 8, 100)],
)
def test_loss_and_gradient_are_the_plain_ones(run: TrainConfig, kind: str, rank: int, vocabulary: int | None) -> None:
    assert_loss_is_plain(replace(run, markov_head_type=kind, markov_rank=rank, vocabulary=vocabulary))


@pytest.mark.parametrize("vocabulary", [None, 100])
@pytest.mark.parametrize("method", ["eagle3", "mtp", "dflash2"])
def test_loss_and_gradient_of_others_are_the_plain_ones(run: TrainConfig, method: str, vocabulary: int | None) -> None:
    assert_loss_is_plain(replace(run, method=method, vocabulary=vocabulary))


def assert_loss_is_plain(run: TrainConfig) -> None:
    trainer = Trainer(run)
    away_from_zeros(trainer)
    batch = trainer.batch(trainer.split.step(0, 4, 6))
    ours = trainer.losses(batch).total
    ours.backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    plain = plain_loss(trainer, batch)
    plain.backward()
    assert ours.item() == pytest.approx(plain.item(), rel=1e-5)
    assert gradients.keys() == dict(trainer.model.named_parameters()).keys()
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=2e-6, rtol=1e-3, msg=name)


@pytest.mark.parametrize(("rank", "vocabulary"), [(8, None), (0, None), (8, 100)])
def test_products_in_bfloat16_change_loss_and_gradient_by_their_rounding(
    run: TrainConfig, rank: int, vocabulary: int | None
) -> None:
    trainer = Trainer(replace(run, markov_rank=rank, vocabulary=vocabulary, precision="bfloat16"))
    exact = Trainer(replace(trainer.run, precision="float32"))
    away_from_zeros(trainer)
    exact.model.load_state_dict(trainer.model.state_dict())
    batch = trainer.batch(trainer.split.step(0, 4, 6))
    ours, plain = trainer.losses(batch).total, plain_loss(exact, batch)
    ours.backward()
    plain.backward()
    assert ours.item() == pytest.approx(plain.item(), rel=2e-3)
    assert ours.item() != plain.item()  # they were multiplied in something else
    for (name, rounded), parameter in zip(trainer.model.named_parameters(), exact.model.parameters(), strict=True):
        assert rounded.grad is not None and parameter.grad is not None
        assert rounded.grad.dtype == torch.float32
        error = (rounded.grad - parameter.grad).norm() / parameter.grad.norm()
        assert error < 0.1, name  # where draft and target are all but equal, the sign of their L1 may flip


def test_slots_are_labelled_with_the_tokens_that_follow(run: TrainConfig) -> None:
    trainer = Trainer(run)
    chosen = trainer.split.step(3, 2, 5)
    batch = trainer.batch(chosen)
    rows = iter(zip(batch.rows.tolist(), batch.labels.tolist(), strict=True))
    block = 0
    for index, anchors in chosen:
        tokens = trainer.split.corpus.sequence(index)
        assert min(anchors) >= trainer.split.corpus.prompt_length[index]
        for anchor in anchors:
            for k in range(min(7, len(tokens) - 1 - anchor)):
                assert next(rows) == (block * 7 + k, tokens[anchor + k + 1])
                assert batch.blocks.previous[block, k] == tokens[anchor + k]
            block += 1
    assert next(rows, None) is None


def test_a_killed_run_ends_like_one_that_was_not(
    run: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_file(train(run) / "model.safetensors")
    whole_log = (tmp_path / "out" / "log.csv").read_text()

    fresh_cache(tmp_path / "other-cache", monkeypatch)
    step = Trainer.train_step

    def killed(self: Trainer) -> Any:
        if self.step == 7:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", killed)
        with pytest.raises(KeyboardInterrupt):
            train(run)
    again = load_file(train(run) / "model.safetensors")
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)

    def figures(log: str) -> list[list[str]]:
        return [line.split(",")[:-1] for line in log.splitlines()]  # the last column is time

    assert figures((tmp_path / "out" / "log.csv").read_text()) == figures(whole_log)


@pytest.mark.usefixtures("run")  # for its cache
def test_a_run_learns_and_the_engine_serves_what_it_made(learnt: tuple[TrainConfig, Path]) -> None:
    run, directory = learnt
    trainer = Trainer(run)
    batch = trainer.batch(trainer.split.step(0, 4, 6))
    before = float(trainer.losses(batch).survival.mean())
    after = float(Trainer(replace(run, weights=str(directory))).losses(batch).survival.mean())
    assert after > before + 0.1
    speculative = SpeculativeConfig(method="dspark", model=str(directory), selection="fixed")
    core = EngineCore.load(EngineConfig(model=str(TARGET), kv_cache_memory_bytes=8 << 20, speculative=speculative))
    core.generate([[5, 6, 7, 8, 9, 10]], SamplingParams(max_tokens=40, temperature=1.0, ignore_eos=True))
    assert core.loop.stats.draft_tokens > 0


@pytest.mark.usefixtures("run")  # for its cache
@pytest.mark.parametrize(("method", "vocabulary"), [("eagle3", None), ("eagle3", 300), ("mtp", 300), ("dflash2", 300)])
def test_others_learn_continue_and_are_served(
    learnt: tuple[TrainConfig, Path],
    method: str,
    vocabulary: int | None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In the formats of others; the engine knows the family, and that it was made for this target."""
    run = replace(
        learnt[0],
        steps=80,
        eval_every=80,
        save_every=80,
        method=method,
        block_size=3,
        vocabulary=vocabulary,
        output=str(tmp_path / method),
    )
    directory = train(run)
    trainer = Trainer(run)
    batch = trainer.batch(trainer.split.step(0, 4, 6))
    before = float(trainer.losses(batch).survival.mean())
    again = Trainer(replace(run, weights=str(directory)))
    assert float(again.losses(batch).survival.mean()) > before + 0.05
    speculative = SpeculativeConfig(model=str(directory), selection="fixed", copying=False)
    core = EngineCore.load(EngineConfig(model=str(TARGET), kv_cache_memory_bytes=8 << 20, speculative=speculative))
    seen: list[int] = []

    def look(step: StepTrace) -> None:
        if step.block:
            assert step.block.tokens.shape[1] <= 3
            seen.extend(step.block.tokens.flatten().tolist())

    assert core.drafter == method
    core.loop.watch(look)
    core.generate([[5, 6, 7, 8, 9, 10]], SamplingParams(max_tokens=40, temperature=1.0, ignore_eos=True))
    assert len(seen) > 20
    assert trainer.draft_tokens is None or set(seen) <= set(trainer.draft_tokens.tolist())
    assert "other weights" not in caplog.text


def test_averaged_weights_are_the_running_mean_and_the_others_come_back(run: TrainConfig) -> None:
    trainer = Trainer(replace(run, averaging=0.9))
    mean = [p.detach().clone() for p in trainer.model.parameters()]
    for step in range(1, 31):
        trainer.train_step()
        kept = min(0.9, step / (step + 10))
        mean = [kept * m + (1 - kept) * p.detach() for m, p in zip(mean, trainer.model.parameters(), strict=True)]
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with trainer.averaged():
        for expected, parameter in zip(mean, trainer.model.parameters(), strict=True):
            torch.testing.assert_close(parameter, expected)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


@pytest.mark.usefixtures("run")  # for its cache
def test_training_goes_on_from_exported_weights(learnt: tuple[TrainConfig, Path], tmp_path: Path) -> None:
    """A new optimizer, a short warm-up: what was learnt stays, and more is learnt."""
    first, directory = learnt
    batches = [(trainer := Trainer(first)).batch(trainer.split.step(step, 4, 6)) for step in range(3)]

    def loss(weights: Path | None) -> float:
        trainer = Trainer(replace(first, weights=str(weights) if weights else None))
        return sum(float(trainer.losses(batch).total.detach()) for batch in batches)

    second = replace(first, weights=str(directory), steps=60, warmup=0.1, output=str(tmp_path / "second"))
    fresh, earlier = loss(None), loss(directory)
    later = loss(train(second))
    assert later < earlier < fresh


def test_weights_move_to_another_draft_vocabulary_and_block_size(run: TrainConfig, tmp_path: Path) -> None:
    """Each token keeps its row of W2; one that was not drafted before starts at zero."""
    small = replace(run, vocabulary=64, block_size=4, eval_every=12, save_every=12)
    directory = train(small)
    before = Trainer(replace(small, weights=str(directory)))
    after = Trainer(replace(run, vocabulary=96, weights=str(directory)))
    assert before.draft_tokens is not None
    assert after.draft_tokens is not None
    assert before.model.w2.shape == (64, 8)
    assert before.model.w2.abs().sum() > 0
    rows = dict(zip(before.draft_tokens.tolist(), before.model.w2, strict=True))
    for token, row in zip(after.draft_tokens.tolist(), after.model.w2, strict=True):
        torch.testing.assert_close(row, rows.get(token, torch.zeros(8)))
    assert sum(token in rows for token in after.draft_tokens.tolist()) == 64
    others = [name for name in before.model.state_dict() if "markov_w2" not in name]
    assert all(torch.equal(before.model.state_dict()[name], after.model.state_dict()[name]) for name in others)
    assert len(Trainer(after.run).losses(after.batch(after.split.step(0, 2, 5))).survival) > 0


def test_only_the_trained_vocabulary_is_drafted(run: TrainConfig) -> None:
    directory = train(replace(run, vocabulary=64, eval_every=12, save_every=12))
    allowed = Trainer(replace(run, vocabulary=64)).draft_tokens
    assert allowed is not None
    seen: list[int] = []

    def look(step: StepTrace) -> None:
        if step.block:
            seen.extend(step.block.tokens.flatten().tolist())

    for shortlist in (None, 12):
        speculative = SpeculativeConfig(method="dspark", model=str(directory), selection="fixed", shortlist=shortlist)
        config = EngineConfig(model=str(TARGET), kv_cache_memory_bytes=8 << 20, speculative=speculative)
        core = EngineCore.load(config, trace=look)
        seen.clear()
        for own in (SamplingParams(max_tokens=30, ignore_eos=True), SamplingParams(max_tokens=30, temperature=0.0)):
            core.generate([[5, 6, 7, 8]], own)
        assert len(seen) > 50
        assert set(seen) <= set(allowed.tolist())


def test_new_sequences_come_every_reuse_places_and_epochs_follow(run: TrainConfig) -> None:
    split = Split.of(Corpus.load(Path(run.corpus)), held_out=2, seed=0, reuse=3)
    drawn = [split.drawn(place) for place in range(50)]
    for place in range(30):
        seen = set(split.training[: place // 3 + 1].tolist())
        assert drawn[place] in seen
        if place % 3 == 0:
            assert drawn[place] == split.training[place // 3]
    assert any(drawn[place] != split.training[place // 3] for place in range(30))
    for epoch in (drawn[30:40], drawn[40:50]):
        assert sorted(epoch) == sorted(split.training.tolist())
    assert not set(drawn) & set(split.held_out)


def test_precision_is_set_for_the_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_float32_matmul_precision()
    with products_in("bfloat16"):
        assert torch.get_float32_matmul_precision() == ("medium" if has_amx() else before)
    monkeypatch.setattr(train_module, "has_amx", lambda: True)
    with products_in("bfloat16"):
        assert torch.get_float32_matmul_precision() == "medium"
    with products_in("float32"):
        assert torch.get_float32_matmul_precision() == before
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize(
    ("amx", "pairs", "expected"), [(False, False, False), (True, False, True), (False, True, True)]
)
def test_precision_follows_the_processor(
    monkeypatch: pytest.MonkeyPatch, amx: bool, pairs: bool, expected: bool
) -> None:
    monkeypatch.setattr(train_module, "has_amx", lambda: amx)
    monkeypatch.setattr(train_module, "has_bfloat16_pairs", lambda: pairs)
    assert multiplies_in_bfloat16("auto") is expected
    assert multiplies_in_bfloat16("bfloat16")
    assert not multiplies_in_bfloat16("float32")


def test_schedule_rises_then_falls_to_zero() -> None:
    assert [schedule(step, 100, 0.02, constant=True) for step in (0, 1, 50, 99)] == [0.5, 1.0, 1.0, 1.0]
    factors = [schedule(step, 100, 0.04) for step in range(100)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert 0 < factors[-1] < 0.001


@pytest.mark.parametrize("text", ["- 1", "corpus: a", "corpus: a\noutput: b\nspeed: 3", "corpus: ["])
def test_a_bad_config_says_so(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        TrainConfig.load(path)
