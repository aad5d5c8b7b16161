"""`runtime.linear.Linear`: the choice of a matrix product, and that every choice computes the same thing."""

import gc
import weakref

import dspark_kernels
import pytest
import torch
from dspark_kernels.reference import ReferenceKernels

from dspark_server.errors import ConfigError
from dspark_server.runtime import linear as linear_module
from dspark_server.runtime.linear import Linear, choose_backend, onednn_has_bfloat16

NATIVE = dspark_kernels.load("native")
PACKING = ["native", *(["onednn"] if onednn_has_bfloat16() else [])]


@pytest.fixture(autouse=True)
def no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DSPARK_LINEAR", raising=False)


@pytest.mark.parametrize("backend", [*PACKING, "plain"])
@pytest.mark.parametrize("biased", [False, True])
def test_every_backend_computes_the_product(backend: str, biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPARK_LINEAR", backend)
    weight, x = torch.randn(70, 96).bfloat16(), torch.randn(9, 96).bfloat16()
    bias = torch.randn(70).bfloat16() if biased else None
    layer = Linear(weight, bias, NATIVE)
    assert layer.backend == backend
    assert (layer.in_features, layer.out_features) == (96, 70)
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert layer(x).dtype == torch.bfloat16
    assert layer(x, out_float32=True).dtype == torch.float32
    for out_float32 in (False, True):
        torch.testing.assert_close(layer(x, out_float32).double(), exact, atol=0.1, rtol=2e-2)


def test_float32_weights_are_multiplied_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPARK_LINEAR", "native")
    weight, x = torch.randn(5, 7), torch.randn(3, 7)
    layer = Linear(weight, None, NATIVE)
    assert layer.backend == "plain"
    torch.testing.assert_close(layer(x), x @ weight.T)


@pytest.mark.parametrize("backend", PACKING)
def test_only_the_packed_weight_stays_in_memory(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPARK_LINEAR", backend)
    weight = torch.randn(64, 64).bfloat16()
    original = weakref.ref(weight)
    layer = Linear(weight, None, NATIVE)
    del weight
    gc.collect()
    assert original() is None
    assert layer(torch.ones(1, 64).bfloat16()).shape == (1, 64)


def test_the_choice_follows_the_processor_and_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wide(ReferenceKernels):
        name = "native-avx512"

    class Narrow(ReferenceKernels):
        name = "native-generic"

    for amx, bfloat16, expected in (
        (False, False, ["native", "native", "plain"]),
        (False, True, ["native", "onednn", "onednn"]),
        (True, True, ["onednn", "onednn", "onednn"]),
    ):
        monkeypatch.setattr(linear_module, "has_amx", lambda amx=amx: amx)
        monkeypatch.setattr(linear_module, "onednn_has_bfloat16", lambda bfloat16=bfloat16: bfloat16)
        kernels = [Wide(), Narrow(), ReferenceKernels()]
        assert [choose_backend(torch.bfloat16, k) for k in kernels] == expected


def test_an_impossible_override_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPARK_LINEAR", "native")
    with pytest.raises(ConfigError, match="native kernels"):
        choose_backend(torch.bfloat16, ReferenceKernels())
    monkeypatch.setattr(linear_module, "onednn_has_bfloat16", lambda: False)
    monkeypatch.setenv("DSPARK_LINEAR", "onednn")
    with pytest.raises(ConfigError, match="oneDNN"):
        choose_backend(torch.bfloat16, NATIVE)
    monkeypatch.setenv("DSPARK_LINEAR", "cuda")
    with pytest.raises(ConfigError, match="cuda"):
        choose_backend(torch.bfloat16, NATIVE)
