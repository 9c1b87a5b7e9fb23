"""One rule of the engine's rounding given back to transformers, to measure what that rule is worth.

From the exact profile, not into the stock model: there, whatever is left unmatched saturates the noise and every rule
looks worthless. Suffixes: B sequences, T tokens, H query heads, G key/value heads, D head width.
"""

from __future__ import annotations

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


def rotate_in_dtype(x_BTHD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor:
    cos, sin = cos_BTD.unsqueeze(2), sin_BTD.unsqueeze(2)
    x1, x2 = x_BTHD.chunk(2, -1)
    return torch.cat((x1 * cos + -x2 * sin, x2 * cos + x1 * sin), -1)


def attend_in_dtype(q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, scale: float, _: BatchLayout) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q_BTHD, k_BTGD, v_BTGD))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)
