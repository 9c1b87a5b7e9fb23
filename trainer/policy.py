"""The policy: a Hugging Face causal LM with aligned linears and a numerics profile, giving log-probs of responses."""

from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from qarl.errors import ModelError
from qarl.model_folder import load_model, reading
from qarl.numerics.head import as_head
from qarl.numerics.layers import BatchLayout, hidden_states
from qarl.numerics.profile import apply_profile
from qarl.quant.linear import align_linears
from qarl.quant.scheme import KernelKind, QuantScheme
from qarl.types import Numerics, TrainSequence
from trainer.batching import Batch

HEAD_ELEMENTS = 2**23
"""Logits that exist at a time: 32 MiB in float32, the most for which glibc's malloc takes freed memory again."""
DENSE_ROWS = 64
"""Chunks are multiples of it, so that each has as many rows as a GEMM of a fixed number of rows takes."""
EXAMPLE_TOKENS = 24
SAME_ROUNDING_GAP = {torch.float32: 1e-3, torch.bfloat16: 0.05}
OTHER_ROUNDING_GAP = 0.3
"""Largest mean |d log p| of the example, as a share of the standard deviation of its log-probs; a scale that is wrong
by a tenth gives about 0.1. Seen: up to 0.12 where a profile rounds otherwise than transformers, which flips low-bit
codes, too (SmolLM2 in bfloat16, W8A8), and 3e-6 where it does not."""
EntropyMode = Literal["none", "value", "gradient"]


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
        dtype: of the parameters and of the computation.
        scheme: which linears run in low precision; the scheme `none` gives the plain model.
        temperature: the sampling temperature; log-probs are those of `softmax(logits / temperature)`.
        shards: processes of a tensor-parallel engine, whose arithmetic this follows.

    Raises ModelError: the folder holds no model, or not all of its weights, or one that computes what this class does
    not.
    """

    head_elements = HEAD_ELEMENTS

    def __init__(
        self,
        path: str | Path,
        dtype: torch.dtype,
        scheme: QuantScheme,
        numerics: Numerics,
        temperature: float = 1.0,
        device: torch.device | None = None,
        kernel: KernelKind = "auto",
        shards: int = 1,
    ) -> None:
        super().__init__()
        self.device = device or torch.device("cpu")
        self.model = load_model(Path(path), dtype).to(self.device)
        self.numerics, self.temperature = numerics, temperature
        self.quantized_names = align_linears(self.model, scheme, kernel, shards)
        sequence = self._example()
        expected_T = self._transformers_logprobs(sequence)
        apply_profile(self.model, numerics, self.device, shards)
        as_head(self.model.get_output_embeddings())
        self._check_forward(sequence, expected_T, str(path))

    @property
    def keeps_padding(self) -> bool:
        """The backward needs what padded rows hold: of all layers (`stock`), or of every attention (`portable`). Where
        attention is the engine's, one layer at a time pads its rows, in the backward."""
        return self.numerics != "engine"

    def train(self, mode: bool = True) -> "Policy":
        """As ever, but without dropout, whose log-probs no sampler has; only gradient checkpointing sees the mode."""
        super().train(False)
        self.training = mode
        for module in self.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = mode
        return self

    def forward(self, batch: Batch, entropy: EntropyMode = "none") -> PolicyOutput:
        """Log-probs of the response tokens and, unless `entropy` is "none", entropies without or with gradient.

        Of the logits only `head_elements` values exist at a time: the backward computes them again where there are
        more (`qarl.numerics.head`).
        """
        rows = head_rows(self.model.config.vocab_size, self.head_elements)

        score = partial(self._score, entropy=entropy)
        with_gradient = partial(self._score, entropy="gradient" if entropy == "gradient" else "none")
        head = self.model.get_output_embeddings()
        logp_S, entropy_S = head(self._hidden(batch), batch.sampled_S, rows, score, with_gradient)
        if entropy != "gradient":
            entropy_S = entropy_S.detach()
        return PolicyOutput(_spread(logp_S, batch), None if entropy == "none" else _spread(entropy_S, batch))

    def _example(self) -> TrainSequence:
        """Random tokens, half prompt and half response."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.model.config.vocab_size, (EXAMPLE_TOKENS,), generator=generator).tolist()
        half = EXAMPLE_TOKENS // 2
        return TrainSequence(tuple(ids[:half]), tuple(ids[half:]), np.zeros(half, np.float32))

    @torch.no_grad()
    def _transformers_logprobs(self, sequence: TrainSequence) -> Tensor:
        """Log-probs of the response by transformers' own forward: [T]."""
        ids_L = torch.tensor(sequence.prompt_ids + sequence.response_ids, device=self.device)
        with reading(Path(self.model.name_or_path), "transformers' forward"):
            logits_LV = self.model(input_ids=ids_L[None], use_cache=False).logits[0].float() / self.temperature
        logp_LV = torch.log_softmax(logits_LV, -1)[len(sequence.prompt_ids) - 1 : -1]
        return logp_LV.gather(1, ids_L[len(sequence.prompt_ids) :, None]).squeeze(1)

    @torch.no_grad()
    def _check_forward(self, sequence: TrainSequence, expected_T: Tensor, where: str) -> None:
        """Raises ModelError unless this class gives the log-probs of transformers' own forward, but for rounding."""
        logp_T = self(Batch.of([sequence], self.device)).logprobs_BT[0]
        gap, spread = (logp_T - expected_T).abs().mean().item(), expected_T.std().item()
        dtype = self.model.dtype
        rounds_alike = self.numerics == "stock" or (dtype == torch.float32 and not self.quantized_names)
        largest = SAME_ROUNDING_GAP[dtype] if rounds_alike else OTHER_ROUNDING_GAP
        if not gap <= largest * max(spread, 0.01):  # NaN is above every bound
            raise ModelError(
                f"numerics '{self.numerics}' do not compute what {type(self.model).__name__} computes in transformers: "
                f"mean |d log p| {gap:.2g} nats on random tokens, whose log-probs spread by {spread:.2g}",
                where,
                "train another model" if self.numerics == "stock" else "set learner.numerics=stock",
            )

    def _hidden(self, batch: Batch) -> Tensor:
        """The hidden state that predicts each response token: [S, E]."""
        if self.numerics == "stock":  # transformers' own forward
            ids_BL, mask_BL = batch.padded()
            hidden_BLE = self.model.base_model(input_ids=ids_BL, use_cache=False, attention_mask=mask_BL)[0]
            return hidden_BLE[batch.predicts_BL()]
        layout = BatchLayout(batch.rows, paged=self.numerics == "engine", device=self.device)
        return hidden_states(self.model.model, batch.ids_N, layout)[batch.predicts_S]

    def _score(self, logits_CV: Tensor, sampled_C: Tensor, entropy: EntropyMode) -> tuple[Tensor, Tensor]:
        """Log-probs of `sampled_C`, and entropies (none where not requested)."""
        logits_CV = after_head(logits_CV, self.model.config).float()
        if self.temperature != 1.0:
            logits_CV = logits_CV / self.temperature
        logp_CV = torch.log_softmax(logits_CV, dim=-1)
        logp_C = logp_CV.gather(1, sampled_C[:, None]).squeeze(1)
        if entropy == "none":
            return logp_C, logp_C.new_zeros(0)
        return logp_C, entropy_of(logp_CV if entropy == "gradient" else logp_CV.detach())


def after_head(logits_CV: Tensor, config: Any) -> Tensor:
    """What Granite, Cohere and Gemma do to the head's output: divide, multiply, cap it."""
    if scaling := getattr(config, "logits_scaling", None):
        logits_CV = logits_CV / scaling
    if scale := getattr(config, "logit_scale", None):
        logits_CV = logits_CV * scale
    if cap := getattr(config, "final_logit_softcapping", None):
        logits_CV = torch.tanh(logits_CV / cap) * cap
    return logits_CV


def head_rows(vocabulary: int, elements: int = HEAD_ELEMENTS) -> int:
    """Response tokens whose logits exist at a time."""
    return max(DENSE_ROWS, elements // vocabulary // DENSE_ROWS * DENSE_ROWS)


def entropy_of(logp_RV: Tensor) -> Tensor:
    """-sum_v p log p in nats: [R]. A token of probability 0 adds nothing to the value or to the gradient."""
    bounded_RV = logp_RV.clamp(min=torch.finfo(logp_RV.dtype).min)  # 0 times -infinity is NaN
    return -(bounded_RV.exp() * bounded_RV).sum(1)


def _spread(values_S: Tensor, batch: Batch) -> Tensor:
    """Values of the response tokens as [B, T], zero where masked."""
    return values_S.new_zeros(batch.mask_BT.shape).masked_scatter(batch.mask_BT, values_S)
