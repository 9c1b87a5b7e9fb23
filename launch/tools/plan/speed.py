"""Seconds: rooflines of decoding, prefill, training and weight transfer. All are estimates; docs/plan.md says how good.

Suffixes: K input features, N output features.
"""

from dataclasses import dataclass

from launch.tools.plan.devices import Device
from launch.tools.plan.memory import Variant
from launch.tools.plan.shapes import Matrix, Shapes
from qarl.quant.scheme import Arithmetic

DIGEST = 2.7e9
"""Bytes/s of a tensor's digest on one x86-64 core, measured."""
HOST_COPY = 6.5e9
"""Bytes/s of one copy in host memory, measured on one core."""
QUANTIZE_BYTES = 40
"""Bytes that quantizing one weight moves: ten passes over float32 values."""
READ_BACK_ROWS = 128
"""`ROWS` in rollout/read_back.py."""
RELOAD = 1.3e-8
"""Seconds per weight on CPU, measured with SmolLM2 in int8: the engine packs every layer, and the read-back again."""
OPTIMIZER_BYTES = 34
"""Bytes that AdamW's step moves per parameter: master and two moments read and written, gradient read (28), the
parameter written, the gradient cleared (6)."""


@dataclass(frozen=True)
class Load:
    """The work of one training step."""

    samples: int
    prompt_tokens: int
    response_tokens: int
    """Mean of the responses."""
    longest: int
    """Tokens of the longest response, for which the others wait."""
    workers: int
    ranks: int
    minibatches: int


def decode_step(variant: Variant, device: Device, batch: float, context: float) -> float:
    """Seconds of one engine step that decodes one token of each of `batch` sequences with `context` tokens cached.

        sum over matrices of roofline(bytes read, 2 N K batch)
            + roofline(batch context kv_bytes, 4 batch context Q layers) + step_s + batch sequence_s

    where roofline is `Device.seconds` and Q the width of all heads.
    """
    shapes = variant.shapes
    seconds = device.step_s + batch * device.sequence_s
    for matrix in shapes.matrices:
        moved = matrix.touched(batch) * variant.copy_bytes(matrix)
        seconds += device.seconds(moved, _flops(matrix, batch), arithmetic_of(variant, matrix))
    attention = 4.0 * batch * context * shapes.heads * shapes.head_dim * shapes.layers
    return seconds + device.seconds(batch * context * shapes.kv_bytes, attention, dense(shapes))


def prefill(variant: Variant, device: Device, prompts: int, tokens: int) -> float:
    """Seconds to prefill `prompts` of `tokens` each: 2 N K per token (the head once a prompt), and causal attention."""
    shapes = variant.shapes
    seconds = 0.0
    for matrix in shapes.matrices:
        count = prompts if matrix.name == shapes.head.name else prompts * tokens
        seconds += device.seconds(0, _flops(matrix, count), arithmetic_of(variant, matrix))
    attention = 2.0 * prompts * tokens**2 * shapes.heads * shapes.head_dim * shapes.layers
    return seconds + device.seconds(0, attention, dense(shapes))


def rollout(variant: Variant, device: Device, load: Load, slots: int) -> float:
    """Seconds in which one engine draws its part of the samples, `slots` sequences at once.

    Full batches first, then the rest in a smaller one. A batch lasts as long as its longest response; the number of
    sequences and the context are those of its mean.
    """
    samples = -(-load.samples // load.workers)
    context = load.prompt_tokens + load.response_tokens / 2
    full, rest = divmod(samples, slots)
    share = load.response_tokens / load.longest
    steps = full * decode_step(variant, device, slots * share, context)
    if rest:
        steps += decode_step(variant, device, rest * share, context)
    return steps * load.longest + prefill(variant, device, samples, load.prompt_tokens)


@dataclass(frozen=True)
class Training:
    """How the learner computes: what its forward runs in, and how often it runs."""

    variant: Variant
    """What is quantized in its forward."""
    arithmetic: Arithmetic
    """Of the quantized matrices' GEMM."""
    rounding_bytes: tuple[int, int] = (0, 0)
    """Bytes that rounding moves per input and per output feature of a token, where no kernel does it on the way."""
    prox: bool = True
    """A forward for pi_prox before the update."""
    checkpointing: bool = False
    cores: int = 1


def learner(training: Training, device: Device, load: Load) -> float:
    """Seconds of a rank's scoring and update.

    forwards (one for pi_prox, one of the update, one more with checkpointing) at each matrix's rate
        + a backward of twice the dense FLOPs + attention (its backward 2.5 times its forward)
        + rounding and optimizer steps at the memory's bandwidth
    """
    variant, shapes = training.variant, training.variant.shapes
    bandwidth = device.bandwidth * device.bandwidth_efficiency
    rates = {name: rate * device.learner_efficiency * training.cores for name, rate in device.rates.items()}
    samples = -(-load.samples // load.ranks)
    length = load.prompt_tokens + load.response_tokens
    forwards = 1 + training.prox + training.checkpointing
    per_x, per_y = training.rounding_bytes
    seconds = 0.0
    for matrix in shapes.matrices:
        tokens = samples * (load.response_tokens if matrix.name == shapes.head.name else length)
        low = variant.format_of(matrix) is not None
        forward = _flops(matrix, tokens) / rates[training.arithmetic if low else dense(shapes)]
        if low:
            forward += tokens * matrix.active * (per_x * matrix.k + per_y * matrix.n) / bandwidth
        seconds += forwards * forward + 2 * _flops(matrix, tokens) / rates[dense(shapes)]
    attention = 2.0 * samples * length**2 * shapes.heads * shapes.head_dim * shapes.layers
    optimizer = load.minibatches * OPTIMIZER_BYTES * shapes.parameters / load.ranks / bandwidth
    return seconds + attention * (forwards + 2.5) / rates[dense(shapes)] + optimizer


def publication(variant: Variant, device: Device) -> float:
    """Seconds of one weight transfer: quantize, copy to the host, digest, object store, check, unpack, load; and of the
    read-back: multiply 128 rows by every matrix, as the engine and as the learner do.

    40 B x quantized weights / bandwidth + S (2 / digest + 2 / copy + 3 / link)        S bytes published
        + 2 sum over matrices of roofline(0, 2 x 128 x weights) + reload x weights     reload on CPU alone
    """
    matrices = variant.shapes.matrices
    weights = sum(m.numel for m in matrices if variant.format_of(m) is not None)
    per_byte = 2 / DIGEST + 2 / HOST_COPY + 3 / device.link
    quantizing = QUANTIZE_BYTES * weights / (device.bandwidth * device.bandwidth_efficiency)
    products = sum(device.seconds(0, 2.0 * READ_BACK_ROWS * m.numel, arithmetic_of(variant, m)) for m in matrices)
    reload = RELOAD * sum(m.numel for m in matrices) if device.kind == "cpu" else 0.0
    return quantizing + variant.published_bytes * per_byte + 2 * products + reload


def dense(shapes: Shapes) -> Arithmetic:
    """What the model's dtype computes in."""
    return "bf16" if shapes.dtype_bytes == 2 else "fp32"


def arithmetic_of(variant: Variant, matrix: Matrix) -> Arithmetic:
    """What the engine computes `matrix` in."""
    format_ = variant.format_of(matrix)
    return dense(variant.shapes) if format_ is None else format_.arithmetic


def _flops(matrix: Matrix, tokens: float) -> float:
    return 2.0 * matrix.n * matrix.k * matrix.active * tokens
