"""The configuration: one typed, strict tree. The files of this folder are the reference of every key.

A config file is YAML; `inherits: other.yaml` (relative to the file) or `inherits: quickstart` (a shipped config) takes
the values of that config first. Overrides `a.b=c` come last. Unknown keys are errors that name the nearest known one.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from qarl.config.base import (
    NAME_PATTERN,
    Count,
    Fraction,
    Node,
    NonNegativeFloat,
    PathText,
    PositiveFloat,
    PositiveInt,
    Seconds,
)
from qarl.config.environment import EnvironmentConfig
from qarl.config.error_tokens import ErrorTokensConfig
from qarl.config.objective import ObjectiveConfig, TBPOConfig
from qarl.config.policy import PROBE_PROMPTS, LearnerConfig, ModelConfig, RolloutConfig
from qarl.config.pool import PoolConfig
from qarl.config.reward import RewardConfig
from qarl.config.task import TaskConfig
from qarl.quant.scheme import TRAITS


class RunConfig(Node):
    name: Annotated[str, Field(pattern=NAME_PATTERN, max_length=200)] = "run"
    """Name of the run, a plain folder name; its files lie in `dir`/`name`."""
    dir: PathText = "runs"
    """Folder of all runs, relative to the working directory."""
    resume: bool = True
    """Continue from the last checkpoint of the same name; false starts over. The old run's
    files are kept until the new one has ended well."""

    @property
    def folder(self) -> Path:
        """Where the files of the run lie."""
        return Path(self.dir) / self.name


class AdvantageConfig(Node):
    estimator: Literal["group", "leave_one_out", "group_batch", "batch"] = "group"
    """What a reward is compared with: `group` the mean of its group (GRPO); `leave_one_out` the mean of the others of
    its group (RLOO); `group_batch` its group's mean, scaled over the batch (REINFORCE++-baseline); `batch` the mean of
    all responses of the step (REINFORCE++)."""
    normalize_by_std: bool = True
    """Divide by the standard deviation: of the group, or of the batch for the two batch estimators."""
    drop_zero_variance: bool = True
    """Leave groups whose rewards are all equal out of the update. Their advantage is zero, except with
    `estimator: batch`, which requires false."""


class TrainConfig(Node):
    steps: PositiveInt = 100
    """Training steps: sample, reward, update, publish."""
    prompts_per_step: PositiveInt = 32
    """Prompts drawn per step."""
    group_size: PositiveInt = 8
    """Responses per prompt."""
    allocation: Literal["equal", "frontier"] = "equal"
    """How a step's responses, `group_size` times its prompts, are distributed. `equal`: every prompt gets `group_size`.
    `frontier`: the less certain a prompt's rewards are, the more it gets, from half to twice `group_size`."""
    dynamic_sampling: Count = 0
    """DAPO's dynamic sampling: other prompts replace groups of equal rewards, in at most this many further draws a
    step; 0 for none."""
    max_staleness: Count = 0
    """How many versions older than the learner's weights a sample may be. 0: sample and learn in turn. 1: one step off,
    the next step's groups are sampled while this one's are learned. More: sampling runs further ahead, and engines get
    weights less often (docs/architecture.md)."""
    checkpoint_every: PositiveInt = 20
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints that are kept."""

    @property
    def largest_group(self) -> int:
        """Responses to one prompt, at most."""
        return self.group_size * (2 if self.allocation == "frontier" else 1)

    @property
    def steps_ahead(self) -> int:
        """Steps whose groups may be sampled while an earlier one is learned."""
        return (self.max_staleness + 1) // 2

    @property
    def publish_every(self) -> int:
        """Steps between publications: a group that is drawn just before one, and taken `steps_ahead` steps later, is
        `max_staleness` versions old."""
        return self.max_staleness + 1 - self.steps_ahead


class EvalConfig(Node):
    every: PositiveInt = 12
    """Steps between evaluations. There is always one before and one after training."""
    num_prompts: PositiveInt = 256
    """Held-out prompts of an evaluation during training, evenly from all levels."""
    num_samples: PositiveInt = 4
    """k of avg@k and pass@k, at temperature 1."""
    greedy: bool = True
    """Also sample one greedy response to each prompt."""
    final_num_prompts: PositiveInt = 512
    """Held-out prompts of the evaluations before and after training."""


class MismatchConfig(Node):
    token_bounds: list[PositiveFloat] = [0.001, 0.01, 0.1]
    """Log the share of tokens whose |d log p| exceeds each of these."""
    warn_above: NonNegativeFloat | None = None
    """Print a line when max |d log p| between learner and sampler rises above this; null never warns."""
    stop_above: NonNegativeFloat | None = None
    """Stop the run when max |d log p| between learner and sampler exceeds this in a step; null never stops."""
    proof_steps: PositiveInt = 3
    """Steps in a row of max |d log p| == 0 after which `learner.prox: auto` takes the sampler's log-probs."""
    proof_every: PositiveInt = 10
    """After the proof, the learner still scores all samples in every N-th step, to check it again; N is this number."""
    stale_share: Fraction = 0.0
    """With `train.max_staleness`: share of a step's stale responses that the learner also scores with the weights that
    sampled them, for `mismatch/*`. It keeps a copy of each version in the host's memory for this."""
    unaligned_every: Count = 0
    """Also score samples with the plain unaligned model every N steps, for comparison; 0 for never."""
    unaligned_sequences: PositiveInt = 64
    """In such a step this many samples, drawn at random, are scored without alignment."""
    probe_bound: PositiveFloat = 1.0
    """Largest |d log p| (nats) on the probe prompts after a publication, where exact numerics are not promised; above
    it the run stops. Wrong or stale weights show several nats; unaligned numerics stay below about 0.5."""


TRACKERS = ("jsonl", "wandb", "tensorboard")
"""The trackers that need no function of the user's."""


def _wandb_project(name: str) -> str:
    if not 0 < len(name) <= 128 or set(name) & set("/\\#?%:"):
        raise ValueError("W&B wants 1 to 128 characters, and none of / \\ # ? % :")
    return name


class TrackingConfig(Node):
    trackers: list[str] = ["jsonl", "wandb"]
    """Where metrics go: `jsonl` (files of the run folder, which the report reads), `wandb`, `tensorboard` (needs the
    package of that name), or a tracker of your own: the function that makes it, `(config, run_dir) -> Tracker`, as
    `module:function` or `path/to/file.py:function`."""
    wandb_mode: Literal["offline", "online", "disabled"] = "offline"
    """W&B mode; offline needs no login."""
    wandb_project: Annotated[str, AfterValidator(_wandb_project)] = "qarl"
    """W&B project."""
    wandb_group: str | None = None
    """W&B group: runs that are shown as one."""
    upload_models: bool = False
    """Upload the models that the run exports to W&B; false records only where they lie."""
    table_every: PositiveInt = 18
    """Steps between sample tables."""
    table_rows: PositiveInt = 32
    """Most responses that a step adds to the sample table."""
    table_max_rows: PositiveInt = 4000
    """Most rows of all tables of a run; a line says when no more are kept."""
    alert_reward_drop: Annotated[float, Field(gt=0, lt=1)] | None = 0.5
    """Alert when the mean reward of 8 steps has lost this share of its highest value above 0; null never does."""
    progress: bool = True
    """A live view of the run where the output is a terminal."""

    def contradictions(self) -> Iterator[str]:
        if "jsonl" not in self.trackers:
            yield "tracking.trackers: add `jsonl`, whose files the report reads"
        if twice := {name for name in self.trackers if self.trackers.count(name) > 1}:
            yield f"tracking.trackers: {', '.join(sorted(twice))} is named twice"


class ControlsConfig(Node):
    """Controls in the report, for tasks with a teacher."""

    teacher: bool = False
    """The teacher's own exact-match rate on held-out prompts."""
    sft_continued: bool = False
    """Continue the warm start, from its end, for as many seconds as RL took, and evaluate that."""


class ClusterConfig(Node):
    address: str | None = None
    """Ray address to join ("auto" or host:port); null starts a local Ray in this process's session."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where engines and learner compute; `auto` takes CUDA when Ray has a GPU; with a local Ray, when torch has one."""
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Ray placement of the actors over nodes."""
    placement_timeout_s: Seconds = 120.0
    """How long to wait for the placement group."""
    colocate: bool = False
    """One engine and one learner rank share one GPU; otherwise each takes a GPU of its own. On CPU all share the cores
    anyway, and nothing changes."""
    sleep: bool = True
    """With `colocate` on GPU: the engine gives its GPU memory back while the learner works. Its weights wait in the
    host's memory, its keys and values are dropped. Without effect on CPU, and with `train.max_staleness` above 0,
    where the engine samples while the learner works; the run says which it is. False: the engine keeps its memory."""


class DebugConfig(Node):
    rollout_only: bool = False
    """Sample, score and measure as usual, but do not update: the weights stay as they were at the start."""
    save_batches: bool = False
    """Save what the learner gets in each step, as runs/NAME/batches/step-N.npz (arrays, no pickle)."""
    train_from: PathText | None = None
    """Folder of saved batches: train on them without an engine. The weights become bit for bit those of the run that
    saved them. Change model, learner or objective to compare what these make of the same data."""
    profile_steps: Annotated[list[PositiveInt], Field(min_length=2, max_length=2)] | None = None
    """[first, last] step that torch's profiler traces in rank 0 and worker 0: runs/NAME/profile/*.json, for
    ui.perfetto.dev. Two steps suffice: traces are large."""

    def contradictions(self) -> Iterator[str]:
        if self.train_from and (self.rollout_only or self.save_batches):
            yield "debug.train_from: it samples nothing; leave rollout_only and save_batches false"
        if self.profile_steps and self.profile_steps[0] > self.profile_steps[1]:
            yield f"debug.profile_steps: {self.profile_steps} ends before it begins"


class Config(Node):
    """Everything about one run."""

    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0
    """The one seed: data, sampling, model, pool."""
    run: RunConfig = RunConfig()
    """Where the run's files go."""
    model: ModelConfig = Field(default=...)
    """The policy. Required."""
    task: TaskConfig = Field(default=...)
    """The problems. Required."""
    reward: RewardConfig = RewardConfig()
    """How responses are judged."""
    environment: EnvironmentConfig = EnvironmentConfig()
    """What answers the policy between its turns."""
    rollout: RolloutConfig = RolloutConfig()
    """Sampling workers."""
    learner: LearnerConfig = LearnerConfig()
    """Training."""
    objective: ObjectiveConfig = TBPOConfig()
    """What is optimized."""
    advantage: AdvantageConfig = AdvantageConfig()
    """From rewards to advantages."""
    pool: PoolConfig = PoolConfig()
    """Prompt pool."""
    train: TrainConfig = TrainConfig()
    """The loop."""
    eval: EvalConfig = EvalConfig()
    """Held-out evaluation."""
    error_tokens: ErrorTokensConfig = ErrorTokensConfig()
    """Repetitive and garbled tokens in responses."""
    mismatch: MismatchConfig = MismatchConfig()
    """Sampler-learner agreement."""
    tracking: TrackingConfig = TrackingConfig()
    """Logs."""
    controls: ControlsConfig = ControlsConfig()
    """Controls in the final report."""
    cluster: ClusterConfig = ClusterConfig()
    """Ray."""
    debug: DebugConfig = DebugConfig()
    """Switches for debugging."""

    def contradictions(self) -> Iterator[str]:
        train, rollout, learner, advantage = self.train, self.rollout, self.learner, self.advantage
        most_tokens = rollout.sampling.max_new_tokens
        if self.debug.train_from and Path(self.debug.train_from).parent == self.run.folder:
            yield "debug.train_from: the run that has saved them keeps its folder; choose another run.name"
        if (profiled := self.debug.profile_steps) and profiled[0] > train.steps:
            yield f"debug.profile_steps: {profiled} begins after train.steps {train.steps}"
        if learner.zero_stage == 0 and self.model.dtype == "bfloat16":
            yield "learner.zero_stage: DeepSpeed refuses stage 0 in bfloat16 with float32 gradients; set it to 1"
        if train.group_size < 2:
            yield "train.group_size: 1 gives every response the advantage 0, that of its group's mean; use 2 or more"
        for key, value in self.objective.advantage.items():
            if (found := getattr(advantage, key)) != value:
                yield (
                    f"objective.kind: {self.objective.kind} is defined with advantage.{key}={str(value).lower()}, "
                    f"not {str(found).lower()}"
                )
        if advantage.estimator == "batch" and advantage.drop_zero_variance:
            yield (
                "advantage.drop_zero_variance: with `advantage.estimator: batch` a group of equal rewards has an "
                "advantage; set it to false"
            )
        if train.dynamic_sampling and not advantage.drop_zero_variance:
            yield "train.dynamic_sampling: it replaces dropped groups, and advantage.drop_zero_variance is false"
        if learner.minibatches > train.prompts_per_step:
            yield (
                f"learner.minibatches: {learner.minibatches} minibatches of whole groups need at least as many "
                f"prompts, train.prompts_per_step is {train.prompts_per_step}"
            )
        if learner.max_tokens_per_micro_batch < rollout.max_model_len:
            yield (
                f"learner.max_tokens_per_micro_batch: {learner.max_tokens_per_micro_batch} may not hold one "
                f"sequence, rollout.max_model_len is {rollout.max_model_len}"
            )
        if rollout.sampling.ignore_eos and (self.environment.kind != "none" or self.pool.augment.per_step):
            yield (
                "rollout.sampling.ignore_eos: every response is cut off, which ends a conversation and makes a new "
                "problem void; set it to false"
            )
        if most_tokens >= rollout.max_model_len:
            yield (
                f"rollout.sampling.max_new_tokens: {most_tokens} leaves no room for a prompt "
                f"in rollout.max_model_len {rollout.max_model_len}"
            )
        for scheme in (rollout.scheme, *(stage.scheme for stage in rollout.schedule)):
            if rollout.batch_invariant and not TRAITS[scheme].batch_invariant:
                yield (
                    f"rollout.batch_invariant: vLLM's mode does not reach its {scheme} kernels, whose sums depend on "
                    "the batch; use w8a8_int8 or none as rollout.scheme"
                )
        if rollout.max_num_seqs > max(rollout.max_num_batched_tokens, rollout.max_model_len):
            yield (
                f"rollout.max_num_seqs: {rollout.max_num_seqs} sequences need a token each in a step, "
                f"rollout.max_num_batched_tokens is {rollout.max_num_batched_tokens}"
            )
        yield from self._task_contradictions()
        yield from self._staleness_contradictions()
        yield from self._environment_contradictions()

    def _staleness_contradictions(self) -> Iterator[str]:
        train, rollout = self.train, self.rollout
        if rollout.stragglers.kind == "keep" and not train.max_staleness:
            yield "rollout.stragglers.kind: a group that is kept becomes stale; set train.max_staleness, or return it"
        if rollout.partial:
            yield from self._partial_contradictions()
        if self.mismatch.stale_share and (not train.max_staleness or self.learner.zero_stage == 3):
            yield "mismatch.stale_share: needs train.max_staleness, and a learner.zero_stage below 3; or set it to 0"
        if train.max_staleness and rollout.transport != "object_store":
            yield "rollout.transport: works in turn with learning only; use object_store, or train.max_staleness 0"

    def _partial_contradictions(self) -> Iterator[str]:
        if self.rollout.max_num_seqs <= PROBE_PROMPTS:
            yield (
                f"rollout.max_num_seqs: with rollout.partial {PROBE_PROMPTS} are kept for the prompts that check a "
                f"publication, and {self.rollout.max_num_seqs} leaves none to sample with"
            )
        if not self.train.max_staleness:
            yield "rollout.partial: a response of two versions is stale; set train.max_staleness to 1 or more"

    def _environment_contradictions(self) -> Iterator[str]:
        # A turn is computed with all before it, in the engine and in the learner, and so is what one version sampled.
        has_turns = self.environment.kind != "none"
        rows = self.environment.max_turns if has_turns else 1
        rows += self.train.max_staleness if self.rollout.partial else 0
        tokens = rows * self.rollout.max_model_len
        if rows > 1 and self.learner.max_tokens_per_micro_batch < tokens:
            yield (
                f"learner.max_tokens_per_micro_batch: {self.learner.max_tokens_per_micro_batch} may not hold one "
                f"response; (environment.max_turns, plus train.max_staleness if rollout.partial) x "
                f"rollout.max_model_len is {tokens}"
            )
        if not has_turns:
            return
        if self.pool.augment.per_step:
            yield "pool.augment.per_step: the policy writes no problems for an environment; set it to 0"
        if self.reward.components:
            yield "reward.components: the environment gives the reward; leave them out"

    def _task_contradictions(self) -> Iterator[str]:
        augment, generated = self.pool.augment, self.task.kind == "reasoning_gym"
        if generated != ("reasoning_gym" in self.reward.kinds):
            yield "reward.kind: reasoning_gym belongs to task.kind reasoning_gym, and no other kind does"
        if generated and augment.per_step:
            yield "pool.augment.per_step: reasoning_gym scores only its own problems; set it to 0"
