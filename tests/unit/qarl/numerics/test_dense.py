"""Dense layers: a row has one value in any batch, and the gradients are those of the plain layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qarl.numerics import dense, engine_ops, processor
from qarl.numerics.dense import MOST_ROWS, DenseLinear, DenseWeight, in_blocks, matmul
from qarl.quant.linear import requantize
from tests.support.hosts import needs_avx512

needs_vllm = pytest.mark.skipif(not engine_ops.available(), reason="vLLM is not installed")
needs_bfloat16 = pytest.mark.skipif(not processor.has_bfloat16_gemm(), reason="this processor has no bfloat16 GEMM")
DTYPES = (torch.bfloat16, torch.float32)
ROWS = 200


def cancelling(inputs: int, outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [M, K] and a weight [N, K] whose exact product is 0: what is computed shows the order of the sums."""
    x, weight, order = torch.randn(ROWS, inputs // 2), torch.randn(outputs, inputs // 2), torch.randperm(inputs)
    return torch.cat((x, -x), 1)[:, order].to(dtype), torch.cat((weight, weight), 1)[:, order].to(dtype)


@pytest.fixture(params=[True, False], ids=["bfloat16 gemm", "no bfloat16 gemm"])
def _either_processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param and not processor.has_bfloat16_gemm():
        pytest.skip("this processor has no bfloat16 GEMM")
    monkeypatch.setattr(processor, "has_bfloat16_gemm", lambda: request.param)


@needs_vllm
@pytest.mark.usefixtures("_either_processor")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), [(576, 1536), (1536, 576), (192, 64), (2048, 512), (100, 72)])
def test_a_row_has_one_value_in_any_batch(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    torch.manual_seed(inputs)
    x_MK, weight_NK = cancelling(inputs, outputs, dtype)
    weight = DenseWeight(weight_NK)
    whole_MN = weight(x_MK)
    assert (whole_MN != 0).float().mean() > 0.1
    assert torch.equal(torch.cat([weight(row) for row in x_MK.split(1)]), whole_MN)
    for rows in (1, 2, 3, 7, 8, 9, 16, 17, 31, 32, 33, 48, 63, 64, 65, 128, 199):
        first = int(torch.randint(0, ROWS - rows + 1, ()))
        assert torch.equal(weight(x_MK[first : first + rows]), whole_MN[first : first + rows]), rows
    # The engine fuses layers that read the same input.
    parts = [DenseWeight(part) for part in weight_NK.split([outputs // 2, outputs // 4, outputs // 4])]
    assert torch.equal(torch.cat([part(x_MK) for part in parts], 1), whole_MN)


@needs_vllm
@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.bfloat16, marks=needs_bfloat16), pytest.param(torch.float32, marks=needs_avx512)]
)
def test_the_engines_plain_gemm_depends_on_the_batch(dtype: torch.dtype) -> None:
    """What the blocks are for; the test above would find it."""
    x_MK, weight_NK = cancelling(2048, 256, dtype)
    handler = engine_ops.ops().create_onednn_mm(weight_NK.t(), 32)
    one, many = (engine_ops.ops().onednn_mm(handler, x, None)[0] for x in (x_MK[:1], x_MK))
    assert not torch.equal(one, many)


@given(rows=st.integers(0, 300), dtype=st.sampled_from(DTYPES))
@settings(deadline=None)
def test_blocks_hold_every_row_once_and_have_few_sizes(rows: int, dtype: torch.dtype) -> None:
    sizes: list[int] = []

    def gemm(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return x * 2

    x_MK = torch.arange(rows * 2).view(rows, 2).remainder(128).to(dtype)
    assert torch.equal(in_blocks(gemm, x_MK), x_MK * 2)
    assert set(sizes) <= {8, 16, 32, 64}
    assert max(sizes) <= MOST_ROWS[dtype]
    assert sum(sizes) < max(2 * rows, 8) + 8


@needs_vllm
@pytest.mark.usefixtures("_either_processor")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_those_of_the_plain_layer(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    layer = DenseLinear(nn.Linear(96, 40, bias=bias).to(dtype))
    x = torch.randn(5, 7, 96, dtype=dtype, requires_grad=True)
    y = layer(x)
    upstream = torch.randn_like(y)
    grads = torch.autograd.grad(y, [x, *layer.parameters()], upstream)
    leaves = [t.detach().double().requires_grad_() for t in (x, *layer.parameters())]
    expected = nn.functional.linear(*leaves)
    bound = {"rtol": 2**-8, "atol": 2**-8} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(y.double(), expected, **bound)
    for grad, want in zip(grads, torch.autograd.grad(expected, leaves, upstream.double()), strict=True):
        assert grad.dtype == dtype
        atol = bound["atol"] * max(1.0, want.abs().max().item())
        torch.testing.assert_close(grad.double(), want, rtol=bound["rtol"], atol=atol)


def double_in_place(layer: DenseLinear) -> None:
    with torch.no_grad():
        layer.weight.mul_(2)


def double_elsewhere(layer: DenseLinear) -> None:
    layer.weight = nn.Parameter(layer.weight.detach() * 2)


def double_as_deepspeed_does(layer: DenseLinear) -> None:
    layer.weight.data.mul_(2)
    requantize(nn.Sequential(layer))


@needs_vllm
@pytest.mark.parametrize("double", [double_in_place, double_elsewhere, double_as_deepspeed_does])
def test_a_layer_follows_its_weight(double: Callable[[DenseLinear], None]) -> None:
    layer = DenseLinear(nn.Linear(64, 32, bias=False))
    x = torch.randn(3, 64)
    before = layer(x)
    double(layer)
    assert torch.equal(layer(x), 2 * before)


@needs_vllm
def test_a_weight_is_laid_out_once_until_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[DenseWeight] = []

    class Counted(DenseWeight):
        def __init__(self, weight_NK: Tensor, shards: int) -> None:
            super().__init__(weight_NK, shards)
            made.append(self)

    monkeypatch.setattr(dense, "DenseWeight", Counted)
    layer = DenseLinear(nn.Linear(64, 32))
    for count in (1, 2, 3):
        for _ in range(3):
            layer(torch.randn(3, 64, requires_grad=True)).sum().backward()
        assert len(made) == count
        double_as_deepspeed_does(layer)


def test_without_a_bfloat16_gemm_float32_copies_are_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.randn(5, 64).bfloat16(), torch.randn(64, 3).bfloat16()
    monkeypatch.setattr(dense.processor, "has_bfloat16_gemm", lambda: False)
    assert torch.equal(matmul(a, b), (a.float() @ b.float()).bfloat16())


@pytest.mark.skipif(not processor.has_amx(), reason="oneDNN multiplies bfloat16 copies on processors with AMX alone")
def test_gradients_may_be_products_of_bfloat16_copies() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(300, 512), torch.randn(512, 256)
    exact, rounded = a.double() @ b.double(), a.bfloat16().double() @ b.bfloat16().double()
    plain = matmul(a, b)
    try:
        dense.set_gradient_precision("medium")
        assert (matmul(a, b) - rounded).abs().max() < 1e-4
        assert torch.equal(a @ b, plain)  # nothing else changes
    finally:
        dense.set_gradient_precision("highest")
    assert (plain - exact).abs().max() < 1e-4 < (rounded - exact).abs().max()
