"""Random models of every covered architecture, and their log-probs, for tests of the portable numerics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from qarl.numerics.flat import flat_rows
from qarl.numerics.layers import BatchLayout, Norm, hidden_states
from qarl.numerics.profile import apply_profile

CPU = torch.device("cpu")
KINDS = ("qwen3", "qwen2", "llama", "qwen3_moe")


def tiny_model(kind: str, **changes: Any) -> Any:
    """A random float32 model in training mode."""
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "vocab_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.2,
    }
    if kind == "qwen3_moe":
        shape |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(shape | changes)))
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms start at one and biases at zero: neither would be tested
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model.train()


def portable(model: Any) -> Any:
    apply_profile(model, "portable", CPU)
    return model


def layout(lengths: list[int]) -> BatchLayout:
    """Sequences of these lengths, each with a prompt of one token that it shares with none."""
    return BatchLayout(flat_rows([(number,) for number in range(len(lengths))], [n - 1 for n in lengths]), paged=False)


def log_probs(model: Any, ids_BT: Tensor, lengths: list[int]) -> Tensor:
    """Log-probs of the real tokens but the first of each sequence: [N]."""
    mask_BT = torch.arange(ids_BT.shape[1]) < torch.tensor(lengths)[:, None]
    if isinstance(model.model.norm, Norm):
        hidden = hidden_states(model.model, ids_BT[mask_BT], layout(lengths))
        hidden_BTE = hidden.new_zeros(*mask_BT.shape, hidden.shape[1]).masked_scatter(mask_BT[..., None], hidden)
    else:
        hidden_BTE = model.model(input_ids=ids_BT, use_cache=False, attention_mask=mask_BT)[0]
    logp_BTV = torch.log_softmax(model.lm_head(hidden_BTE).float(), -1)[:, :-1]
    return logp_BTV.gather(2, ids_BT[:, 1:, None]).squeeze(2)[mask_BT[:, 1:]]


def batch() -> tuple[Tensor, list[int]]:
    return torch.randint(0, 64, (3, 12), generator=torch.manual_seed(1)), [12, 7, 2]
