"""The executor of a device against the plain one, on the twin (tests/runtime/twin.py): float32, token by token."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from dspark_kernels import ReferenceKernels
from safetensors.torch import load_file, save_file
from torch import Tensor

from dspark_server import failpoints
from dspark_server.config import EngineConfig, SpeculativeConfig
from dspark_server.engine.core import EngineCore
from dspark_server.engine.device_executor import DeviceExecutor
from dspark_server.engine.request import SamplingParams
from dspark_server.engine.stats import EngineStats
from dspark_server.engine.trace import StepTrace
from dspark_server.runtime.graphs import Graphs
from dspark_server.runtime.staging import Staging
from dspark_server.speculation.calibration import Calibration
from dspark_server.speculation.cost_model import Profile
from dspark_server.speculation.estimates import Estimates

from ..models.test_moe import save_moe
from ..runtime.twin import TwinDevice, TwinKernels
from . import test_dflash2 as dflash2
from . import test_mtp as mtp
from .support import FIXTURES, REPETITIVE, greedy, prompts, seeded, shallow_pair, still
from .test_dflash2 import TARGET
from .test_drafter_formats import dflash_fields

# Clocks stand still in `load`, so that these stay, and selection is the same at every run.
COSTS = Profile((1, 16, 64), (1e4, 1.1e4, 2e4), (1, 4), (500.0, 700.0), 0.0, 0.0)
SIZES = {"max_num_seqs": 4, "max_num_batched_tokens": 40, "max_model_len": 96, "block_size": 4, "num_blocks": 96}


@dataclass
class Seen:
    """What a step drafted, verified and accepted."""

    drafted: list[list[int]]
    lengths: list[int]
    accepted: list[int]
    survival: Tensor | None

    @classmethod
    def of(cls, trace: StepTrace) -> "Seen":
        count = trace.accepted.count.tolist()
        if trace.block is None:
            return cls([], [], count, None)
        # What cannot be verified need not be drawn.
        drafted = [tokens[:most] for tokens, most in zip(trace.block.tokens.tolist(), trace.block.limits, strict=True)]
        return cls(drafted, list(trace.block.lengths), count, trace.block.survival)

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Seen)
        mine = (self.drafted, self.lengths, self.accepted)
        if mine != (other.drafted, other.lengths, other.accepted):
            return False
        if self.survival is None or other.survival is None:
            return self.survival is other.survival
        return bool(torch.isclose(self.survival, other.survival, atol=1e-5, equal_nan=True).all())


def load(
    device: TwinDevice | None,
    selection: str = "fixed",
    *,
    head: str = "vanilla",
    pair: Path | None = None,
    method: str = "dspark",
    draft: Path | None = None,
    kernels: Any = None,
    speculative: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[EngineCore, list[Seen]]:
    pair = pair or shallow_pair(head)
    draft = draft or pair / "draft"  # without one, the target has its drafter inside
    drafter = {"model": str(draft)} if method in ("auto", "dspark") and draft.exists() else {}
    seen: list[Seen] = []
    config = EngineConfig(
        model=str(pair / "target"),
        dtype="float32",
        speculative=SpeculativeConfig(method=method, selection=selection, **drafter, **(speculative or {})),
        check_invariants=True,
        **(SIZES | ({"cuda_graph_sizes": (8, 24)} if device else {}) | settings),
    )
    core = EngineCore.load(
        config,
        COSTS,
        device=device,
        kernels=kernels or (TwinKernels() if device else ReferenceKernels()),
        trace=lambda trace: seen.append(Seen.of(trace)),
        clock=still,
    )
    if device:
        device.launch_seconds = 0.0  # nor do its events teach costs
    return core, seen


def renew(core: EngineCore, selection: str) -> None:
    """Make an engine that has no requests what it was when loaded, except for what its memory and its graphs hold."""
    stats = EngineStats(accepted_per_position=[0] * core.loop.executor.gamma)
    vars(core.loop.stats).update(vars(stats))
    core.batcher.pool.reset()
    core.select(selection)
    core.loop._estimates = Estimates()
    core.batcher._drafted = float(core.batcher.gamma)
    if isinstance(core.loop.executor, DeviceExecutor):
        core.loop.executor.passes.replays = core.loop.executor.drafts.replays = 0


class Engines:
    """The engines of this file, each loaded once, and renewed for each test."""

    def __init__(self) -> None:
        self._loaded: dict[str, tuple[EngineCore, list[Seen], TwinDevice | None]] = {}

    def plain(self, selection: str = "fixed", **options: Any) -> tuple[EngineCore, list[Seen]]:
        options = {name: value for name, value in options.items() if name not in ("cuda_graph_sizes", "enforce_eager")}
        core, seen, _ = self._renewed(None, selection, options)
        return core, seen

    @contextmanager
    def twin(self, selection: str = "fixed", **options: Any) -> Iterator[tuple[EngineCore, list[Seen], TwinDevice]]:
        """Yield an engine of a device, with its steps and its device, whose mode is on."""
        known = self._loaded.get(self._key(True, options))
        with TwinDevice() if known is None or known[2] is None else known[2] as device:
            core, seen, _ = self._renewed(device, selection, options)
            device.fetch([])  # what recording has uploaded is there
            device.syncs, device.waits, device.surprises = 0, 0, []
            yield core, seen, device

    def _renewed(
        self, device: TwinDevice | None, selection: str, options: dict[str, Any]
    ) -> tuple[EngineCore, list[Seen], TwinDevice | None]:
        key = self._key(device is not None, options)
        if key not in self._loaded:
            self._loaded[key] = (*load(device, selection, **options), device)
        core, seen, _ = self._loaded[key]
        renew(core, selection)
        seen.clear()
        return self._loaded[key]

    def _key(self, away: bool, options: dict[str, Any]) -> str:
        return repr((away, sorted(options.items())))

    def both(
        self, work: Callable[[EngineCore], Any], selection: str = "fixed", *, steps: bool = True, **options: Any
    ) -> tuple[EngineCore, TwinDevice]:
        """Do the same with the plain executor and with the device's: the same must come of it, and of its `steps`."""
        plain, expected = self.plain(selection, **options)
        wanted = work(plain)
        with self.twin(selection, **options) as (core, seen, device):
            assert work(core) == wanted
        assert seen
        assert seen == expected or not steps
        assert device.waits <= core.loop.stats.steps - len(seen), "a buffer was filled twice between two waits"
        return core, device


@pytest.fixture(scope="module")
def engines() -> Engines:
    return Engines()


def sampled(temperature: float = 0.9, max_tokens: int = 9, **params: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=temperature, ignore_eos=True, **params)


AT_ONCE = [greedy(10), sampled(), greedy(6), sampled(0.5), greedy(9), sampled(1.3)]
FILTERED = [sampled(top_p=0.7), greedy(10), sampled(top_k=5), sampled(0.8, top_k=40, top_p=0.9, min_p=0.02),
            sampled(), sampled(1.3, min_p=0.1)]  # fmt: skip
SLOT_BY_SLOT = [seeded(3, 9), sampled(top_p=0.7), greedy(8), sampled(top_k=5, min_p=0.05),
                sampled(logit_bias=((7, 4.0),), frequency_penalty=0.5), seeded(3, 9)]  # fmt: skip


def generate(params: list[SamplingParams], seed: int = 0) -> Callable[[EngineCore], list[list[int]]]:
    return lambda core: core.generate(prompts(len(params), longest=24, seed=seed), params)


def executor_of(core: EngineCore) -> DeviceExecutor:
    assert isinstance(core.loop.executor, DeviceExecutor)
    return core.loop.executor


@pytest.mark.parametrize("selection", ["causal", "lagged", "fixed"])
def test_the_same_tokens_and_so_many_waits(engines: Engines, selection: str) -> None:
    """Under lagged a step waits once, under the others twice, once if nothing is drafted; and never by accident."""
    core, device = engines.both(generate(AT_ONCE), selection)
    steps, drafted = core.loop.stats.steps, core.loop.stats.drafting["drafted"]
    assert drafted > 0
    assert core.loop.stats.accepted_tokens > 0
    assert device.surprises == []
    if selection == "lagged":
        assert device.syncs <= steps
    else:
        assert steps < device.syncs <= 2 * steps
    assert executor_of(core).passes.replays > 0
    assert executor_of(core).drafts.replays > 0


@pytest.mark.parametrize("selection", ["lagged", "fixed"])
def test_filters_cost_no_wait(engines: Engines, selection: str) -> None:
    core, device = engines.both(generate(FILTERED), selection)
    assert core.loop.stats.accepted_tokens > 0
    assert device.surprises == []
    assert device.syncs <= core.loop.stats.steps * (1 if selection == "lagged" else 2)
    assert executor_of(core).drafts.replays > 0
    bare = [sampled(params.temperature, params.max_tokens) for params in FILTERED]
    assert generate(FILTERED)(engines.plain()[0]) != generate(bare)(engines.plain()[0]), (
        "the filters do not matter here"
    )


def test_copies_of_the_context_beside_the_drafters_blocks(engines: Engines) -> None:
    """Greedy text repeats itself after these prompts. Where copies are drafted alone, a step is not run ahead."""

    def repeated(core: EngineCore) -> list[list[int]]:
        return core.generate([REPETITIVE[0], prompts(1)[0], REPETITIVE[2]], [greedy(18), sampled(), greedy(16)])

    core, device = engines.both(repeated, "lagged")
    assert core.loop.stats.drafting["copied"] > 0
    assert device.surprises == []
    assert device.syncs <= 2 * core.loop.stats.steps
    alone, device = engines.both(repeated, "fixed", method="ngram")
    assert alone.loop.stats.drafting["copied"] > 0
    assert device.syncs <= alone.loop.stats.steps


@pytest.mark.parametrize(
    "options",
    [{}, {"head": "rnn"}, {"head": "gated", "speculative": {"shortlist": 24}}],
    ids=["vanilla", "rnn", "shortlist"],
)
def test_what_looks_at_its_own_numbers_runs_eagerly(engines: Engines, options: dict[str, Any]) -> None:
    core, device = engines.both(generate(SLOT_BY_SLOT), "causal", **options)
    assert core.loop.stats.accepted_tokens > 0
    assert device.surprises, "these wait where the table in docs/gpu.md says so"
    assert executor_of(core).drafts.replays > 0, "but the backbone is replayed"


@pytest.mark.parametrize("options", [{"cuda_graph_sizes": (2, 4)}, {"enforce_eager": True, "cuda_graph_sizes": ()}])
def test_a_step_beyond_the_largest_graph_runs_eagerly(engines: Engines, options: dict[str, Any]) -> None:
    core, _ = engines.both(generate(AT_ONCE[:4]), "lagged", **options)
    replays = executor_of(core).passes.replays
    assert replays < core.loop.stats.steps
    assert (replays > 0) == ("enforce_eager" not in options)


def test_prompts_are_scored_and_prefixes_reused(engines: Engines) -> None:
    def work(core: EngineCore) -> Any:
        scored = SamplingParams(max_tokens=4, temperature=0.0, prompt_logprobs=1, logprobs=1, ignore_eos=True)
        first = core.generate(prompts(3), [scored, greedy(6), sampled()])
        return first + core.generate(prompts(3), [greedy(6)] * 3), core.loop.stats.prefix_hits

    core, _ = engines.both(work, "lagged")
    assert core.loop.stats.prefix_hits > 0


def test_fp8_rows_are_those_of_the_reference(engines: Engines) -> None:
    # Survivals may differ: one last bit of float32 can round a value to the next one that e4m3 has.
    core, _ = engines.both(generate(AT_ONCE[:3]), kv_cache_dtype="fp8", steps=False)
    assert core.cache_dtype == "float8_e4m3fn"
    assert executor_of(core).pool.layers(0)[0][0].dtype == torch.float8_e4m3fn


def test_padding_never_reaches_a_row_that_is_read(engines: Engines) -> None:
    """Padded rows are NaN after attention (TwinKernels): they may stand in the scratch slot alone."""
    with engines.twin("lagged", cuda_graph_sizes=(24,)) as (core, _, _):
        core.generate(prompts(3), AT_ONCE[:3])
        pool = executor_of(core).pool
        for owner in range(2):
            for keys, values, _ in pool.layers(owner):
                for rows in (keys, values):
                    assert bool(rows[: pool.num_blocks].isfinite().all())
                    assert bool(rows[pool.num_blocks, 1:].eq(0).all())
        written = [bool(keys[pool.num_blocks, 0].isnan().any()) for keys, _, _ in pool.layers(0)]
    assert any(written), "no step was padded: the test has no force"


@pytest.mark.parametrize("selection", ["lagged", "fixed"])  # costs come with the first
def test_layers_with_a_window_beside_others(engines: Engines, selection: str) -> None:
    """Two block tables for a request, one of which begins behind its first token: laid out as on the host."""
    options: dict[str, Any] = {"pair": FIXTURES / "dspark_gemma4", "num_blocks": 400, "max_model_len": 400}
    asked = [[token % 380 for token in prompt] for prompt in prompts(4, shortest=60, longest=220)]
    params = [greedy(16), seeded(1, 16), greedy(16), seeded(2, 16)]
    wanted = engines.plain(selection, **options)[0].generate(asked, params)
    with engines.twin(selection, **options, cuda_graph_sizes=(8, 24)) as (core, _, _):
        assert core.generate(asked, params) == wanted
        assert core.generate(asked, params) == wanted, "prefixes are found now"
        assert core.loop.stats.prefix_hits > 0


# What is drawn at once, with filters, and slot by slot: each under a policy for which it could matter.
RULES = {"causal": (AT_ONCE, SLOT_BY_SLOT), "lagged": (AT_ONCE, FILTERED), "fixed": (AT_ONCE,)}


@pytest.mark.parametrize("selection", RULES)
@pytest.mark.parametrize("pair", ["eagle3_qwen3", "mtp_gemma4_assistant"])
def test_a_drafter_of_one_token_a_pass(engines: Engines, pair: str, selection: str) -> None:
    """Its passes are recorded one after the other; rules that look at numbers run them eagerly."""
    texts = [[token % 380 for token in prompt] for prompt in prompts(6, longest=24)]
    for params in RULES[selection]:
        core, _ = engines.both(
            lambda core, params=params: core.generate(texts, params),  # type: ignore[misc]
            selection,
            pair=FIXTURES / pair,
            method="auto",
            max_model_len=80,
        )
        assert core.loop.stats.draft_tokens > 0
        assert core.loop.stats.failed_drafts == 0
        assert executor_of(core).drafts.replays > 0 or params is SLOT_BY_SLOT


@pytest.fixture(scope="module")
def formats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Drafters of one target in the formats of others: of wider blocks than they draft, with a selector, by repetition.

    Widths: DFlash's anchor is in the block and predicts nothing.
    """
    made = {name: tmp_path_factory.mktemp(name) for name in ("dflash", "dflash2", "mtp")}
    own = TARGET.parent / "draft"
    fields, tensors = json.loads((own / "config.json").read_text()), load_file(own / "model.safetensors")
    heads = ("markov_head", "confidence_head", "embed_tokens", "lm_head")
    write(made["dflash"], dflash_fields(fields), {n: t for n, t in tensors.items() if not n.startswith(heads)})
    write(made["dflash2"], dflash2.CONFIG, dflash2.weights())
    write(made["mtp"], mtp.CONFIG, mtp.weights())
    return made


def write(directory: Path, fields: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    (directory / "config.json").write_text(json.dumps(fields))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "selection"), [("dflash", "causal"), ("dflash", "lagged"), ("dflash2", "lagged"), ("mtp", "causal")]
)
def test_drafters_in_the_formats_of_others(
    engines: Engines, formats: dict[str, Path], name: str, selection: str
) -> None:
    for params in RULES[selection]:
        core, _ = engines.both(generate(params), selection, pair=TARGET.parent, draft=formats[name], method="auto")
        assert core.loop.stats.draft_tokens > 0
        assert core.loop.stats.failed_drafts == 0
        recorded = params is not SLOT_BY_SLOT and name != "dflash2"  # whose selector reads its candidates on the host
        assert (executor_of(core).drafts.replays > 0) or not recorded


def test_a_mixture_of_experts(tmp_path: Path) -> None:
    """Its router and its experts read nothing on the host: recorded, padded, with the tokens of the host's executor."""
    save_moe(tmp_path / "target", "qwen3", vocab_size=512, num_hidden_layers=3)
    pair = shallow_pair("vanilla")
    (tmp_path / "draft").symlink_to(pair / "draft")
    asked, params = prompts(3), [greedy(10), seeded(1, 10), greedy(8)]
    wanted = load(None, pair=tmp_path)[0].generate(asked, params)
    with TwinDevice() as device:
        core, _ = load(device, pair=tmp_path)
        assert core.generate(asked, params) == wanted
        assert executor_of(core).passes.replays > 0


def test_the_lengths_of_a_pass_that_was_run_ahead_are_the_devices(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are those that the policy comes to. Were they not, the pass would still be the one that has run."""
    with engines.twin("lagged", cuda_graph_sizes=(24,)) as (core, seen, _):
        real, chosen = core.loop._selection.lengths, list[list[int]]()

        def lengths(*arguments: Any, **more: Any) -> list[int]:
            assert len(chosen) < 100, "it does not come to an end"
            chosen.append(real(*arguments, **more))
            return [0] * len(chosen[-1])

        monkeypatch.setattr(core.loop._selection, "lengths", lengths)
        replays, steps = executor_of(core).passes.replays, core.loop.stats.steps
        del seen[:]
        tokens = core.generate(prompts(3), AT_ONCE[:3])
        ahead = [step.lengths for step in seen if step.lengths]
        assert ahead == chosen
        assert any(map(any, ahead))
        assert executor_of(core).passes.replays - replays <= core.loop.stats.steps - steps, "a pass was run again"
    assert tokens[0] == engines.plain("none")[0].generate(prompts(3), AT_ONCE[:3])[0]


def test_a_failed_step_leaves_nothing_behind(engines: Engines) -> None:
    with engines.twin("lagged", cuda_graph_sizes=(24,)) as (core, _, _):
        wanted = core.generate(prompts(2), AT_ONCE[:2])
        with failpoints.armed(step_verify="raise:MemoryError@2"), pytest.raises(MemoryError):
            core.generate(prompts(2), AT_ONCE[:2])
        core.fail_step("failed")
        assert core.generate(prompts(2), AT_ONCE[:2]) == wanted


def test_the_pool_takes_what_memory_leaves() -> None:
    with TwinDevice(free=9000 << 10, total=10000 << 10, working=100 << 10) as device:
        core, _ = load(device, num_blocks=None, gpu_memory_utilization=0.8)
        pool = executor_of(core).pool
        caches = [cache for owner in (0, 1) for cache in pool.layers(owner)]
        per_block = sum(4 * (cache.keys[0].numel() + cache.values[0].numel()) for cache in caches)
        assert pool.num_blocks == (8000 - 1000 - 100) * 1024 // per_block


def test_the_graphs_of_all_sizes_share_one_result() -> None:
    with TwinDevice() as device:
        graphs = Graphs(device, [2, 4])
        source = device.zeros((8,), torch.float32)
        for size in (4, 2):
            graphs.run(size, lambda n: (source[:n] + 1, None))
        source += 2
        two, _ = graphs.run(1, lambda n: (source[:n] + 1, None))
        assert two is not None
        assert two.tolist() == [3.0, 3.0]
        four, _ = graphs.run(3, lambda n: (source[:n] + 1, None))
        assert four is not None
        assert four.near.data_ptr() == two.near.data_ptr()  # type: ignore[attr-defined]
        assert graphs.bucket(5) is None


# They come and go, so that every input changes from step to step; and their prompts repeat themselves.
STALE = [
    sampled(0.05, 14),
    sampled(0.7, 14),
    greedy(3),
    sampled(0.5, 12, max_draft_tokens=0),
    sampled(0.1, 12),
    sampled(0.9, 10),
]
STALE_FILTERED = [sampled(0.05, 14), sampled(0.7, 14, top_k=3), greedy(3), sampled(0.5, 12), sampled(0.1, 12),
                  sampled(0.9, 10, top_p=0.6), sampled(1.5, 9, min_p=0.2), sampled(1.2, 7, top_k=2)]  # fmt: skip
STALE_PROMPTS = [
    prompt * (1 + 2 * (index != 2))
    for index, prompt in enumerate(prompts(len(STALE_FILTERED), shortest=4, longest=8, seed=3))
]


class Served(NamedTuple):
    """A core that has served `params`, and what it should come to when it serves that again."""

    core: EngineCore
    selection: str
    params: list[SamplingParams]
    wanted: list[Any]


class Different(AssertionError):
    """A step did not come to what it should: there is no need to look further."""


def _serve(
    core: EngineCore, selection: str, params: list[SamplingParams], wanted: list[Any] | None = None
) -> list[Any]:
    """The passes until each step and what it came to; then the tokens.

    Raises Different at the first step that is not as `wanted`.
    """
    renew(core, selection)
    passes, found = executor_of(core).passes, list[Any]()

    def look(trace: StepTrace) -> None:
        found.append((passes.replays, Seen.of(trace)))
        if wanted is not None and found[-1:] != wanted[len(found) - 1 : len(found)]:
            raise Different(f"step {len(found)}")

    core.loop.watch(look)
    tokens = core.generate(STALE_PROMPTS[: len(params)], params)
    return [*found, tokens]


class Servings:
    """Keeps what has served one kind of work for the tests of that kind, which follow each other."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stack = ExitStack()
        self._served: tuple[str, Served] | None = None
        self._cores: dict[bool, tuple[EngineCore, TwinDevice]] = {}

    def of(self, kind: str) -> Served:
        if self._served is None or self._served[0] != kind:
            self.close()
            self._served = kind, self._serve(kind)
        return self._served[1]

    def _serve(self, kind: str) -> Served:
        selection = "causal" if kind == "causal" else "lagged"
        params = STALE_FILTERED if kind == "filtered" else STALE
        core = self._core(sure=kind != "unsure")
        return Served(core, selection, params, _serve(core, selection, params))

    def _core(self, sure: bool) -> EngineCore:
        """Return a core whose drafter is calibrated, and says how likely its tokens stand if `sure`; its mode is on."""
        if sure in self._cores:
            core, device = self._cores[sure]
            self._stack.enter_context(device)
            return core
        draft, device = calibrated(self._directory), self._stack.enter_context(TwinDevice())
        draft = draft if sure else without_confidence(draft)
        core, _ = load(device, "lagged", draft=draft, enable_prefix_caching=False, cuda_graph_sizes=(24,))
        self._cores[sure] = core, device
        return core

    def close(self) -> None:
        with self._stack:
            if self._served is not None:
                served, self._served = self._served[1], None
                again = _serve(served.core, served.selection, served.params)
                assert again == served.wanted, "the same work twice is not the same, or a test left something behind"


@pytest.fixture(scope="module")
def servings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servings]:
    made = Servings(tmp_path_factory.mktemp("drafter"))
    yield made
    made.close()


def calibrated(directory: Path) -> Path:
    """A drafter whose confidences are scaled otherwise at each temperature."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(shallow_pair("vanilla") / "draft" / name, directory)
    greedy = [1.0 + 0.1 * k for k in range(7)]
    Calibration(tuple(greedy), (1.0,) * 7, greedy_offset=(0.3,) * 7, sampled_offset=(-0.3,) * 7).save(directory, {})
    return directory


def without_confidence(directory: Path) -> Path:
    """A drafter that does not say how likely its tokens stand."""
    source = shallow_pair("vanilla") / "draft"
    fields = json.loads((source / "config.json").read_text())
    fields |= {"enable_confidence_head": False, "confidence_head_with_markov": False}
    (directory / "config.json").write_text(json.dumps(fields))
    tensors = load_file(source / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if "confidence" not in name}, directory / "model.safetensors")
    return directory


# Under lagged the device knows by itself what the host tells it under causal; a confidence head, what requests record.
ASKED = ("requests", "anchors", "positions", "inverse", "uniforms", "scale", "shift", "weights", "offsets",
         "copied", "bias", "following", "tables0")  # fmt: skip
RUNS = ("tokens", "count", "context", "rows", "draft_row", "keep", "limits", "tables0")
INPUTS = (
    [("lagged", "asked", name) for name in ASKED]
    + [("lagged", "runs", name) for name in RUNS]
    + [("lagged", "acceptance", name) for name in ("run", "inverse", "greedy", "coins", "last")]
    + [("causal", "acceptance", name) for name in ("start", "lengths", "row", "tokens")]
    + [("unsure", "runs", "recorded")]
    + [("filtered", buffer, name) for buffer in ("asked", "acceptance") for name in ("top_k", "top_p", "min_p")]
)


@pytest.mark.drafting_fails  # a stale position may lie outside of everything
@pytest.mark.parametrize(("kind", "buffer", "field"), INPUTS)
def test_an_input_that_is_not_refilled_is_found_out(
    servings: Servings, kind: str, buffer: str, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step before's value instead of this one's, in one static buffer: replays must not come to the same."""
    served = servings.of(kind)
    core, upload = served.core, Staging.upload
    staging = _buffers(core)[buffer]
    before: dict[str, Any] = {}

    def stale(self: Staging, values: Any, rows: int | None = None) -> None:
        if self is staging:
            fresh, values = values[field], {**values, field: before.get(field, values[field])}
            before[field] = fresh
        upload(self, values, rows)

    monkeypatch.setattr(Staging, "upload", stale)
    try:
        found = _serve(core, served.selection, served.params, served.wanted)
    except (AssertionError, RuntimeError, IndexError, ValueError):
        found = None
        core.batcher.recover()
        for request in list(core.batcher.waiting):
            core.batcher.remove(request)
    assert found != served.wanted


def test_no_input_is_left_out(servings: Servings) -> None:
    buffers = _buffers(servings.of("filtered").core)
    every = {(buffer, field) for buffer, staging in buffers.items() for field in staging.host}
    # Corrections change little from step to step: those of the step before are told apart by no token. That they reach
    # the device at all, `test_the_same_tokens_and_so_many_waits` shows.
    slow = {("runs", "gains"), ("runs", "shifts")}
    assert {(buffer, field) for _, buffer, field in INPUTS} | slow == every


def _buffers(core: EngineCore) -> dict[str, Staging]:
    executor = executor_of(core)
    assert executor.model is not None
    return {"asked": executor.model.asked, "runs": executor.runs, "acceptance": executor.acceptance.staging}
