"""Losslessness by exact enumeration: cycles of drafting, accepting, committing have the target's own joint law."""

import itertools
import math

import pytest
import torch

from dspark_server.speculation.acceptance import accept
from dspark_server.speculation.draft_block import DraftBlock
from dspark_server.speculation.law import sample
from dspark_server.speculation.noise import CounterStreams
from dspark_server.speculation.sampling import SamplingBatch
from tests.speculation.enumeration import block_cycles, coupled_cycles, pair_cells, ratio_cycles
from tests.speculation.support import World, joint, worlds, worst_distance

WORLDS = worlds()
EXACT = 1e-12


@pytest.mark.parametrize("name", WORLDS)
def test_ratio_rule_has_the_targets_joint_law(name: str) -> None:
    assert worst_distance(WORLDS[name], ratio_cycles(WORLDS[name])) <= EXACT


@pytest.mark.parametrize("name", WORLDS)
def test_block_rule_has_the_targets_joint_law(name: str) -> None:
    assert worst_distance(WORLDS[name], block_cycles(WORLDS[name])) <= EXACT


@pytest.mark.parametrize("name", [name for name in WORLDS if name != "greedy-drafter"])
def test_coupled_rule_has_the_targets_joint_law(name: str) -> None:
    assert worst_distance(WORLDS[name], coupled_cycles(WORLDS[name])) <= EXACT


def admits(prefix: tuple[int, ...]) -> bool:
    """Admit the next slot or not, for no better reason than the tokens before it."""
    return (len(prefix) + 2 * sum(prefix)) % 3 != 1


def admitted(block: tuple[int, ...]) -> int:
    """Number of leading slots that `admits` takes of a block: slot k is decided by the tokens before k alone."""
    return next((k for k in range(len(block)) if not admits(block[:k])), len(block))


@pytest.mark.parametrize("name", ["V2-gamma3", "V4-gamma3", "zeros-and-one-hots", "all-filters"])
def test_non_anticipating_prefixes_keep_the_law(name: str) -> None:
    world = WORLDS[name]
    blocks = list(itertools.product(range(world.vocabulary), repeat=world.gamma))
    assert len({admitted(block) for block in blocks}) > 1
    assert worst_distance(world, ratio_cycles(world, admitted)) <= EXACT
    assert worst_distance(world, block_cycles(world, admitted)) <= EXACT
    assert worst_distance(world, coupled_cycles(world, admits)) <= EXACT


def appendix_a(confidence: list[float], *, stop_early: bool) -> int:
    """Prefix length of a single request by throughput tau * SPS(B), SPS = (1.0, 0.5, 0.45) (DSpark §A)."""
    best, best_length, tau, survival = 0.0, 0, 1.0, 1.0
    for length, steps_per_second in enumerate((1.0, 0.5, 0.45)):
        if length:
            survival *= confidence[length - 1]
            tau += survival
        if tau * steps_per_second > best:
            best, best_length = tau * steps_per_second, length
        elif stop_early:
            break
    return best_length


@pytest.mark.parametrize(("stop_early", "expected"), [(False, 17 / 20), (True, 7 / 10)])
def test_a_retrospective_search_is_not_lossless(stop_early: bool, expected: float) -> None:
    """DSpark §A: the second confidence knows the first token, and a global search lets it decide about that token."""
    target = torch.tensor([0.7, 0.3], dtype=torch.float64).log().expand(2, 2, 2)
    world = World(target, torch.zeros(2, 2, dtype=torch.float64), gamma=2)

    def lengths(block: tuple[int, ...]) -> int:
        return appendix_a([0.8, 0.9 if block[0] == 0 else 0.0], stop_early=stop_early)

    cycles = ratio_cycles(world, lengths)
    first = joint(cycles.__getitem__, (0, 0), 1)
    assert math.isclose(first[(0,)], expected, abs_tol=EXACT)


def test_pair_cells_are_the_law_of_the_coupling() -> None:
    """The closed form itself: it sums to one, has the right margins, and agrees with simulated races."""
    p, q = [0.55, 0.3, 0.1, 0.05], [0.1, 0.25, 0.6, 0.05]
    found = pair_cells(p, q)
    table = torch.zeros(4, 4, dtype=torch.float64)
    for weight, y, x, _ in found:
        table[y, x] += weight
    assert torch.allclose(table.sum(1), torch.tensor(p, dtype=torch.float64), atol=1e-14)
    assert torch.allclose(table.sum(0), torch.tensor(q, dtype=torch.float64), atol=1e-14)
    races = torch.empty(400_000, 4).exponential_(generator=torch.Generator().manual_seed(3))
    pairs = (races / torch.tensor(p)).argmin(1) * 4 + (races / torch.tensor(q)).argmin(1)
    seen, expected = torch.bincount(pairs, minlength=16).double(), table.reshape(-1) * len(races)
    possible = expected > 0
    assert seen[~possible].sum() == 0
    assert float(((seen - expected)[possible] ** 2 / expected[possible]).sum()) < 60  # 15 degrees, alpha = 1e-6


def seeded(positions: list[int], settings: dict[str, float]) -> SamplingBatch:
    """Three seeded requests, two of which differ in the choice index only."""
    columns = {name: [value] * 3 for name, value in settings.items()}
    return SamplingBatch.of(
        position=positions, key=[7, 7, -9], choice=[0, 1, 0], coupled=[True] * 3, draft_number=[0] * 3, **columns
    )


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 0.0}])
@pytest.mark.parametrize("policy", ["full", "by-token", "by-the-drafted-token-itself", "none"])
def test_seeded_output_is_the_output_without_a_drafter(settings: dict[str, float], policy: str) -> None:
    """Token by token, whatever was drafted and however much of it was verified, retrospectively even."""
    v, gamma, wanted = 7, 3, 60
    generator = torch.Generator().manual_seed(11)
    target = torch.randn(v, v, v, generator=generator) * 2
    draft = target.mean(0)  # blind to the token before the last, but not hopeless
    plain = torch.zeros(3, wanted + 2, dtype=torch.int64)
    for at in range(2, wanted + 2):
        logits = target[plain[:, at - 2], plain[:, at - 1]]
        done = accept(logits, [0, 1, 2, 3], None, [-1] * 3, seeded([at] * 3, settings), CounterStreams())
        plain[:, at] = done.token
    streams, drafts_kept = CounterStreams(), 0
    said = [[0, 0] for _ in range(3)]
    while min(map(len, said)) < wanted + 2:  # together: each at another position, with a prefix of its own length
        sampling = seeded(list(map(len, said)), settings)
        slots = [torch.tensor([tokens[-1] for tokens in said])]
        for k in range(gamma):
            slots.append(sample(draft[slots[-1]], sampling.ahead(k), torch.zeros(3), streams)[0])
        blocks = torch.stack(slots[1:], dim=1)
        lengths = [
            {"full": gamma, "none": 0, "by-token": tokens[-1] % (gamma + 1)}.get(policy, block[1] % (gamma + 1))
            for tokens, block in zip(said, blocks.tolist(), strict=True)
        ]
        rows = []
        for tokens, block, length in zip(said, blocks.tolist(), lengths, strict=True):
            seen = torch.tensor([*tokens[-2:], *block[:length]])
            rows.append(target[seen[:-1], seen[1:]])
        row_start = [0, *itertools.accumulate(map(len, rows))]
        drafted = DraftBlock.of(blocks)
        done = accept(torch.cat(rows), row_start, drafted, range(3), sampling, streams)
        for tokens, block, count, token in zip(
            said, blocks.tolist(), done.count.tolist(), done.token.tolist(), strict=True
        ):
            tokens += [*block[:count], token]
            drafts_kept += count
    assert [tokens[: wanted + 2] for tokens in said] == plain.tolist()
    if policy == "full":
        assert drafts_kept > 0
    if settings.get("temperature") != 0.0:
        assert plain[0].tolist() != plain[1].tolist(), "the choice index must matter"
