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
TYPICAL_CONTEXT = 192  # tokens of context of a request, on average, in the default workload
OWN_TOKENS = 144  # whole blocks of tokens of such a request, those that all requests share excepted
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
    `experts_per_token`, drawn evenly and independently: a pass reads those that some token uses. Devices divide all of
    these between them; `copied` parameters each reads and uses whole, and with `kv_copied` all context, too.
    """

    layers: int
    dense: float
    bytes_per_dense: float
    kv_bytes: float  # that a run reads for one token of context, all layers
    pair_flops: float = 0.0  # of one (query, context) pair, all layers
    experts: int = 0
    experts_per_token: int = 0
    expert_parameters: float = 0.0
    bytes_per_expert_parameter: float = 0.0
    exchanged: float = 0.0  # bytes of a token that a device sends for one of a layer's two exchanges, of many devices
    copied: float = 0.0
    bytes_per_copied: float = 0.0
    kv_copied: bool = False
    copied_pair_flops: float = 0.0  # of a pair, on every device
    gathered: float = 0.0  # bytes of a token's logits, which one device collects

    def touched(self, tokens: int) -> float:
        """Experts of a layer that `tokens` tokens use, on average."""
        return self.experts * (1 - (1 - self.experts_per_token / self.experts) ** tokens) if self.experts else 0.0

    def weight_bytes(self, tokens: int, devices: int = 1) -> float:
        """Weights that each of `devices` reads in a pass over `tokens` tokens."""
        return self._weights(self.touched(tokens), devices)

    def stored_bytes(self, devices: int = 1) -> float:
        """Bytes of all weights on each of `devices`."""
        return self._weights(self.experts, devices)

    def _weights(self, experts: float, devices: int) -> float:
        each = self.layers * self.expert_parameters * self.bytes_per_expert_parameter
        return (self.dense * self.bytes_per_dense + experts * each) / devices + self.copied * self.bytes_per_copied

    def token_flops(self, devices: int = 1) -> float:
        """FLOPs of one token on each of `devices`, attention excepted."""
        experts = self.layers * self.experts_per_token * self.expert_parameters
        return 2 * ((self.dense + experts) / devices + self.copied)

    def seconds(self, tokens: int, on: Accelerator) -> float:
        """A pass over `tokens` tokens without context: max(bytes / bandwidth, FLOPs / peak) + exchange."""
        read = self.weight_bytes(tokens, on.count) / on.bandwidth
        compute = tokens * self.token_flops(on.count) / on.peak
        others = (on.count - 1) / on.count
        exchange = tokens * others * (2 * self.layers * self.exchanged + self.gathered) / on.link
        return max(read, compute) + exchange + (2 * self.layers * on.collective if on.count > 1 else 0.0)

    def ridge(self, on: Accelerator) -> int:
        """Tokens of a pass at which reading all weights takes as long as computing."""
        return int(self.stored_bytes(on.count) / self.token_flops(on.count) * on.peak / on.bandwidth)

    def run_context(self, on: Accelerator) -> float:
        """Seconds of reading one token of context."""
        return self.kv_bytes / on.bandwidth / (1 if self.kv_copied else on.count)

    def query_context(self, on: Accelerator) -> float:
        """Seconds of computing one (query, context) pair."""
        return (self.pair_flops / on.count + self.copied_pair_flops) / on.peak


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
    """A target and its drafters, which share the target's head: DSpark's of `gamma` tokens, MTP-1's of one.

    `sequential_bytes` are read for each position of the sequential head, `unread_bytes` held and only looked up in.
    Networks are those of requests with `context` tokens. A request of the default workload keeps `request_bytes` on
    each device, or (0) the bytes of its rows. With `drafter_alone` one device drafts while the others wait.
    """

    name: str
    target: Network
    draft: Network
    single: Network
    gamma: int
    sequential_bytes: float = 0.0
    context: int = TYPICAL_CONTEXT
    request_bytes: float = 0.0
    unread_bytes: float = 0.0
    drafter_alone: bool = False

    def on(self, accelerator: Accelerator) -> Machine:
        """Derive the machine."""
        alone = replace(accelerator, count=1) if self.drafter_alone else accelerator
        ridge = self.target.ridge(accelerator)
        tokens = _sizes(MAX_TOKENS, ridge)
        requests = _sizes(MAX_REQUESTS, self.draft.ridge(alone) // self.gamma)

        def drafting(network: Network, gamma: int) -> tuple[float, ...]:
            context = self.context * network.run_context(alone)
            sequential = SEQUENTIAL + self.sequential_bytes / alone.bandwidth
            return tuple(
                _rounded(network.seconds(gamma * count, alone) + count * context + gamma * sequential)
                for count in requests
            )

        costs = Profile(
            tokens=tuple(tokens),
            verify=tuple(_rounded(self.target.seconds(count, accelerator)) for count in tokens),
            requests=tuple(requests),
            draft=drafting(self.draft, self.gamma),
            run_context=_rounded(self.target.run_context(accelerator)),
            query_context=_rounded(self.target.query_context(accelerator)),
        )
        return Machine(
            name=f"{self.name}, {accelerator.name}",
            gamma=self.gamma,
            kv_tokens=self._kv_tokens(accelerator, alone.count),
            overhead=LAUNCH,
            costs=costs,
            single_draft=drafting(self.single, 1),
            assumptions={
                "floor": "max(bytes / bandwidth, FLOPs / peak) + exchange + 2 collectives a layer; attention apart: "
                "run_context = KV bytes / bandwidth, query_context = FLOPs of a pair / peak, at context_tokens",
                "accelerator": _given(accelerator),
                "target": _given(self.target),
                "draft": _given(self.draft),
                "single": _given(self.single),
                "seconds_per_sequential_position": SEQUENTIAL,
                "bytes_per_sequential_position": self.sequential_bytes,
                "context_tokens": self.context,
                "drafter_on_one_device": self.drafter_alone,
                "request_bytes": self.request_bytes,
                "usable_memory": USABLE_MEMORY,
            },
        )

    def _kv_tokens(self, accelerator: Accelerator, drafting: int) -> int:
        """Tokens of context that fit beside the weights of the fullest device."""
        free = USABLE_MEMORY * accelerator.memory - self.unread_bytes
        free -= self.target.stored_bytes(accelerator.count) + self.draft.stored_bytes(drafting)
        if self.request_bytes:
            return max(0, int(free / self.request_bytes)) * OWN_TOKENS
        return int(free / (self.target.kv_bytes + self.draft.kv_bytes))


H100 = Accelerator("H100 SXM", bandwidth=3.35e12, peak=989e12, memory=80e9)
H200 = Accelerator("H200 SXM", bandwidth=4.8e12, peak=989e12, memory=141e9)
# Products are in bfloat16, as here activations are: weights are expanded on their way into a product. An exchange
# within a node takes some 10 us, between nodes 30 (by eight cards of 400 Gbit/s each).
FOUR_H200 = Accelerator("4 x H200 SXM", 4.8e12, 989e12, 141e9, count=4, collective=10e-6)
EIGHT_H100 = Accelerator("8 x H100 SXM", 3.35e12, 989e12, 80e9, count=8, collective=10e-6)
EIGHT_H200 = Accelerator("8 x H200 SXM", 4.8e12, 989e12, 141e9, count=8, collective=10e-6)
SIXTEEN_H200 = Accelerator("16 x H200 SXM", 4.8e12, 989e12, 141e9, count=16, link=360e9, collective=30e-6)
EIGHT_B200 = Accelerator("8 x B200 SXM", 8e12, 2250e12, 191e9, count=8, link=900e9, collective=10e-6)

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


def _sizes(most: int, ridge: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, ... `most`, and the ridge between memory and compute, so that the curve is flat up to there."""
    steps = {1 << power for power in range(most.bit_length())} | {3 << power for power in range(most.bit_length())}
    return sorted({size for size in steps | {ridge} if 0 < size < most} | {most})


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.5g}")


def _given(what: Accelerator | Network) -> dict[str, Any]:
    """The fields that are set (not zero)."""
    return {f.name: getattr(what, f.name) for f in fields(what) if getattr(what, f.name)}
