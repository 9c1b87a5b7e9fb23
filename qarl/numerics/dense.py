"""Dense layers (unquantized linears, routers, the head) on CPU: engine and learner compute them by one function.

A row has one value in any batch. oneDNN orders the sums of a row by the number of rows of the GEMM: a single row in
another order than several, and with AMX more than 32 rows in another than fewer. Between these bounds the order is one,
so a batch is computed in blocks of 8, 16, 32 (float32: or 64) rows, of which the last is filled up with zeros.

Suffixes: M rows, K input features, N output features.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qarl.numerics import engine_ops, processor
from qarl.numerics.shards import all_reduce

FEWEST_ROWS = 8
MOST_ROWS = {torch.bfloat16: 32, torch.float32: 64}
Precision = Literal["highest", "high", "medium"]
_precision: Precision = "highest"


def in_blocks(gemm: Callable[[Tensor], Tensor], x_MK: Tensor) -> Tensor:
    """`gemm(x_MK)`, [M, N], in blocks of a few fixed numbers of rows."""
    blocks = list(x_MK.split(MOST_ROWS[x_MK.dtype]))
    last = len(blocks[-1])
    rows = max(FEWEST_ROWS, 1 << (last - 1).bit_length())
    if rows > last:
        blocks[-1] = F.pad(blocks[-1], (0, 0, 0, rows - last))
    products = [gemm(block) for block in blocks]
    return (products[0] if len(products) == 1 else torch.cat(products))[: len(x_MK)]


class DenseWeight:
    """A weight [N, K] in oneDNN's layout: a copy. Calling it gives `x W^T + b`, [..., K] -> [..., N] in the dtype of x.

    On processors without a bfloat16 GEMM the copy of a bfloat16 weight is in float32, and the product is rounded: that
    is 3 to 10 times faster there than torch's bfloat16 GEMM.

    `shards` slices of the inputs are multiplied apart, as the processes of a tensor-parallel engine do.
    """

    def __init__(self, weight_NK: Tensor, shards: int = 1) -> None:
        self._dtype = weight_NK.dtype if processor.has_bfloat16_gemm() else torch.float32
        self._ops = engine_ops.ops()
        slices_NK = weight_NK.detach().to(self._dtype).chunk(shards, 1)
        self._handlers = [self._ops.create_onednn_mm(slice_NK.contiguous().t(), 32) for slice_NK in slices_NK]

    def __call__(self, x: Tensor, bias_N: Tensor | None = None) -> Tensor:
        bias = None if bias_N is None else bias_N.detach().to(self._dtype)
        slices_MK = x.reshape(-1, x.shape[-1]).to(self._dtype).chunk(len(self._handlers), 1)
        biases = [bias, *[None] * (len(self._handlers) - 1)]
        products = map(self._product, self._handlers, slices_MK, biases)
        return all_reduce([product_MN.to(x.dtype) for product_MN in products]).view(*x.shape[:-1], -1)

    def _product(self, handler: Any, x_MK: Tensor, bias_N: Tensor | None) -> Tensor:
        return in_blocks(lambda block: self._ops.onednn_mm(handler, block, bias_N), x_MK.contiguous())


class DenseProduct(torch.autograd.Function):
    """`x W^T + b` by `dense`, a `DenseWeight` of W; None for a new one. With gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_NK: Tensor, bias_N: Tensor | None, dense: DenseWeight | None) -> Tensor:
        ctx.save_for_backward(x, weight_NK)
        return (dense or DenseWeight(weight_NK))(x, bias_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *linear_gradients(ctx, grads[0]), None


class DenseLinear(nn.Linear):
    """An `nn.Linear` that computes as the engine's dense layers do. Parameters and their names stay the same.

    The engine's layout of the weight is made at first use and kept until `forget()`, which
    `qarl.quant.linear.requantize` calls, or until the parameter is seen to differ: it has other memory, or an op has
    changed it in place. What is written through `.data`, as DeepSpeed does, is not seen. `shards` as in `DenseWeight`.
    """

    def __init__(self, linear: nn.Linear, shards: int = 1) -> None:
        nn.Module.__init__(self)
        self.shards = shards
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.forget()

    def forget(self) -> None:
        """The weight has changed."""
        self._dense: DenseWeight | None = None
        self._made_of = (0, 0)

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] -> [..., N] in the input's dtype."""
        now = (self.weight.data_ptr(), self.weight._version)
        if self._dense is None or self._made_of != now:
            self._dense, self._made_of = DenseWeight(self.weight, self.shards), now
        out: Tensor = DenseProduct.apply(input, self.weight, self.bias, self._dense)
        return out


def linear_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `x W^T + b` for `ctx`, which has saved x and W and says which are needed, in the order x, W, b.

        dL/dx = dL/dy W        dL/dW = dL/dy^T x        dL/db = sum_m dL/dy

    Plain GEMMs in the compute dtype, summed in float32: gradients need no bit of the engine's.
    """
    x, weight_NK = ctx.saved_tensors
    grad_MN = grad.reshape(-1, grad.shape[-1])
    grad_x = matmul(grad, weight_NK) if ctx.needs_input_grad[0] else None
    grad_w = matmul(grad_MN.t(), x.reshape(-1, x.shape[-1])) if ctx.needs_input_grad[1] else None
    grad_b = grad_MN.sum(0) if ctx.needs_input_grad[2] else None
    return grad_x, grad_w, grad_b


def set_gradient_precision(precision: Precision) -> None:
    """Let `matmul` multiply float32 matrices with this precision of `torch.set_float32_matmul_precision`."""
    global _precision
    _precision = precision


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of a backward pass, summed in float32 and rounded once.

    Processors without a bfloat16 GEMM multiply float32 copies: torch's own loop is six times slower there.
    """
    if a.device.type == "cpu" and a.dtype == torch.bfloat16 and not processor.has_bfloat16_gemm():
        return (a.float() @ b.float()).to(a.dtype)
    with _multiplying_in(_precision):
        return a @ b


def add_product(sum_KN: Tensor, a: Tensor, b: Tensor) -> None:
    """`sum_KN += a @ b` in place, in float32; a product of a backward pass."""
    precision = "medium" if a.dtype == torch.bfloat16 else _precision  # values of bfloat16 lose nothing by it
    with _multiplying_in(precision):
        sum_KN.addmm_(a.float(), b.float())


@contextmanager
def _multiplying_in(precision: Precision) -> Iterator[None]:
    """For these products alone: attention becomes slower by it on CPU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
