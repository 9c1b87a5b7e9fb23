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


def log_probs(model: Any, ids_BT: Tensor, lengths: list[int], prompt: int = 0) -> Tensor:
    """Log-probs of the real tokens but the first of each sequence: [N].

    `prompt`: tokens of each sequence's prompt, which portable numerics compute once for neighbours; 0 shares none.
    """
    mask_BT = torch.arange(ids_BT.shape[1]) < torch.tensor(lengths)[:, None]
    if isinstance(model.model.norm, Norm):
        first = max(1, prompt)
        keys = [ids[:prompt].tolist() if prompt else [number] for number, ids in enumerate(ids_BT)]
        rows = flat_rows(keys, [length - first for length in lengths])
        parts = zip(rows, ids_BT, lengths, strict=True)
        flat_N = torch.cat([ids[0 if row.owns_prompt else first : length] for row, ids, length in parts])
        hidden = hidden_states(model.model, flat_N, BatchLayout(rows, paged=False))
        hidden = hidden[torch.cat([row.tokens() for row in rows])]
        hidden_BTE = hidden.new_zeros(*mask_BT.shape, hidden.shape[1]).masked_scatter(mask_BT[..., None], hidden)
    else:
        hidden_BTE = model.model(input_ids=ids_BT, use_cache=False, attention_mask=mask_BT)[0]
    logp_BTV = torch.log_softmax(model.lm_head(hidden_BTE).float(), -1)[:, :-1]
    return logp_BTV.gather(2, ids_BT[:, 1:, None]).squeeze(2)[mask_BT[:, 1:]]


def batch() -> tuple[Tensor, list[int]]:
    return torch.randint(0, 64, (3, 12), generator=torch.manual_seed(1)), [12, 7, 2]


def groups() -> tuple[Tensor, list[int], int]:
    """Two responses to each of two prompts of four tokens; and that number."""
    ids_BT = torch.randint(0, 64, (4, 12), generator=torch.manual_seed(1))
    ids_BT[1, :4], ids_BT[3, :4] = ids_BT[0, :4], ids_BT[2, :4]
    return ids_BT, [12, 7, 5, 9], 4
