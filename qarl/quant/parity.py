"""Checks, op by op, that the learner computes on this host what the engine computes."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from qarl.numerics import engine_ops, processor
from qarl.numerics.dense import DenseWeight
from qarl.numerics.engine_limits import head_width
from qarl.numerics.layers import Rotate
from qarl.numerics.moe import Experts
from qarl.quant.experts import QuantizedExperts
from qarl.quant.formats import format_of
from qarl.quant.kernels import choose_kernel
from qarl.quant.scheme import KernelKind, QuantScheme

TOKENS = (1, 4, 33, 128)  # batch shapes that take different kernels where kernels depend on shape


@dataclass(frozen=True)
class Parity:
    """`differing` of `total` outputs of `op` differ from the engine's."""

    op: str
    differing: int
    total: int

    @property
    def exact(self) -> bool:
        return self.differing == 0

    def __str__(self) -> str:
        return f"{self.op} {'exact' if self.exact else f'differs in {self.differing} of {self.total} outputs'}"


def processor_note(schemes: Sequence[QuantScheme], device: torch.device) -> str:
    """One sentence where the engine's arithmetic in one of `schemes` is this processor's own; empty elsewhere."""
    saturates = any(format_of(scheme).saturates_without_vnni for scheme in schemes if scheme.quantizes)
    if device.type != "cpu" or processor.has_vnni() or not saturates:
        return ""
    return (
        "no VNNI on this processor: the engine's W8A8 sums saturate; the engine kernel of the learner follows bit for "
        "bit, the policy is trained for this arithmetic, and other machines compute other values"
    )


def check_parity(config: Any, dtype: torch.dtype, scheme: QuantScheme, kernel: KernelKind = "auto") -> list[Parity]:
    """Compare the learner's ops with the engine's on random inputs in the shapes of a Hugging Face `config`.

    The learner's low-bit linear gets a full batch, the engine's one row at a time: values must not depend on the batch.
    Attention is not compared, because the learner calls the engine's op; nor are norms and activations, which both
    sides compute in torch. The probe after a publication covers all of them together.
    """
    generator = torch.Generator().manual_seed(0)
    hidden, inner, vocab = config.hidden_size, config.intermediate_size, min(config.vocab_size, 1024)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    linear: list[tuple[Tensor, Tensor]] = []
    if scheme.quantizes:
        format_, cpu = format_of(scheme), torch.device("cpu")
        ours = choose_kernel(format_, cpu, dtype, kernel)
        theirs = choose_kernel(format_, cpu, dtype)
        for k, n in ((hidden, inner), (inner, hidden)):
            quantized = format_.quantize(random(n, k).to(dtype))
            our_weight, their_weight = ours.prepare(quantized, None), theirs.prepare(quantized, None)
            for m in TOKENS:
                x = (random(m, k) * random(m, 1)).to(dtype)
                rows = [theirs.forward(row, their_weight) for row in x.split(1)]
                linear.append((ours.forward(x, our_weight), torch.cat(rows)))
    head = [_dense(random, m, vocab, k, dtype) for k in (hidden, inner) for m in TOKENS]
    checks = [_compare("head", head), _compare("rope", [_rope(config, dtype, random)])]
    if getattr(config, "num_experts", 0):
        checks += _mixture(config, dtype, scheme, kernel, random)
    return [_compare(f"{scheme.name} linear", linear), *checks] if linear else checks


def _mixture(config: Any, dtype: torch.dtype, scheme: QuantScheme, kernel: KernelKind, random: Any) -> list[Parity]:
    """Router and experts; the experts' values must not depend on the batch. Four experts stand for all."""
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    weights = (random(4, 2 * inner, hidden) * hidden**-0.5, random(4, hidden, inner) * inner**-0.5)
    names = ("gate_up_proj", "down_proj")
    stack = SimpleNamespace(**{name: nn.Parameter(w.to(dtype)) for name, w in zip(names, weights, strict=True)})
    if scheme.covers("model.layers.0.mlp.experts.0.up_proj"):
        ours: Experts = QuantizedExperts(stack, "experts", scheme, kernel)
        theirs: Experts = QuantizedExperts(stack, "experts", scheme, "auto")
    else:
        ours = theirs = Experts(stack, engine=True)
    router: list[tuple[Tensor, Tensor]] = []
    experts: list[tuple[Tensor, Tensor]] = []
    for m in TOKENS:
        x = random(m, hidden).to(dtype)
        router.append(_dense(random, m, config.num_experts, hidden, dtype))
        inputs = (x, random(m, 4).topk(2).indices, random(m, 2).softmax(-1))
        parts = zip(*(t.split(max(1, m // 4)) for t in inputs), strict=True)
        experts.append((ours.mix(*inputs), torch.cat([theirs.mix(*part) for part in parts])))
    return [_compare("router", router), _compare("experts", experts)]


def _dense(random: Any, m: int, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A dense layer on a batch of m rows and row by row, where each exact sum is zero: only its order shows."""
    x_MH, weight_NH, order_K = random(m, k // 2), random(n, k // 2), random(k // 2 * 2).argsort()
    x_MK = torch.cat((x_MH, -x_MH), -1)[:, order_K].to(dtype)
    weight = DenseWeight(torch.cat((weight_NH, weight_NH), -1)[:, order_K].to(dtype))
    return weight(x_MK), torch.cat([weight(row) for row in x_MK.split(1)])


def _rope(config: Any, dtype: torch.dtype, random: Any) -> tuple[Tensor, Tensor]:
    tokens, heads, dim = 64, config.num_attention_heads, head_width(config)
    angles = torch.arange(tokens).float()[:, None] * (1e4 ** (-torch.arange(0, dim, 2).float() / dim))
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    q = random(tokens, heads, dim).to(dtype)
    ours: Tensor = Rotate.apply(q[None], cos[None], sin[None])
    theirs, key = q.reshape(tokens, -1).clone(), q.reshape(tokens, -1).clone()
    engine_ops.rotary_embedding(torch.arange(tokens), theirs, key, dim, torch.cat((cos, sin), -1))
    return ours.reshape(tokens, -1), theirs


def _compare(op: str, pairs: list[tuple[Tensor, Tensor]]) -> Parity:
    return Parity(op, sum(int((a != b).sum()) for a, b in pairs), sum(a.numel() for a, _ in pairs))
