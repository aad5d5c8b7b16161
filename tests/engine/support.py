"""Tiny engines over the conformance fixtures: float32, so that outputs are compared exactly."""

import atexit
import json
import random
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from dspark_server.config import EngineConfig, SpeculativeConfig
from dspark_server.engine.core import EngineCore
from dspark_server.engine.request import SamplingParams
from dspark_server.engine.trace import StepTrace
from dspark_server.speculation.cost_model import Profile

FIXTURES = Path(__file__).parents[1] / "fixtures"
REPETITIVE = [[234], [59], [97], [135], [136], [184]]  # after these the greedy text of shallow pairs runs in circles
HEADS = ("vanilla", "gated", "rnn")
# Seconds of SmolLM2-135M and its drafter, as one core takes them: passed, not measured wherever the machine is busy.
SMOLLM2_COSTS = Profile((1, 8, 24, 64), (0.02, 0.024, 0.04, 0.08), (1, 8), (2e-3, 4e-3), 0.0, 0.0)


def still() -> float:
    """A clock that stands still, for engines with passed costs: steps teach none, so that drafting repeats."""
    return 0.0


def on_cycles(executor: Any, change: Callable[[Any], None]) -> None:
    """From now on `change` gets each cycle of the executor as it begins, and may replace its methods."""
    begin = executor.cycle

    def cycle(*arguments: Any) -> Any:
        made = begin(*arguments)
        change(made)
        return made

    executor.cycle = cycle


def tiny_core(
    head: str = "vanilla",
    *,
    drafter: bool = True,
    selection: str = "fixed",
    method: str = "none",
    shallow: bool = False,
    clock: Callable[[], float] = still,
    **settings: Any,
) -> EngineCore:
    """An engine over a fixture pair, or a shallow one, checking its invariants after every step.

    `method` is what it has instead of the drafter. Its costs are given: by measured ones an adaptive policy may draft
    nothing where other processes slow the passes of a tiny model.
    """
    pair = shallow_pair(head) if shallow else FIXTURES / f"dspark_qwen3_{head}"
    speculative = SpeculativeConfig(method=method, selection=selection)
    if drafter:
        speculative = SpeculativeConfig(method="dspark", model=str(pair / "draft"), selection=selection)
    values: dict[str, Any] = {"num_blocks": 256, "block_size": 4, "check_invariants": True} | settings
    config = EngineConfig(model=str(pair / "target"), dtype="float32", speculative=speculative, **values)
    return EngineCore.load(config, SMOLLM2_COSTS, clock=clock)


@cache
def shallow_pair(head: str) -> Path:
    """A fixture pair with three layers of the target's six and one of the drafter's two, for what runs slowly."""
    made, pair = Path(tempfile.mkdtemp()), FIXTURES / f"dspark_qwen3_{head}"
    atexit.register(shutil.rmtree, made)
    _cut(pair / "target", made / "target", 3)
    _cut(pair / "draft", made / "draft", 1, num_target_layers=3, target_layer_ids=[-1, 0, 1])
    return made


def _cut(source: Path, made: Path, layers: int, **fields: Any) -> None:
    """Copy a checkpoint with its first layers only."""
    shutil.copytree(source, made)
    config = json.loads((source / "config.json").read_text())
    fields |= {"num_hidden_layers": layers, "layer_types": config["layer_types"][:layers]}
    (made / "config.json").write_text(json.dumps(config | fields))
    tensors = load_file(source / "model.safetensors")
    beyond = tuple(f"layers.{index}." for index in range(layers, config["num_hidden_layers"]))
    kept = {name: tensor for name, tensor in tensors.items() if not name.removeprefix("model.").startswith(beyond)}
    save_file(kept, made / "model.safetensors")


def traced_blocks(core: EngineCore, prompt: list[int], max_tokens: int = 16) -> tuple[list[int], list[StepTrace]]:
    """The text of a prompt and its greedy answer, and the steps that drafted for it, with their logits."""
    seen: list[StepTrace] = []
    core.loop.executor.drafter.sampler.keep_logits = True
    core.loop.watch(lambda trace: seen.append(trace) if trace.block else None)
    return [*prompt, *core.generate([prompt], greedy(max_tokens))[0]], seen


def prompts(count: int, *, shortest: int = 3, longest: int = 40, seed: int = 0) -> list[list[int]]:
    """Random prompts; every third begins like the first, so that prefixes are shared."""
    source = random.Random(seed)
    made = [[source.randrange(3, 500) for _ in range(source.randint(shortest, longest))] for _ in range(count)]
    return [made[0][:12] + prompt if index % 3 == 2 else prompt for index, prompt in enumerate(made)]


def greedy(max_tokens: int = 24) -> SamplingParams:
    """Arg max, never ending early."""
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)


def seeded(seed: int, max_tokens: int = 24) -> SamplingParams:
    """T = 1 under the coupled rule."""
    return SamplingParams(max_tokens=max_tokens, temperature=1.0, seed=seed, ignore_eos=True)
