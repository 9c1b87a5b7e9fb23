"""The policy: a Hugging Face causal LM with aligned linears and a numerics profile, giving log-probs of responses."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qarl.errors import ModelError
from qarl.numerics.layers import BatchLayout
from qarl.numerics.profile import apply_profile
from qarl.quant.linear import align_linears
from qarl.quant.publish import unquantized_config
from qarl.quant.scheme import KernelKind, QuantScheme
from qarl.types import Numerics
from trainer.batching import PaddedBatch

ENTROPY_ROWS = 1024
"""Tokens whose entropy is computed at once."""


class PolicyOutput(NamedTuple):
    """What a forward gives of the response tokens: float32, zero where masked.

    A tuple, because ZeRO-3's hooks find tensors in tuples but not in dataclasses.
    """

    logprobs_BT: Tensor
    """Log-probs (nats) of the tokens that were sampled."""
    entropy_BT: Tensor | None
    """Entropy (nats) of the distribution that each token was sampled from; None when it was not requested."""


class Policy(nn.Module):
    """log pi(response | prompt), token by token.

    Args:
        path: Hugging Face model folder.
        dtype: dtype of the parameters and of the computation.
        scheme: which linears run in low precision; the scheme `none` gives the plain model.
        temperature: the sampling temperature; log-probs are those of `softmax(logits / temperature)`.

    Raises:
        ModelError: the folder holds no model, or not all of its weights.
    """

    def __init__(
        self,
        path: str | Path,
        dtype: torch.dtype,
        scheme: QuantScheme,
        numerics: Numerics,
        temperature: float = 1.0,
        device: torch.device | None = None,
        kernel: KernelKind = "auto",
    ) -> None:
        super().__init__()
        self.device = device or torch.device("cpu")
        unquantized_config(Path(path))
        try:
            self.model, loading = AutoModelForCausalLM.from_pretrained(
                str(path), dtype=dtype, local_files_only=True, output_loading_info=True
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelError(str(error).splitlines()[0], where=str(path)) from error
        if missing := sorted(loading["missing_keys"]):  # transformers would fill these with random values
            raise ModelError(f"{len(missing)} weights are missing, {missing[0]} first", where=str(path))
        self.model.to(self.device)
        self.numerics, self.temperature = numerics, temperature
        self.quantized_names = align_linears(self.model, scheme, kernel)
        apply_profile(self.model, numerics, self.device)

    def forward(self, batch: PaddedBatch, entropy: Literal["none", "value", "gradient"] = "none") -> PolicyOutput:
        """Log-probs of the response tokens and, unless `entropy` is "none", entropies without or with gradient."""
        hidden_BLE = self.model.model(input_ids=batch.input_ids_BL, use_cache=False, **self._context(batch))[0]
        row, column = batch.response_positions()
        # Logits only where a response token was sampled: they are the widest tensor of the forward.
        logits_NV = self.model.lm_head(hidden_BLE[row, column]).float()
        if self.temperature != 1.0:
            logits_NV = logits_NV / self.temperature
        sampled_N1 = batch.input_ids_BL[row, column + 1, None]
        logp_NV = torch.log_softmax(logits_NV, dim=-1)
        logp_BT = _spread(logp_NV.gather(1, sampled_N1).squeeze(1), batch)
        if entropy == "none":
            return PolicyOutput(logp_BT, None)
        rows = (logp_NV if entropy == "gradient" else logp_NV.detach()).split(ENTROPY_ROWS)
        entropy_N = torch.cat([entropy_of(logp_RV) for logp_RV in rows])
        return PolicyOutput(logp_BT, _spread(entropy_N, batch))

    def _context(self, batch: PaddedBatch) -> dict[str, Any]:
        length = batch.input_ids_BL.shape[1]
        if self.numerics == "stock":
            lengths_B = torch.tensor(batch.seq_lens, device=self.device)
            return {"attention_mask": torch.arange(length, device=self.device) < lengths_B[:, None]}
        paged = self.numerics == "engine"
        return {"layout": BatchLayout(batch.prompt_lens, batch.seq_lens, length, paged)}


def entropy_of(logp_RV: Tensor) -> Tensor:
    """-sum_v p log p in nats: [R]. A token of probability 0 adds nothing to the value or to the gradient."""
    bounded_RV = logp_RV.clamp(min=torch.finfo(logp_RV.dtype).min)  # 0 times -infinity is NaN
    return -(bounded_RV.exp() * bounded_RV).sum(1)


def _spread(values_N: Tensor, batch: PaddedBatch) -> Tensor:
    """Values of the response tokens, laid out as [B, T] and zero where masked."""
    return values_N.new_zeros(batch.mask_BT.shape).masked_scatter(batch.mask_BT, values_N)
