"""Devices that are not there, and what settings come to on one."""

import pytest
import torch
from dspark_kernels import NativeKernels, ReferenceKernels
from dspark_kernels import load as load_kernels
from dspark_kernels.reference import read_rows, write_rows

from dspark_server.errors import ConfigError
from dspark_server.runtime.backend import choose_kernels
from dspark_server.runtime.device import CudaDevice, find_device
from dspark_server.runtime.graphs import default_sizes, up_to
from dspark_server.runtime.kv import KVPool, blocks_that_fit, cache_dtype
from dspark_server.runtime.paging import CacheLayout, CacheRows
from dspark_server.runtime.staging import Staging

from .twin import TwinDevice

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


@no_cuda
def test_a_gpu_that_is_not_there() -> None:
    assert find_device("auto") is None
    assert find_device("cpu") is None
    with pytest.raises(
        ConfigError, match=r"--device cuda: .*\(torch 2\.\d+.*\)\. Install a CUDA build, or --device cpu"
    ):
        find_device("cuda")
    with pytest.raises(ConfigError, match="no GPU 0; torch sees 0"):
        CudaDevice()


def test_the_cache_is_in_the_models_type_or_fp8() -> None:
    reference = ReferenceKernels()
    assert cache_dtype("auto", torch.float32, reference, None) == torch.float32
    assert cache_dtype("bfloat16", torch.bfloat16, reference, None) == torch.bfloat16
    assert cache_dtype("fp8", torch.bfloat16, reference, None) == torch.float8_e4m3fn
    with pytest.raises(ConfigError, match="the model computes in bfloat16"):
        cache_dtype("float16", torch.bfloat16, reference, None)
    native = load_kernels()
    if isinstance(native, NativeKernels):
        with pytest.raises(ConfigError, match=r"the kernels native.* cannot read it"):
            cache_dtype("fp8", torch.bfloat16, native, None)


def test_fp8_is_for_a_gpu_that_has_it_and_for_tritons_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    triton, bfloat16 = load_kernels("triton"), torch.bfloat16
    gpu = object.__new__(CudaDevice)
    monkeypatch.setattr(CudaDevice, "where", torch.device("cuda", 0), raising=False)
    for capability, allowed in (((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda _, capability=capability: capability)
        if allowed:
            assert cache_dtype("fp8", bfloat16, triton, gpu) == torch.float8_e4m3fn
        else:
            with pytest.raises(ConfigError, match=r"needs compute capability 8\.9, this GPU has 8\.[06]: leave it"):
                cache_dtype("fp8", bfloat16, triton, gpu)
    monkeypatch.setattr("dspark_kernels.flash.installed", lambda: True)
    assert choose_kernels("auto", TwinDevice(), bfloat16, 256, "fp8").name == "triton"
    with pytest.raises(ConfigError, match="flash-attn does not load"):
        choose_kernels("auto", TwinDevice(), bfloat16, 256, "auto")


def test_fp8_rows_are_rounded_and_clamped_never_nan() -> None:
    cache = torch.zeros(2, 2, 1, 4, dtype=torch.float8_e4m3fn)
    rows = torch.tensor([[[1.0, -1.06, 449.0, -1e9]], [[0.0019, 2**-9, 17.0, 448.0]]])
    write_rows(cache, torch.tensor([2, 0], dtype=torch.int32), rows)
    assert read_rows(cache, torch.tensor([2])).flatten().tolist() == [1.0, -1.0, 448.0, -448.0]
    assert read_rows(cache, torch.tensor([[0, 1]]))[0, 0].flatten().tolist() == [2**-9, 2**-9, 16.0, 448.0]
    assert not cache[:, 1].float().any()


def test_blocks_are_what_memory_leaves() -> None:
    device = TwinDevice(free=70 << 20, total=100 << 20)
    assert blocks_that_fit(device, 0.9, 10 << 20, 1 << 20) == 90 - 30 - 10
    with pytest.raises(ConfigError, match=r"--gpu-memory-utilization 0\.4: .* nothing is left for the KV cache"):
        blocks_that_fit(device, 0.4, 10 << 20, 1 << 20)


def test_a_device_pool_has_a_scratch_block() -> None:
    layout = CacheLayout.of([[CacheRows(1, 4)] * 2], 4, 4)
    with TwinDevice() as device:
        pool = KVPool(3, layout, torch.float32, device)
        assert pool.scratch == [12]
        assert all(len(cache.keys) == len(cache.values) == 4 for cache in pool.layers(0))
    assert all(len(cache.keys) == len(cache.values) == 3 for cache in KVPool(3, layout, torch.float32).layers(0))


def test_sizes_of_graphs() -> None:
    assert default_sizes(4) == (1, 2, 4)
    assert default_sizes(40) == (1, 2, 4, 8, 16, 24, 32, 40)
    assert default_sizes(8192)[-2:] == (480, 512)
    assert up_to((8, 1, 64), 16) == [1, 8, 16]
    assert up_to((1, 8), 16) == [1, 8]
    assert up_to((), 16) == []


def test_staging_zeroes_what_is_not_said_and_sends_what_is_asked() -> None:
    with TwinDevice() as device:
        fields = {"a": ((3,), torch.int64), "b": ((2, 2), torch.float64), "t": ((3, 2), torch.int32)}
        staging = Staging(device, fields)
        staging.upload({"a": [1, 2, 3], "b": torch.ones(2, 2), "t": torch.ones(3, 2, dtype=torch.int32)})
        staging.upload({"a": [7], "b": torch.full((1, 1), 5.0), "t": torch.full((1, 1), 9, dtype=torch.int32)}, rows=2)
        assert staging.there["a"].tolist() == [7, 0, 0]
        assert staging.there["b"].tolist() == [[5.0, 0.0], [0.0, 0.0]]
        assert staging.there["t"].tolist() == [[9, 0], [0, 0], [1, 1]]
        with pytest.raises(AssertionError, match="staged"):
            staging.upload({"a": [1]})


def test_a_device_without_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ValueError("no such kernels")

    monkeypatch.setattr("dspark_kernels.load", missing)
    with pytest.raises(ConfigError, match=r"needs the Triton kernels.*pip install dspark-server\[gpu\]"):
        choose_kernels("auto", TwinDevice(), torch.bfloat16, 16)
