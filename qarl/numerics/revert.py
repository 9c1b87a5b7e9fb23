"""One rule of the engine's rounding given back to transformers, to measure what that rule is worth.

From the exact profile, not into the stock model: there, whatever is left unmatched saturates the noise and every rule
looks worthless. Suffixes: N tokens of a flat batch, H query heads, G key/value heads, D head width.
"""

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from qarl.numerics.layers import BatchLayout, DecoderLayer

Rule = Literal["norm", "rope", "attention"]
RULES: tuple[Rule, ...] = get_args(Rule)


def revert_rule(model: Any, rule: Rule) -> None:
    """Let `rule` round as in transformers, in place, in a model that `apply_profile` has changed.

    `norm`: residual and branch are added in the model's dtype, so that the norm sees the rounded sum. `rope`: products
    and sum are each rounded to the model's dtype. `attention`: torch's attention in the model's dtype.
    """
    for layer in model.model.layers:
        assert isinstance(layer, DecoderLayer)
        match rule:
            case "norm":
                layer.add = rounded_sum
            case "rope":
                layer.self_attn.rotate = rotate_in_dtype
            case "attention":
                layer.self_attn.attend = attend_in_dtype


def rounded_sum(branch: Tensor, residual: Tensor) -> Tensor:
    return residual + branch


def rotate_in_dtype(x_NHD: Tensor, cos_ND: Tensor, sin_ND: Tensor) -> Tensor:
    cos, sin = cos_ND.unsqueeze(-2), sin_ND.unsqueeze(-2)
    x1, x2 = x_NHD.chunk(2, -1)
    return torch.cat((x1 * cos + -x2 * sin, x2 * cos + x1 * sin), -1)


def attend_in_dtype(q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, scale: float, layout: BatchLayout) -> Tensor:
    q, k, v = (layout.flat.pad(t).transpose(1, 2) for t in (q_NHD, k_NGD, v_NGD))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return layout.flat.flatten(out.transpose(1, 2))
