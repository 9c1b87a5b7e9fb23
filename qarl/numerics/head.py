"""A model's head whose logits, the widest tensor of all, exist for a few rows at a time, also in the backward pass.

Suffixes: S rows, C rows of one chunk, V vocabulary, E model width.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qarl.numerics.dense import add_product, matmul

Score = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""Logits [C, V] and tokens [C] -> values [C] of each row, or empty."""


class Head(nn.Linear):
    """A mixin for linear layers: `head(x)` are logits as ever, `head(x, tokens, rows, score)` values of the logits.

    A backward that computes logits again takes `with_gradient` for `score`: it need not give values without a gradient.
    All chunks are computed in one call, because ZeRO-3 gathers the weight for the layer's own forward and backward.
    """

    def forward(
        self,
        input: Tensor,
        tokens_S: Tensor | None = None,
        rows: int = 0,
        score: Score | None = None,
        with_gradient: Score | None = None,
    ) -> Any:
        """Logits; with `score` its values, from the logits of `rows` rows at a time."""
        product = super().forward
        if score is None or tokens_S is None:
            return product(input)
        if torch.is_grad_enabled() and len(input) > rows:
            chunks = (tokens_S, rows, product, score, with_gradient or score)
            scores: tuple[Tensor, ...] = _InChunks.apply(input, self.weight, self.bias, *chunks)
            return scores
        return _scores(input, tokens_S, rows, product, score)


def as_head(linear: nn.Linear) -> None:
    """Give any kind of linear layer `Head`'s forward, in place, as torch's parametrizations change a class."""
    linear.__class__ = type("Head", (Head, type(linear)), {})


class _InChunks(torch.autograd.Function):
    """`_scores`, whose backward computes the logits again and adds up the weight's gradient in one float32 tensor."""

    @staticmethod
    def forward(
        ctx: Any,
        x_SE: Tensor,
        weight_VE: Tensor,
        bias_V: Tensor | None,
        tokens_S: Tensor,
        rows: int,
        product: Callable[[Tensor], Tensor],
        score: Score,
        with_gradient: Score,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x_SE, weight_VE, tokens_S)
        ctx.rows, ctx.product, ctx.score = rows, product, with_gradient
        return _scores(x_SE, tokens_S, rows, product, score)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_SE, weight_VE, tokens_S = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_x = torch.empty_like(x_SE) if needs_x else None
        grad_weight = torch.zeros_like(weight_VE, dtype=torch.float32) if needs_weight else None
        grad_bias = weight_VE.new_zeros(len(weight_VE), dtype=torch.float32) if needs_bias else None
        for first in range(0, len(x_SE), ctx.rows):
            part = slice(first, first + ctx.rows)
            logits_CV = ctx.product(x_SE[part])
            grad_CV = _logit_gradients(ctx.score, logits_CV, tokens_S[part], [grad[part] for grad in grads])
            if grad_x is not None:
                grad_x[part] = matmul(grad_CV, weight_VE)
            if grad_weight is not None:
                add_product(grad_weight, grad_CV.t(), x_SE[part])
            if grad_bias is not None:
                grad_bias += grad_CV.sum(0, dtype=torch.float32)
            del logits_CV, grad_CV  # before the next ones are made
        sums = (None if grad is None else grad.to(weight_VE.dtype) for grad in (grad_weight, grad_bias))
        return grad_x, *sums, None, None, None, None, None


def _scores(
    x_SE: Tensor, tokens_S: Tensor, rows: int, product: Callable[[Tensor], Tensor], score: Score
) -> tuple[Tensor, ...]:
    chunks = zip(x_SE.split(rows), tokens_S.split(rows), strict=True)
    parts = [score(product(x_CE), tokens_C) for x_CE, tokens_C in chunks]
    return tuple(torch.cat(values) for values in zip(*parts, strict=True))


def _logit_gradients(score: Score, logits_CV: Tensor, tokens_C: Tensor, grads: Sequence[Tensor]) -> Tensor:
    """Gradient of the logits, [C, V], from those of the scores."""
    with torch.enable_grad():
        logits_CV.requires_grad_()
        scores = score(logits_CV, tokens_C)
    pairs = [(value, grad) for value, grad in zip(scores, grads, strict=True) if value.requires_grad]
    values, upstream = zip(*pairs, strict=True)
    return torch.autograd.grad(values, logits_CV, upstream)[0]
