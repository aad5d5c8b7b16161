"""Step costs on hardware we do not have: SPS curves derived from a roofline, for the simulator.

A pass takes the longer of its reads and its computation, plus the terms stated below; nothing is fitted to a
measurement, and no real pass reaches a peak: compare curves of one machine, do not quote their seconds.

Shapes: B tokens of a pass, R drafting requests, gamma draft tokens each. Bytes, FLOPs, seconds.
"""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from dspark_server.errors import ConfigError
from dspark_server.speculation.cost_model import Profile

LAUNCH = 0.5e-3  # seconds of a step outside both models: planning, launches, sampling, commit
SEQUENTIAL = 20e-6  # seconds of one position of the sequential head: a small product and a softmax
TYPICAL_CONTEXT = 192  # tokens of context that a draft block reads, as in the default workload
USABLE_MEMORY = 0.9  # of the device, for weights and KV rows
MAX_TOKENS = 16_384
MAX_REQUESTS = 2_048


@dataclass(frozen=True)
class Accelerator:
    """`count` equal devices that share every pass. Figures of one: bytes/s, dense FLOP/s, bytes, bytes/s one way.

    `collective` is the latency of one exchange between them; there are two in each layer.
    """

    name: str
    bandwidth: float
    peak: float
    memory: float
    count: int = 1
    link: float = 450e9
    collective: float = 0.0


@dataclass(frozen=True)
class Network:
    """A stack of layers as the roofline sees it.

    `dense` parameters are read and used by every pass for every token. Of `experts` in each of `layers`, a token uses
    `experts_per_token`, drawn evenly and independently: a pass reads those that some token uses.
    """

    layers: int
    dense: float
    bytes_per_dense: float
    kv_bytes: float  # of one token of context, all layers
    pair_flops: float = 0.0  # of one (query, context) pair, all layers
    experts: int = 0
    experts_per_token: int = 0
    expert_parameters: float = 0.0
    bytes_per_expert_parameter: float = 0.0
    exchanged: float = 0.0  # bytes a token sends between devices in one layer

    def touched(self, tokens: int) -> float:
        """Experts of a layer that `tokens` tokens use, on average."""
        return self.experts * (1 - (1 - self.experts_per_token / self.experts) ** tokens) if self.experts else 0.0

    def weight_bytes(self, tokens: int) -> float:
        """Weights that a pass over `tokens` tokens reads."""
        each = self.layers * self.expert_parameters * self.bytes_per_expert_parameter
        return self.dense * self.bytes_per_dense + self.touched(tokens) * each

    @property
    def stored_bytes(self) -> float:
        """Bytes of all weights."""
        each = self.layers * self.expert_parameters * self.bytes_per_expert_parameter
        return self.dense * self.bytes_per_dense + self.experts * each

    @property
    def token_flops(self) -> float:
        """FLOPs of one token, attention excepted."""
        return 2 * (self.dense + self.layers * self.experts_per_token * self.expert_parameters)

    def seconds(self, tokens: int, on: Accelerator) -> float:
        """A pass over `tokens` tokens without context: max(bytes / bandwidth, FLOPs / peak) + exchange."""
        read = self.weight_bytes(tokens) / (on.count * on.bandwidth)
        compute = tokens * self.token_flops / (on.count * on.peak)
        exchange = tokens * self.layers * self.exchanged / (on.count * on.link) if on.count > 1 else 0.0
        return max(read, compute) + exchange + 2 * self.layers * on.collective


@dataclass(frozen=True)
class Machine:
    """One served model on one accelerator, as stored in `configs/profiles/`: the simulator's input.

    `overhead` is seconds of a step outside both models, `single_draft` the draft table of an MTP-1 drafter (one layer,
    one token) for `costs.requests`, `kv_tokens` the number of tokens of context that fit into memory. `assumptions`
    gives the source of all numbers.
    """

    name: str
    gamma: int
    kv_tokens: int
    overhead: float
    costs: Profile
    single_draft: tuple[float, ...]
    assumptions: dict[str, Any]

    @property
    def single(self) -> Profile:
        """The costs with MTP-1's draft table."""
        return replace(self.costs, draft=self.single_draft)

    @classmethod
    def load(cls, path: Path) -> "Machine":
        """Read a file written by `save`. Raises ConfigError if it is anything else."""
        try:
            values: Any = json.loads(path.read_text())
            costs: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in values["costs"].items()}
            values |= {"costs": Profile(**costs), "single_draft": tuple(values["single_draft"])}
            machine = cls(**values)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"{path} is not a machine profile (see configs/profiles): {error}") from None
        if len(machine.single_draft) != len(machine.costs.requests):
            raise ConfigError(f"{path}: single_draft needs one time for each of the profile's requests.")
        return machine

    def save(self, path: Path) -> None:
        """Write it as JSON, one list per line."""
        lines = json.dumps(asdict(self), indent=1).splitlines()
        text, inside = "", False
        for line in lines:
            text += line.strip() + (" " if line.endswith(",") else "") if inside else "\n" + line
            inside = line.endswith("[") or (inside and line.strip() not in ("]", "],"))
        path.write_text(text.strip() + "\n")


@dataclass(frozen=True)
class Pair:
    """A target and its drafters, which share the target's head: DSpark's of `gamma` tokens, MTP-1's of one."""

    name: str
    target: Network
    draft: Network
    single: Network
    gamma: int

    def on(self, accelerator: Accelerator) -> Machine:
        """Derive the machine."""
        bandwidth, peak = accelerator.count * accelerator.bandwidth, accelerator.count * accelerator.peak
        ridge = int(self.target.stored_bytes / self.target.token_flops * accelerator.peak / accelerator.bandwidth)
        tokens = _sizes(MAX_TOKENS, ridge)
        requests = _sizes(MAX_REQUESTS, ridge // self.gamma)
        rows = self.target.kv_bytes + self.draft.kv_bytes
        free = USABLE_MEMORY * accelerator.count * accelerator.memory
        free -= self.target.stored_bytes + self.draft.stored_bytes

        def drafting(network: Network, gamma: int) -> tuple[float, ...]:
            context = TYPICAL_CONTEXT * network.kv_bytes / bandwidth
            return tuple(
                _rounded(network.seconds(gamma * count, accelerator) + count * context + gamma * SEQUENTIAL)
                for count in requests
            )

        costs = Profile(
            tokens=tuple(tokens),
            verify=tuple(_rounded(self.target.seconds(count, accelerator)) for count in tokens),
            requests=tuple(requests),
            draft=drafting(self.draft, self.gamma),
            run_context=_rounded(self.target.kv_bytes / bandwidth),
            query_context=_rounded(self.target.pair_flops / peak),
        )
        return Machine(
            name=f"{self.name}, {accelerator.name}",
            gamma=self.gamma,
            kv_tokens=int(free / rows),
            overhead=LAUNCH,
            costs=costs,
            single_draft=drafting(self.single, 1),
            assumptions={
                "floor": "max(bytes / bandwidth, FLOPs / peak) + exchange + 2 collectives a layer; attention apart: "
                "run_context = KV bytes / bandwidth, query_context = FLOPs of a pair / peak",
                "accelerator": _given(accelerator),
                "target": _given(self.target),
                "draft": _given(self.draft),
                "single": _given(self.single),
                "seconds_per_sequential_position": SEQUENTIAL,
                "draft_context_tokens": TYPICAL_CONTEXT,
                "usable_memory": USABLE_MEMORY,
            },
        )


H100 = Accelerator("H100 SXM", bandwidth=3.35e12, peak=989e12, memory=80e9)
H200 = Accelerator("H200 SXM", bandwidth=4.8e12, peak=989e12, memory=141e9)
# FP8 products (Hopper has none of 4 bits); an exchange of all to all within the node takes some 10 us.
EIGHT_H100 = Accelerator("8 x H100 SXM", 3.35e12, 1979e12, 80e9, count=8, collective=10e-6)
EIGHT_H200 = Accelerator("8 x H200 SXM", 4.8e12, 1979e12, 141e9, count=8, collective=10e-6)

# Qwen3-8B: 8.19e9 parameters (the whole checkpoint counts, the looked-up embedding table too), 36 layers, 32 heads and
# 8 KV heads of 128. Drafter: 5 such layers of 193e6, the head of 622e6, W2 of 39e6. MTP-1: a layer, a projection, the
# head. Its drafter's projection of tapped layers rides in the target pass and is left out (1 %).
QWEN3_8B = Pair(
    "Qwen3-8B bf16",
    target=Network(36, 8.19e9, 2, kv_bytes=36 * 2 * 8 * 128 * 2, pair_flops=36 * 4 * 32 * 128),
    draft=Network(5, 5 * 193e6 + 622e6 + 39e6, 2, kv_bytes=5 * 2 * 8 * 128 * 2),
    single=Network(1, 193e6 + 34e6 + 622e6, 2, kv_bytes=2 * 8 * 128 * 2),
    gamma=7,
)

_EXPERT = 3 * 4096 * 2048
_EXPERTS: dict[str, Any] = {
    "experts": 256,
    "experts_per_token": 6,
    "expert_parameters": _EXPERT,
    "bytes_per_expert_parameter": 0.53,  # 4 bits and their scales
    "exchanged": 6 * 4096 * 3,  # to 6 experts in 8 bits, back in 16
}
# Like DeepSeek-V4-Flash: 284e9 parameters, 13e9 active; 43 layers of width 4096, 256 experts of 25e6 in each, 6 used.
# All but the routed experts (shared experts, attention, head: 6.5e9) are in 8 bits. Its compressed KV is taken as 4 kB
# a token. Drafter: 3 layers of the same kind, the head, projections; blocks of 5. MTP-1: one layer.
V4_FLASH_LIKE = Pair(
    "V4-Flash-like MoE",
    target=Network(43, 6.5e9, 1, kv_bytes=4096, pair_flops=43 * 4 * 64 * 512 / 4, **_EXPERTS),
    draft=Network(3, 3 * 139e6 + 530e6 + 83e6, 1, kv_bytes=3 * 1024, **_EXPERTS),
    single=Network(1, 139e6 + 530e6 + 34e6, 1, kv_bytes=1024, **_EXPERTS),
    gamma=5,
)

MACHINES = {
    "qwen3-8b-h100": (QWEN3_8B, H100),
    "qwen3-8b-h200": (QWEN3_8B, H200),
    "v4-flash-like-8xh100": (V4_FLASH_LIKE, EIGHT_H100),
    "v4-flash-like-8xh200": (V4_FLASH_LIKE, EIGHT_H200),
}


def derive(name: str) -> Machine:
    """The machine called `name` in `configs/profiles/`."""
    pair, accelerator = MACHINES[name]
    return pair.on(accelerator)


def _sizes(most: int, ridge: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, ... `most`, and the ridge between memory and compute, so that the curve is flat up to there."""
    steps = {1 << power for power in range(most.bit_length())} | {3 << power for power in range(most.bit_length())}
    return sorted({size for size in steps | {ridge} if 0 < size < most} | {most})


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.5g}")


def _given(what: Accelerator | Network) -> dict[str, Any]:
    """The fields that are set (not zero)."""
    return {f.name: getattr(what, f.name) for f in fields(what) if getattr(what, f.name)}
