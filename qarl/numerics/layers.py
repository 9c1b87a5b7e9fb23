"""The engine's roundings, module by module, on a Hugging Face decoder, with gradients.

Measured with vLLM 0.32 on CPU: with these modules a transformers model gives the engine's log-probs bit for bit.
Suffixes: N tokens of a flat batch, B rows of T tokens, E model width, H query heads, G key/value heads, D head width.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from qarl.numerics import processor
from qarl.numerics.engine_ops import PagedLayout
from qarl.numerics.flat import FlatLayout, Row


class BatchLayout:
    """The responses of one forward, without padding, and the engine's view of them.

    Args:
        rows: of `qarl.numerics.flat.flat_rows`.
        paged: build the engine's paged view (exact attention); False attends in pure torch.
    """

    def __init__(self, rows: Sequence[Row], paged: bool, device: torch.device | None = None) -> None:
        self.flat = FlatLayout(rows, device)
        self.paged = PagedLayout(rows) if paged else None


class Norm(nn.Module):
    """RMSNorm on the unrounded float32 sum: vLLM normalises it before rounding to the model's dtype.

    [..., E] of float32 or the model's dtype -> [..., E] of the model's dtype.
    """

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight: nn.Parameter = norm.weight
        self.variance_epsilon: float = norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(self.weight.dtype)


class Rotary(nn.Module):
    """cos and sin computed in float32, held in the model's dtype, [N, D/2] each.

    The frequencies are no buffer: casting the model to bfloat16 must not touch them.
    """

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        self.inv_freq: Tensor = rotary.inv_freq.float()
        self.scaling: float = rotary.attention_scaling

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        return self

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq.to(x.device)
        return (angles.cos() * self.scaling).to(x.dtype), (angles.sin() * self.scaling).to(x.dtype)


class Rotate(torch.autograd.Function):
    """RoPE as the engine rounds it; the backward is the exact inverse rotation.

        out1 = fma(-x2, sin, round32(x1 cos))      out2 = fma(x1, sin, round32(x2 cos))

    float64 holds each product exactly, so the sum rounds once, as the fused op does. vLLM's kernels for processors
    without AVX-512 round each product to float32, and cut float32 off to bfloat16 instead of rounding it.
    """

    @staticmethod
    def forward(ctx: Any, x_NHD: Tensor, cos_ND: Tensor, sin_ND: Tensor) -> Tensor:
        cos, sin = cos_ND.unsqueeze(-2), sin_ND.unsqueeze(-2)
        ctx.save_for_backward(cos, sin)
        x1, x2 = x_NHD.chunk(2, -1)
        if x_NHD.device.type == "cpu" and not processor.has_avx512():
            x1, x2, cos, sin = (t.float() for t in (x1, x2, cos, sin))
            return processor.cut_off(torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1), x_NHD.dtype)
        first1, first2 = (x1.float() * cos.float()).double(), (x2.float() * cos.float()).double()
        out1 = first1 - x2.double() * sin.double()
        out2 = first2 + x1.double() * sin.double()
        return torch.cat((out1.float(), out2.float()), -1).to(x_NHD.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        cos, sin = (t.float() for t in ctx.saved_tensors)
        g1, g2 = grad.float().chunk(2, -1)
        return torch.cat((g1 * cos + g2 * sin, g2 * cos - g1 * sin), -1).to(grad.dtype), None, None


def causal_attention(q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, scale: float) -> Tensor:
    """Causal attention in float32, rounded once: [B, H, T, D] in q's dtype. The engine's bits in short contexts.

    Without AVX-512 the engine's attention cuts off, and so does this.
    """
    groups = q_BHTD.shape[1] // k_BGTD.shape[1]
    # Repeated heads reach the memory-saving kernels on every device; `enable_gqa` does not.
    k_BHTD, v_BHTD = (t.float().repeat_interleave(groups, dim=1) for t in (k_BGTD, v_BGTD))
    out = F.scaled_dot_product_attention(q_BHTD.float(), k_BHTD, v_BHTD, is_causal=True, scale=scale)
    return processor.round_as_engine(out, q_BHTD.dtype)


class EngineAttention(torch.autograd.Function):
    """Forward by the engine's own op over its paged cache; backward through float32 attention, recomputed."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, layout: BatchLayout) -> Tensor:
        """q [N, H, D], k and v [N, G, D] -> [N, H, D]."""
        assert layout.paged is not None
        ctx.save_for_backward(q, k, v)
        ctx.scale, ctx.layout = scale, layout
        return layout.paged.attend(q, k, v, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: gradient checkpointing recomputes them and forbids a second look
        with torch.enable_grad():
            inputs = [t.detach().float().requires_grad_() for t in saved]
            q, k, v = inputs
            out = attend_in_torch(q, k, v, ctx.scale, ctx.layout)
        grad_inputs = torch.autograd.grad(out, inputs, grads[0].float())
        return *(g.to(t.dtype) for g, t in zip(grad_inputs, saved, strict=True)), None, None


def attend(q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, scale: float, layout: BatchLayout) -> Tensor:
    """Causal attention by the engine's op where the batch has a paged view, else in torch: [N, H, D]."""
    if layout.paged is not None:
        return EngineAttention.apply(q_NHD, k_NGD, v_NGD, scale, layout)
    return attend_in_torch(q_NHD, k_NGD, v_NGD, scale, layout)


def attend_in_torch(q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, scale: float, layout: BatchLayout) -> Tensor:
    """Causal attention of every response over its prompt and itself: [N, H, D] in q's dtype."""
    q, k, v = (layout.flat.pad(t).transpose(1, 2) for t in (q_NHD, k_NGD, v_NGD))
    return layout.flat.flatten(causal_attention(q, k, v, scale).transpose(1, 2))


def unrounded_sum(branch: Tensor, residual: Tensor) -> Tensor:
    """What the next norm sees: the sum in float32."""
    return branch.float() + residual.float()


class Attention(nn.Module):
    """Self-attention of Llama, Qwen2 (biased projections) and Qwen3 (normed heads), by the engine's rounding."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.q_proj: nn.Module = attention.q_proj
        self.k_proj: nn.Module = attention.k_proj
        self.v_proj: nn.Module = attention.v_proj
        self.o_proj: nn.Module = attention.o_proj
        self.q_norm: nn.Module = Norm(attention.q_norm) if hasattr(attention, "q_norm") else nn.Identity()
        self.k_norm: nn.Module = Norm(attention.k_norm) if hasattr(attention, "k_norm") else nn.Identity()
        self.head_dim: int = attention.head_dim
        self.scaling: float = attention.scaling
        self.rotate: Callable[[Tensor, Tensor, Tensor], Tensor] = Rotate.apply
        self.attend: Callable[[Tensor, Tensor, Tensor, float, BatchLayout], Tensor] = attend

    def forward(self, x_NE: Tensor, position_embeddings: tuple[Tensor, Tensor], layout: BatchLayout) -> Tensor:
        heads = (len(x_NE), -1, self.head_dim)
        q = self.rotate(self.q_norm(self.q_proj(x_NE).view(heads)), *position_embeddings)
        k = self.rotate(self.k_norm(self.k_proj(x_NE).view(heads)), *position_embeddings)
        v = self.v_proj(x_NE).view(heads)
        out = self.attend(q, k, v, self.scaling, layout)
        return self.o_proj(out.flatten(1))


class DecoderLayer(GradientCheckpointingLayer):
    """One pre-norm block. Between blocks travels the unrounded float32 sum; only the residual itself is rounded."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.self_attn = Attention(layer.self_attn)
        self.mlp: nn.Module = layer.mlp
        self.input_layernorm = Norm(layer.input_layernorm)
        self.post_attention_layernorm = Norm(layer.post_attention_layernorm)
        self.add: Callable[[Tensor, Tensor], Tensor] = unrounded_sum

    def forward(self, hidden_NE: Tensor, position_embeddings: tuple[Tensor, Tensor], layout: BatchLayout) -> Tensor:
        dtype = self.input_layernorm.weight.dtype
        residual = hidden_NE.to(dtype)
        branch = self.self_attn(self.input_layernorm(hidden_NE), position_embeddings, layout)
        total = self.add(branch, residual)
        residual = total.to(dtype)
        return self.add(self.mlp(self.post_attention_layernorm(total)), residual)


def hidden_states(decoder: Any, ids_N: Tensor, layout: BatchLayout) -> Tensor:
    """The last hidden states, [N, E], of a transformers decoder that `apply_profile` has changed."""
    hidden_NE: Tensor = decoder.embed_tokens(ids_N)
    position_embeddings = decoder.rotary_emb(hidden_NE, layout.flat.positions_N)
    for layer in decoder.layers:
        hidden_NE = layer(hidden_NE, position_embeddings, layout)
    return decoder.norm(hidden_NE)
