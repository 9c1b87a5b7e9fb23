"""Mixture of experts (Qwen3-MoE) by the engine's roundings, with gradients.

Measured with vLLM 0.32 on CPU, whose experts give a token the same bits in any batch.
Suffixes: N tokens, X experts, K of them for a token, E model width, I inner width, F = 2I.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qarl.numerics import engine_ops
from qarl.numerics.dense import DenseProduct
from qarl.numerics.processor import round_as_engine


class Router(nn.Module):
    """Which experts a token takes, and with which weights.

        l = x W^T        top K of l        w = softmax of those K (`norm_topk_prob`), else exp(l - logsumexp l)

    On CPU the engine computes all of it in the model's dtype, on GPU in float32 from the logits on.

    Args:
        gate: transformers' router.
        engine: compute the logits as the engine's dense layers do, bit for bit; otherwise in torch.
    """

    def __init__(self, gate: Any, engine: bool) -> None:
        super().__init__()
        self.weight: nn.Parameter = gate.weight
        self.top_k: int = gate.top_k
        self.renormalize: bool = gate.norm_topk_prob
        self.engine = engine

    def forward(self, x_NE: Tensor) -> tuple[Tensor, Tensor]:
        """Ids [N, K] and float32 weights [N, K], in the engine's order: no particular one."""
        logits_NX = DenseProduct.apply(x_NE, self.weight, None, None) if self.engine else F.linear(x_NE, self.weight)
        if x_NE.device.type != "cpu":
            logits_NX = logits_NX.float()
        top_NK, ids_NK = torch.topk(logits_NX, self.top_k, dim=-1, sorted=False)
        if self.renormalize:
            weights_NK = torch.softmax(top_NK, dim=-1)
        else:
            weights_NK = (top_NK - torch.logsumexp(logits_NX, dim=-1, keepdim=True)).exp()
        return ids_NK, weights_NK.float()


class Experts(nn.Module):
    """SwiGLU experts in one stack: `gate_up_proj` [X, 2I, E], `down_proj` [X, E, I]. Parameter names stay the same.

        y = sum_k w_k down_k(silu(gate_k(x)) * up_k(x))

    On CPU the engine rounds the inner activation and the sum to the model's dtype (cuts them off without AVX-512) and
    nothing between; on GPU also the projections and each expert's contribution.

    Args:
        stack: transformers' experts.
        engine: compute by the engine's own op, bit for bit; otherwise in torch, expert by expert.
    """

    to_dtype: Callable[[Tensor, torch.dtype], Tensor] = staticmethod(round_as_engine)

    def __init__(self, stack: Any, engine: bool) -> None:
        super().__init__()
        self.gate_up_proj: nn.Parameter = stack.gate_up_proj
        self.down_proj: nn.Parameter = stack.down_proj
        self.engine = engine
        self.wide = torch.float32 if self.down_proj.device.type == "cpu" else self.down_proj.dtype

    def forward(self, x_NE: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """[N, E] in the dtype of x."""
        return Mixture.apply(x_NE, ids_NK, weights_NK.float(), self.gate_up_proj, self.down_proj, self)

    def mix(self, x_NE: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """The forward, without gradients."""
        if self.engine:
            return engine_ops.experts(x_NE, ids_NK, weights_NK, self.gate_up_proj, self.down_proj)
        out_NE = torch.zeros_like(x_NE, dtype=torch.float32)
        for expert, token, slot in _by_expert(ids_NK):
            weights = (self.gate_up_proj[expert], self.down_proj[expert])
            out_NE.index_add_(
                0, token, self.contribution(expert, x_NE[token], weights_NK[token, slot], *weights).float()
            )
        return self.to_dtype(out_NE, x_NE.dtype)

    def contribution(self, expert: int, x_NE: Tensor, weight_N: Tensor, gate_up_FE: Tensor, down_EI: Tensor) -> Tensor:
        """What one expert adds to the tokens that chose it, [N, E]. Differentiable in all tensors."""
        gate_NI, up_NI = F.linear(x_NE.to(self.wide), gate_up_FE.to(self.wide)).chunk(2, dim=-1)
        inner_NI = self.to_dtype(F.silu(gate_NI) * up_NI, x_NE.dtype)
        return (F.linear(inner_NI.to(self.wide), down_EI.to(self.wide)) * weight_N[:, None]).to(self.wide)


class Mixture(torch.autograd.Function):
    """Backward through `contribution`, recomputed expert by expert: only the inputs are saved."""

    @staticmethod
    def forward(
        ctx: Any, x_NE: Tensor, ids_NK: Tensor, weights_NK: Tensor, gate_up: Tensor, down: Tensor, experts: Experts
    ) -> Tensor:
        ctx.save_for_backward(x_NE, ids_NK, weights_NK, gate_up, down)
        ctx.experts = experts
        return experts.mix(x_NE, ids_NK, weights_NK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_NE, ids_NK, weights_NK, gate_up, down = ctx.saved_tensors
        grad_x = torch.zeros_like(x_NE, dtype=torch.float32)
        grad_weights, grad_gate_up, grad_down = (torch.zeros_like(t) for t in (weights_NK, gate_up, down))
        for expert, token, slot in _by_expert(ids_NK):
            inputs = (x_NE[token], weights_NK[token, slot], gate_up[expert], down[expert])
            leaves = [t.detach().requires_grad_() for t in inputs]
            with torch.enable_grad():
                contribution_NE = ctx.experts.contribution(expert, *leaves)
            parts = torch.autograd.grad(contribution_NE, leaves, grads[0][token].to(contribution_NE.dtype))
            grad_x.index_add_(0, token, parts[0].float())
            grad_weights[token, slot] = parts[1]
            grad_gate_up[expert], grad_down[expert] = parts[2], parts[3]
        return grad_x.to(x_NE.dtype), None, grad_weights, grad_gate_up, grad_down, None


class SparseMoe(nn.Module):
    """The sparse block of Qwen3-MoE: a router and its experts; there is no shared expert."""

    def __init__(self, block: Any, engine: bool) -> None:
        super().__init__()
        self.gate = Router(block.gate, engine)
        self.experts: nn.Module = (
            block.experts if isinstance(block.experts, Experts) else Experts(block.experts, engine)
        )

    def forward(self, x_NE: Tensor) -> Tensor:
        """[N, E] in the dtype of x."""
        return self.experts(x_NE, *self.gate(x_NE))


def _by_expert(ids_NK: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(expert, its tokens, their slots of K) for every expert that some token chose."""
    ids = ids_NK.flatten()
    order = ids.argsort(stable=True)
    chosen, counts = ids[order].unique_consecutive(return_counts=True)
    for expert, rows in zip(chosen.tolist(), order.split(counts.tolist()), strict=True):
        yield expert, rows // ids_NK.shape[1], rows % ids_NK.shape[1]
