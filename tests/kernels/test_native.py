"""Every native kernel against the plain PyTorch one, on this machine's build, on others, and on Zig's."""

import subprocess
from dataclasses import replace
from typing import Any

import dspark_kernels
import pytest
import torch
from dspark_kernels.cpu import build as build_module
from dspark_kernels.cpu.build import build, zig_compiler
from dspark_kernels.cpu.native import NativeKernels
from dspark_kernels.reference import ReferenceKernels
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_server.models.layers.moe import numbered
from dspark_server.runtime.linear import Experts
from dspark_server.runtime.paging import TILE, CacheGroup
from tests.kernels.support import Paged, check_hidden_rows_stay_hidden, close, mixture, paged

REFERENCE = ReferenceKernels()


# Both ways to multiply bfloat16, whichever this machine prefers and can, and narrower vectors.
FLAGS = {
    "fma": ("-UDSPARK_BFLOAT16_DOT",),
    "dot": ("-DDSPARK_BFLOAT16_DOT",),
    "no-avx512": ("-mno-avx512f",),
}


def other_programs() -> list[str]:
    """Names of the FLAGS that make other programs than the machine's: without AVX-512, none do.

    By all macros that the sources are compiled with: what the processor has, vector width, rows of a tile, bfloat16.
    """
    compiler, common = next(build_module.find_compilers()), build_module.SOURCES[0].with_name("common.h")

    def macros(*flags: str) -> list[str]:
        command = [*compiler, *build_module.FLAGS, *build_module._machine_flags(), *flags, "-E", "-dM", str(common)]
        lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
        return sorted(line for line in lines if "DSPARK_BFLOAT16_DOT" not in line)  # it is read where DOT is defined

    machine = macros()
    return [name for name, flags in FLAGS.items() if macros(*flags) != machine]


@pytest.fixture(scope="module", params=["machine", *other_programs(), "zig"])
def native(request: pytest.FixtureRequest) -> NativeKernels:
    """The library under test; never the reference in disguise."""
    if request.param == "machine":
        kernels = dspark_kernels.load("native")
        assert isinstance(kernels, NativeKernels)
        return kernels
    if request.param == "zig":
        return NativeKernels(build(compilers=[zig_compiler()]))
    kernels = NativeKernels(build(extra_flags=FLAGS[request.param]))
    assert request.param != "no-avx512" or kernels.name == "native-generic"
    return kernels


def test_what_the_server_loads_is_native() -> None:
    """Every other test of this project runs on these kernels."""
    kernels = dspark_kernels.load()
    assert isinstance(kernels, NativeKernels)
    assert kernels.name.startswith("native-")
    assert "single-thread" not in kernels.name


RUNS = [[(1, 0)], [(7, 0), (1, 15)], [(1, 16), (8, 33), (3, 0), (1, 1)], [(40, 5), (1, 300), (2, 31)]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("groups", "kv_heads", "size"),
    [(3, 3, 64), (1, 2, 16), (4, 1, 32), (2, 2, 40), (2, 1, 128), (7, 1, 96), (1, 1, 256), (2, 1, 512),
     (3, 2, 20), (2, 1, 100), (1, 3, 36), (2, 2, 2)],
)  # fmt: skip
@pytest.mark.parametrize("runs", RUNS, ids=range(len(RUNS)))
def test_attention(
    native: NativeKernels, runs: list[tuple[int, int]], groups: int, kv_heads: int, size: int, dtype: torch.dtype
) -> None:
    about: dict[str, Any] = {"groups": groups, "kv_heads": kv_heads, "size": size, "block": 8, "dtype": dtype}
    case = paged(runs, **about)
    for causal, window, cap in ((True, None, None), (False, None, 0.5), (True, 6, 30.0), (False, 70, None)):
        close(case.attend(native, causal, window, cap), case.attend(REFERENCE, causal, window, cap))
    later = replace(paged([(q, c + 2) for q, c in runs], **about), first_key=2)
    for causal, window in ((True, None), (False, 3)):
        close(later.attend(native, causal, window), later.attend(REFERENCE, causal, window))


@settings(max_examples=40, deadline=None)
@given(
    runs=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 70)), min_size=1, max_size=9),
    block=st.sampled_from([1, 4, 16]),
    causal=st.booleans(),
)
def test_ragged_attention(runs: list[tuple[int, int]], block: int, causal: bool) -> None:
    case = paged(runs, groups=3, kv_heads=1, size=32, block=block, dtype=torch.bfloat16)
    close(case.attend(dspark_kernels.load("native"), causal, None), case.attend(REFERENCE, causal, None))


def test_a_row_of_attention_does_not_depend_on_its_batch() -> None:
    native = dspark_kernels.load("native")
    case = paged([(8, 33), (1, 200), (5, 12)], groups=3, kv_heads=3, size=64, block=16, dtype=torch.bfloat16)
    together = case.attend(native, True, None)
    for run in range(3):
        first, last = case.query_start[run].item(), case.query_start[run + 1].item()
        for row in range(first, last):  # one query at a time, the ones before it as context
            single = Paged(
                case.qkv[row : row + 1],
                case.heads,
                case.keys,
                case.values,
                torch.tensor([0, 1], dtype=torch.int32),
                case.context_len[run : run + 1] + (row - first),
                case.tables[run : run + 1],
            )
            assert torch.equal(single.attend(native, True, None)[0], together[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [4, 16])
def test_a_row_of_attention_does_not_depend_on_where_its_table_begins(block: int, dtype: torch.dtype) -> None:
    """As long as it begins at a multiple of a tile, as tables do."""
    native, window = dspark_kernels.load("native"), 256
    for context in range(600, 620):
        case = paged([(1, context)], groups=2, kv_heads=2, size=64, block=block, dtype=dtype)
        first = CacheGroup(block, window, TILE).first_needed(context)
        tables = case.tables[:, first // block :].contiguous()
        later = Paged(case.qkv, case.heads, case.keys, case.values, case.query_start, case.context_len - first, tables)
        assert first > 0
        assert torch.equal(case.attend(native, True, window), later.attend(native, True, window))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "features"), [(1, 576), (5, 64), (64, 1536), (3, 37)])
def test_norms_and_silu(native: NativeKernels, rows: int, features: int, dtype: torch.dtype) -> None:
    x, residual, weight = (torch.randn(shape).to(dtype) for shape in ((rows, features), (rows, features), (features,)))
    close(native.rms_norm(x, weight, 1e-5), REFERENCE.rms_norm(x, weight, 1e-5))
    ours, theirs = residual.clone(), residual.clone()
    close(native.add_rms_norm(x, ours, weight, 1e-5), REFERENCE.add_rms_norm(x, theirs, weight, 1e-5))
    close(ours, theirs)
    gate_up = torch.randn(rows, 2 * features).to(dtype) * 4
    close(native.silu_mul(gate_up), REFERENCE.silu_mul(gate_up))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [0, 1, 6])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("size", [32, 2, 20, 36, 100])
def test_rotary_and_kv_write(native: NativeKernels, size: int, heads: int, normed: bool, dtype: torch.dtype) -> None:
    """Also heads whose size is no multiple of 8: their norms take in nothing that stands behind them."""
    kv_heads, rows = 2, 9
    wide = torch.randn(rows, (heads + 2 * kv_heads) * size + 24).to(dtype)
    positions = torch.randint(0, 50, (rows,), dtype=torch.int32)
    slots = torch.randperm(40)[:rows].int()
    cos_sin = torch.randn(50, size)
    norm = torch.randn(size).to(dtype) if normed else None
    results = []
    for kernels in (native, REFERENCE):
        qkv = wide.clone()[:, : (heads + 2 * kv_heads) * size]  # strided rows
        keys, values = torch.zeros(8, 2, 5, kv_heads, size, dtype=dtype).unbind(1)
        kernels.rotary_kv_write(qkv, positions, cos_sin, slots, keys, values, heads, norm, norm, 1e-6)
        results.append((qkv[:, : heads * size].contiguous(), keys, values))
    for ours, theirs in zip(*results, strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("size", "heads"), [(32, 4), (20, 0), (512, 1)])
def test_values_that_are_normalised_or_are_the_keys(
    native: NativeKernels, size: int, heads: int, shared: bool, dtype: torch.dtype
) -> None:
    kv_heads, rows = 2, 9
    qkv = torch.randn(rows, (heads + (1 if shared else 2) * kv_heads) * size).to(dtype)
    positions, slots = torch.randint(0, 50, (rows,), dtype=torch.int32), torch.randperm(40)[:rows].int()
    cos_sin, norm = torch.randn(50, size), torch.randn(size).to(dtype)
    for value_norm in (False, True):
        results = []
        for kernels in (native, REFERENCE):
            own = qkv.clone()
            keys, values = torch.zeros(8, 2, 5, kv_heads, size, dtype=dtype).unbind(1)
            kernels.rotary_kv_write(own, positions, cos_sin, slots, keys, values, heads, norm, norm, 1e-6, value_norm)
            results.append((own[:, : heads * size].contiguous(), keys, values))
        for ours, theirs in zip(*results, strict=True):
            close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "features"), [(1, 576), (5, 64), (70, 37)])
def test_gelu_and_the_sum_with_a_norm(native: NativeKernels, rows: int, features: int, dtype: torch.dtype) -> None:
    gate_up = torch.randn(rows, 2 * features).to(dtype) * 4
    gate_up[0, 0], gate_up[-1, 1] = -60.0, 60.0  # where the cube overflows the exponent
    close(native.gelu_tanh_mul(gate_up), REFERENCE.gelu_tanh_mul(gate_up))
    x, residual = (torch.randn(rows, features + 8).to(dtype)[:, :features] for _ in range(2))  # strided rows
    weight = torch.randn(features).to(dtype)
    for scale in (1.0, 0.37):
        ours, theirs = residual.clone(), residual.clone()
        native.norm_add(x, ours, weight, 1e-6, scale)
        REFERENCE.norm_add(x, theirs, weight, 1e-6, scale)
        close(ours, theirs)


@pytest.mark.parametrize(
    ("tokens", "experts", "each", "hidden", "features"),
    [(1, 1, 1, 32, 32), (1, 8, 2, 64, 96), (7, 8, 3, 576, 40), (50, 4, 4, 37, 33), (300, 128, 8, 64, 32)],
)
def test_experts_and_their_batch_invariance(
    native: NativeKernels, tokens: int, experts: int, each: int, hidden: int, features: int
) -> None:
    case = mixture(tokens, experts, each, hidden, features, torch.bfloat16)
    together = case.run(native)
    close(together, case.run(REFERENCE))
    limited = case.run(native, 0.4)
    close(limited, case.run(REFERENCE, 0.4))
    assert not torch.equal(limited, together)
    packed = case.packed(native)
    for token in {0, tokens // 2, tokens - 1}:
        one = slice(token, token + 1)
        assert torch.equal(native.experts(case.x[one], packed, case.chosen[one], case.shares[one])[0], together[token])


def test_experts_of_other_ranks_add_nothing(native: NativeKernels) -> None:
    """Numbers from E on: two parts of the experts add up to all of them."""
    case = mixture(40, 8, 3, 64, 40, torch.bfloat16)
    parts = []
    for first, last in ((0, 5), (5, 8)):
        own = numbered(case.chosen, range(first, last))
        mine, its = (case.packed(each, first, last) for each in (native, REFERENCE))
        parts.append(native.experts(case.x, mine, own, case.shares))
        close(parts[-1], REFERENCE.experts(case.x, its, own, case.shares))
    assert parts[1].any(1).sum() < 40  # of some tokens all are elsewhere
    whole = case.run(REFERENCE).float()
    torch.testing.assert_close(parts[0].float() + parts[1].float(), whole, atol=0.03, rtol=0.02)  # each is rounded


def test_a_nan_reaches_its_own_token_only(native: NativeKernels) -> None:
    case = mixture(9, 4, 2, 64, 32, torch.bfloat16)
    clean = case.run(native)
    case.x[4, 3] = torch.nan
    broken = case.run(native)
    assert broken[4].isnan().all()
    assert torch.equal(broken[[0, 1, 2, 3, 5, 6, 7, 8]], clean[[0, 1, 2, 3, 5, 6, 7, 8]])


@pytest.mark.parametrize(("tokens", "each"), [(1, 2), (9, 3), (40, 8)])
def test_plain_experts_are_the_same(tokens: int, each: int) -> None:
    """Of float32, by torch's batched products: the kernels have none."""
    case = mixture(tokens, 8, each, 24, 20, torch.float32)
    plain = Experts(len(case.down), zip(case.gate_up, case.down, strict=True), dspark_kernels.load("native"))
    assert plain.backend == "plain"
    close(plain(case.x, case.chosen, case.shares), case.run(REFERENCE))
    others = torch.where(case.chosen < 3, case.chosen, 3)
    some = Experts(3, zip(case.gate_up[:3], case.down[:3], strict=True), dspark_kernels.load("native"))
    packed = case.packed(REFERENCE, 0, 3)
    close(some(case.x, others, case.shares), REFERENCE.experts(case.x, packed, others, case.shares))


@pytest.mark.parametrize(("out_features", "in_features"), [(96, 64), (960, 576), (37, 51), (1, 2)])
def test_linear_and_its_batch_invariance(native: NativeKernels, out_features: int, in_features: int) -> None:
    weight, bias = torch.randn(out_features, in_features).bfloat16(), torch.randn(out_features).bfloat16()
    packed = native.pack_linear(weight, bias)
    x = torch.randn(200, in_features).bfloat16()
    exact = x.double() @ weight.double().T + bias.double()
    ours = native.linear(x, packed, torch.float32)
    torch.testing.assert_close(ours.double(), exact, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(native.linear(x, packed).double(), exact, atol=1e-3, rtol=1e-2)
    for rows in (1, 2, 3, 8, 12, 13, 31, 64):
        assert torch.equal(native.linear(x[:rows], packed, torch.float32), ours[:rows])


def test_linear_of_more_rows_than_fit_the_cache(native: NativeKernels) -> None:
    weight, x = torch.randn(40, 4097).bfloat16(), torch.randn(150, 4097 + 3).bfloat16()[:, :4097]  # strided rows
    packed = native.pack_linear(weight)
    ours = native.linear(x, packed, torch.float32)
    torch.testing.assert_close(ours.double(), x.double() @ weight.double().T, atol=5e-3, rtol=1e-4)
    assert torch.equal(native.linear(x[149:], packed, torch.float32), ours[149:])
    even, whole = native.pack_linear(weight[:, :4096].contiguous()), x[:, :4096].contiguous()
    exact = whole.double() @ weight[:, :4096].double().T
    torch.testing.assert_close(native.linear(whole, even, torch.float32).double(), exact, atol=5e-3, rtol=1e-4)


def test_linear_reads_no_column_too_many(native: NativeKernels) -> None:
    """An odd number of them is padded, with zeros, not with what stands behind a row."""
    wide = torch.full((9, 52), torch.nan, dtype=torch.bfloat16)
    wide[:, :51] = torch.randn(9, 51)
    packed = native.pack_linear(torch.randn(37, 51).bfloat16())
    assert torch.equal(native.linear(wide[:, :51], packed), native.linear(wide[:, :51].contiguous(), packed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_argmax_takes_the_lowest_of_equals_and_a_nan_wins(native: NativeKernels, dtype: torch.dtype) -> None:
    logits = torch.randint(0, 9, (7, 1003)).to(dtype)
    logits[3, 500] = torch.nan
    assert torch.equal(native.argmax(logits), REFERENCE.argmax(logits))
    assert native.argmax(logits)[3] == 500


def test_argmax_over_a_vocabulary_cut_into_segments(native: NativeKernels) -> None:
    logits = torch.zeros(5, 49152 + 5)
    logits[0] = -torch.inf
    logits[1, [8191, 8192, 40000]] = 3.0
    logits[2, -1] = 1e-30
    logits[3, [9000, 20000]] = torch.nan
    logits[4, 100] = torch.inf
    assert native.argmax(logits).tolist() == [0, 8191, 49156, 9000, 100]
    assert native.argmax(logits[1:2]).tolist() == [8191]


@settings(max_examples=60, deadline=None)
@given(
    vocabulary=st.sampled_from([3, 40, 64, 1031, 4096]),
    count=st.integers(0, 20),
    spread=st.sampled_from([0.01, 3.0, 40.0]),
    ties=st.booleans(),
    seed=st.integers(0, 999),
)
def test_log_probabilities(vocabulary: int, count: int, spread: float, ties: bool, seed: int) -> None:
    noise, count = torch.Generator().manual_seed(seed), min(count, vocabulary)
    logits = torch.randn(5, vocabulary, generator=noise) * spread
    if ties:
        logits = (logits / spread * 2).round() * spread
    logits[1, :2] = -torch.inf
    tokens = torch.randint(vocabulary, (5,), generator=noise)
    kernels = NativeKernels(build())
    got, wanted = (each.log_probabilities(logits, tokens, count) for each in (kernels, ReferenceKernels()))
    for mine, plain in ((got[0], wanted[0]), (got[3], wanted[3])):
        torch.testing.assert_close(mine, plain, atol=2e-5, rtol=2e-6)
    assert torch.equal(got[1], wanted[1])
    assert torch.equal(got[2], wanted[2])
    alone = kernels.log_probabilities(logits[2:3], tokens[2:3], count)
    assert all(torch.equal(mine[2], theirs[0]) for mine, theirs in zip(got, alone, strict=True))
    logits[0] = torch.nan
    best = kernels.log_probabilities(logits, tokens, count)[2]
    assert bool(((best >= 0) & (best < vocabulary)).all()), "names of tokens, whatever a row holds"


def test_a_nan_reaches_the_output(native: NativeKernels) -> None:
    x = torch.ones(2, 64)
    x[1, 5] = torch.nan
    assert native.rms_norm(x, torch.ones(64), 1e-6)[1].isnan().all()
    assert native.silu_mul(x)[1].isnan().tolist() == [i == 5 for i in range(32)]
    product = native.linear(x.bfloat16(), native.pack_linear(torch.ones(40, 64).bfloat16()))
    assert product[1].isnan().all()
    assert (product[0] == 64).all()
    case = paged([(1, 20), (1, 20)], groups=1, kv_heads=1, size=32, block=4, dtype=torch.float32)
    case.qkv[1] = torch.nan
    attended = case.attend(native, True, None)
    assert attended[1].isnan().all()
    assert not attended[0].isnan().any()


def test_what_an_earlier_request_left_in_the_cache_is_not_seen(native: NativeKernels) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        case = paged([(3, 10), (1, 70)], groups=3, kv_heads=2, size=32, block=16, dtype=dtype)
        expected = case.attend(native, False, None)
        used = {
            int(case.tables[run, at // 16]) * 16 + at % 16
            for run, length in enumerate((13, 71))
            for at in range(length)
        }
        for slot in set(range(16 * len(case.keys))) - used:
            case.keys[slot // 16, slot % 16] = torch.nan
            case.values[slot // 16, slot % 16] = torch.inf
        assert torch.equal(case.attend(native, False, None), expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [20, 64])
def test_what_a_query_does_not_see_does_nothing_to_it(
    native: NativeKernels, size: int, dtype: torch.dtype, value: float
) -> None:
    """A draft token behind its anchor, a later token of a chunk, a token before the window: masked, not times 0."""
    case = paged([(7, 60), (1, 130), (40, 3)], groups=3, kv_heads=2, size=size, block=16, dtype=dtype)
    for causal, window in ((True, None), (False, None), (True, 5), (False, 70)):
        check_hidden_rows_stay_hidden(native, case, causal, window, value)
    for first_key in (1, 33):
        case = replace(
            paged([(7, 60), (1, 130)], groups=3, kv_heads=2, size=size, block=16, dtype=dtype), first_key=first_key
        )
        for causal, window in ((True, None), (False, 70)):
            check_hidden_rows_stay_hidden(native, case, causal, window, value)
