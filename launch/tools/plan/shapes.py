"""The matrices of a model, which may lie on the meta device, without weights.

Suffixes: K input features, N output features.
"""

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from qarl.errors import ModelError
from qarl.numerics.engine_limits import head_width, key_value_heads, kv_bytes


@dataclass(frozen=True)
class Matrix:
    """A linear layer [N, K], or one of the three matrices of `copies` experts, of which a token uses `active`."""

    name: str
    n: int
    k: int
    copies: int = 1
    active: int = 1

    @property
    def numel(self) -> int:
        return self.n * self.k * self.copies

    @property
    def pattern(self) -> str:
        """The name with every number replaced: equal for the same layer of every block."""
        return re.sub(r"\b\d+\b", "*", self.name)

    def touched(self, tokens: float) -> float:
        """Copies that a batch reads: all for a linear layer, and for experts, drawn independently and evenly,

        E (1 - (1 - k/E)^tokens)        E experts, k of them for each token
        """
        return self.copies * (1.0 - (1.0 - self.active / self.copies) ** tokens)


@dataclass(frozen=True)
class Shapes:
    """What a plan needs to know of a model. `head` is among `matrices`; `others` counts embedding, norms, biases,
    routers; a tied head is one parameter with the embedding."""

    matrices: tuple[Matrix, ...]
    head: Matrix
    tied: bool
    embedding: int
    others: int
    parameters: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    kv_bytes: int
    """Of the keys and values of one token."""
    intermediate: int
    """Features between the MLP's matrices that one token computes, of all experts that it uses."""
    active_experts: int
    """Experts of one token; 0 without any."""
    head_norms: bool
    """Queries and keys are normalised."""
    dtype_bytes: int

    @property
    def active_parameters(self) -> int:
        """Parameters that one token uses, the embedding's rows it does not look up included."""
        return self.parameters - sum(m.n * m.k * (m.copies - m.active) for m in self.matrices)


def shapes_of(model: Any) -> Shapes:
    """The matrices and dimensions of a transformers causal language model, on the meta device or any other.

    Raises ModelError for an architecture that plans do not know.
    """
    config = model.config
    head_weight = model.get_output_embeddings().weight
    head = Matrix("lm_head", *head_weight.shape)
    matrices = tuple(matrix for name, module in model.named_modules() for matrix in _matrices(name, module, config))
    embedding = model.get_input_embeddings().weight
    tied = head_weight is embedding
    parameters = sum(parameter.numel() for parameter in model.parameters())
    in_matrices = sum(matrix.numel for matrix in matrices) - (head.numel if tied else 0)
    per_token = [m.n * m.active for m in matrices if m.name.endswith("up_proj")]
    if not per_token or any(not hasattr(config, key) for key in _KEYS):
        raise ModelError(f"plans know decoders with gated MLPs (Llama, Qwen), not {config.model_type}")
    return Shapes(
        matrices=matrices,
        head=head,
        tied=tied,
        embedding=embedding.numel(),
        others=parameters - in_matrices,
        parameters=parameters,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=key_value_heads(config),
        head_dim=head_width(config),
        kv_bytes=kv_bytes(config, embedding.element_size()),
        intermediate=max(per_token),
        active_experts=max((m.active for m in matrices if m.copies > 1), default=0),
        head_norms=any(name.endswith("q_norm") for name, _ in model.named_modules()),
        dtype_bytes=embedding.element_size(),
    )


_KEYS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads")


def _matrices(name: str, module: nn.Module, config: Any) -> list[Matrix]:
    """The matrices of one module: one of a linear layer, three of a stack of experts (fused 3-D parameters)."""
    if isinstance(module, nn.Linear):
        return [Matrix(name, module.out_features, module.in_features)]
    stack = dict(module.named_parameters(recurse=False))
    if not {"gate_up_proj", "down_proj"} <= stack.keys():
        return []
    experts, n, k = stack["down_proj"].shape
    active = config.num_experts_per_tok
    gate, up = (Matrix(f"{name}.{part}", k, n, experts, active) for part in ("gate_proj", "up_proj"))
    return [gate, up, Matrix(f"{name}.down_proj", n, k, experts, active)]
