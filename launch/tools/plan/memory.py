"""Bytes: what a learner rank and an engine hold. Formulas and the measurements behind them: docs/plan.md.

R ranks, P parameters, b bytes of the model's dtype.
"""

from dataclasses import dataclass

from launch.tools.plan.shapes import Matrix, Shapes
from qarl.numerics.engine_limits import sequences_in_cache
from qarl.quant.format import Format

BUCKET = 500_000_000
"""Elements of DeepSpeed's gradient bucket (`reduce_bucket_size`), allocated in full however small the model."""
LIVE = 1_000_000_000
"""Parameters that ZeRO-3 keeps gathered at most (`stage3_max_live_parameters`)."""


@dataclass(frozen=True)
class Variant:
    """A model in one format: `format_` for the matrices named in `quantized`, the model's dtype for all else."""

    shapes: Shapes
    format_: Format | None = None
    quantized: frozenset[str] = frozenset()

    def format_of(self, matrix: Matrix) -> Format | None:
        return self.format_ if matrix.name in self.quantized else None

    def copy_bytes(self, matrix: Matrix) -> int:
        """Bytes of one copy of `matrix` in the engine's memory."""
        format_, b = self.format_of(matrix), self.shapes.dtype_bytes
        return matrix.n * matrix.k * b if format_ is None else format_.engine_bytes(matrix.n, matrix.k, b)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the published tensors of all quantized matrices."""
        b = self.shapes.dtype_bytes
        formats = ((m, self.format_of(m)) for m in self.shapes.matrices)
        return sum(m.copies * format_.published_bytes(m.n, m.k, b) for m, format_ in formats if format_ is not None)

    @property
    def published_bytes(self) -> int:
        """Bytes of one publication: quantized matrices packed, all else in the model's dtype, a tied head apart."""
        plain = sum(m.numel for m in self.shapes.matrices if self.format_of(m) is None)
        return self.packed_bytes + (plain + self.shapes.others) * self.shapes.dtype_bytes

    @property
    def engine_weights(self) -> int:
        """Bytes of the engine's weights; a tied head is the embedding."""
        shapes = self.shapes
        twice = shapes.head.numel if shapes.tied and shapes.head.name not in self.quantized else 0
        held = sum(m.copies * self.copy_bytes(m) for m in shapes.matrices)
        return held + (shapes.others - twice) * shapes.dtype_bytes


@dataclass(frozen=True)
class LearnerMemory:
    """Bytes of one rank. The peak is either in the backward pass or in the optimizer's step."""

    weights: int
    masters: int
    gradients: int
    optimizer: int
    quantized: int
    """Published tensors of every quantized layer, and the layouts that GEMMs read; complete on each rank."""
    stock_policy: int
    """A second model: for `mismatch.unaligned_every`, or to quantize what an unaligned learner publishes."""
    bucket: int
    gathered: int
    """ZeRO-3: parameters gathered for use."""
    activations: int
    logits: int
    """Of a chunk of response tokens, with the gradient of the head's weight."""
    step: int
    """Temporaries of the optimizer's step."""

    @property
    def held(self) -> int:
        """Between two updates, too."""
        return self.weights + self.masters + self.gradients + self.optimizer + self.quantized + self.stock_policy

    @property
    def peak(self) -> int:
        return self.held + max(self.bucket + self.gathered + self.activations + self.logits, self.step)


def quantized_bytes(variant: Variant, prepared_bits: int) -> int:
    """What the learner holds of quantized layers besides their weights: the published tensors and the GEMM's layout."""
    weights = sum(m.numel for m in variant.shapes.matrices if variant.format_of(m) is not None)
    return variant.packed_bytes + weights * prepared_bits // 8


def dense_copies(variant: Variant, weight_bytes: int, engine: bool = False) -> int:
    """What dense layers, but no experts, hold on CPU besides their weights: the layout that the GEMM reads.

    An engine keeps the original of its head only. `weight_bytes` of the copy: those of the dtype, or of float32.
    """
    dense = [m for m in variant.shapes.matrices if m.copies == 1 and variant.format_of(m) is None]
    copies = sum(m.numel * weight_bytes for m in dense)
    dropped = sum(m.numel for m in dense if m != variant.shapes.head) if engine else 0
    return copies - dropped * variant.shapes.dtype_bytes


def learner_memory(
    shapes: Shapes,
    zero_stage: int,
    ranks: int,
    quantized: int,
    stock_policy: int,
    activations: int,
    logits: int,
    foreach: bool,
) -> LearnerMemory:
    """Bytes of one rank under DeepSpeed 0.19 with AdamW and float32 gradient accumulation.

    | dtype    | stage | weights | masters | Adam | gradients |
    |----------|-------|---------|---------|------|-----------|
    | bfloat16 | 1     | 2P      | 4P/R    | 8P/R | 4P + 2P   |
    | bfloat16 | 2     | 2P      | 4P/R    | 8P/R | 4P/R      |
    | bfloat16 | 3     | 2P/R    | 4P/R    | 8P/R | 4P/R      |
    | float32  | 0     | 4P      | -       | 8P   | 4P        |
    | float32  | 1     | 4P      | 4P/R    | 8P/R | 4P        |
    | float32  | 2     | 4P      | 4P/R    | 8P/R | 4P/R      |
    | float32  | 3     | 4P/R    | 4P/R    | 8P/R | 4P/R      |

    and a bucket of 5e8 b but in stage 0 and in bfloat16's stage 1. `quantized`, `stock_policy`, `activations` and
    `logits` are bytes too. `foreach`: torch's AdamW takes as much again as the masters while it steps (so on CUDA).
    """
    p, b = shapes.parameters, shapes.dtype_bytes
    per_rank = -(-p // ranks)
    full_gradients = 4 * p + (2 * p if b == 2 else 0)
    plain = zero_stage == 0
    return LearnerMemory(
        weights=b * (per_rank if zero_stage == 3 else p),
        masters=0 if plain else 4 * per_rank,
        gradients=full_gradients if zero_stage < 2 else 4 * per_rank,
        optimizer=8 * (p if plain else per_rank),
        quantized=quantized,
        stock_policy=stock_policy,
        bucket=0 if plain or (zero_stage == 1 and b == 2) else BUCKET * b,
        gathered=min(p, LIVE) * b if zero_stage == 3 else 0,
        activations=activations,
        logits=logits,
        step=4 * per_rank if foreach else 0,
    )


def activation_bytes(shapes: Shapes, tokens: int, portable: bool, checkpointing: bool) -> int:
    """What autograd keeps of `tokens` between the layers' forward and backward. Per token and layer:

        bfloat16    16 E + 8 I  + 4 A (portable: 18 Q) + 6 A with head norms + 4 X E      Q heads x head width
        float32     24 E + 16 I + 8 A (portable: 20 Q) + 8 A with head norms + 8 X E      A (heads + KV heads) x width

    E width, I MLP features of one token, X experts of one token. With checkpointing: a layer's input, 4 E, and all of
    one layer at a time. Counted op by op; the tests compare it with what autograd saves of small models.
    """
    half = shapes.dtype_bytes == 2
    e, q = shapes.hidden, shapes.heads * shapes.head_dim
    a = q + shapes.kv_heads * shapes.head_dim
    attention = (18 if half else 20) * q if portable else (4 if half else 8) * a
    norms = (6 if half else 8) * a if shapes.head_norms else 0
    experts = (4 if half else 8) * shapes.active_experts * e
    layer = (16 if half else 24) * e + (8 if half else 16) * shapes.intermediate + attention + norms + experts
    return tokens * (4 * e * shapes.layers + layer if checkpointing else layer * shapes.layers)


def logits_bytes(shapes: Shapes, response_tokens: int, rows: int) -> int:
    """What the head's backward holds: of `rows` response tokens at a time log-probabilities and two gradients in
    float32, and its weight's gradient, which several such chunks add up in float32 and round at the end.
    """
    head, b = shapes.head, shapes.dtype_bytes
    if response_tokens <= rows:
        return 12 * head.n * response_tokens + b * head.numel
    return 4 * head.numel + max(12 * head.n * rows, b * head.numel if b < 4 else 0)


@dataclass(frozen=True)
class EngineMemory:
    """Bytes of one engine, and what its KV cache holds."""

    weights: int
    working: int
    kv_cache: int
    kv_per_token: int
    block: int
    """Tokens of a block."""

    @property
    def tokens(self) -> int:
        """Tokens that the KV cache holds, in whole blocks."""
        return max(0, self.kv_cache // (self.kv_per_token * self.block)) * self.block

    def sequences(self, length: int) -> int:
        """Sequences of `length` tokens that the KV cache holds."""
        return sequences_in_cache(self.tokens // self.block, self.block, length)


def working_bytes(shapes: Shapes, batched_tokens: int, sequences: int) -> int:
    """An engine's activations: the widest layer of one step, and float32 logits thrice for its sampler.

    batched tokens x (3 I + 4 E) b + sequences x vocabulary x 12
    """
    widest = 3 * shapes.intermediate + 4 * shapes.hidden
    return batched_tokens * widest * shapes.dtype_bytes + sequences * shapes.head.n * 12
