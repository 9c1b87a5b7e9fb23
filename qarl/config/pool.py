"""The keys of the prompt pool. `docs/prompt_pool.md` says what they do together."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from qarl.config.base import Count, Fraction, Node, OneGroup, PositiveFloat, PositiveInt, Seconds, Share, Url

BOXED = r"\\boxed\{((?:[^{}]|\{[^{}]*\})+)\}"
"""What stands in LaTeX's \\boxed{}, with braces nested once."""


class RetireConfig(Node):
    """Prompts that are always or never solved leave the draws, and come back from time to time to be checked."""

    after_visits: Count = 0
    """Times that a prompt must have been drawn and scored before it may retire; 0 never retires."""
    solved_above: Fraction = 1.0
    """A prompt counts as solved when its measured success rate is this or higher."""
    hopeless_below: Fraction = 0.0
    """A prompt counts as hopeless when its measured success rate is this or lower."""
    recheck_after_steps: PositiveInt = 50
    """Steps after which a retired prompt may be drawn again; the result decides whether it stays retired."""

    def contradictions(self) -> Iterator[str]:
        if self.hopeless_below >= self.solved_above:
            yield (
                f"pool.retire.hopeless_below: every success rate is up to {self.hopeless_below:g} or from "
                f"pool.retire.solved_above {self.solved_above:g}, all prompts would retire"
            )


class LineageConfig(Node):
    """Prompts made from others lend each other evidence."""

    refresh_every: Count = 0
    """Steps between two estimates of the parents' success rates from their children; 0 for none."""
    aggregate: Literal["children", "path"] = "children"
    """`children`: every child counts alike. `path`: by the number of its leaf descendants."""
    estimate_strength: PositiveFloat = 2.0
    """Weight of an estimate beside measured trials, as a number of trials."""


class ArchiveConfig(Node):
    """Evicted prompts are remembered and may come back."""

    capacity: Count = 0
    """How many of the latest evicted prompts are remembered; 0 for none."""
    reinsert_per_step: Count = 0
    """Archived prompts considered per step, longest archived first."""
    rest_steps: PositiveInt = 50
    """Steps in the archive before a prompt is considered."""


class ProgramCheckConfig(Node):
    """The task's own program knows the answer; the sorting task has one."""

    kind: Literal["program"] = "program"


class VoteConfig(Node):
    """Self-consistency: the policy answers the new problem several times; the answer most often given counts."""

    kind: Literal["vote"] = "vote"
    num_samples: PositiveInt = 8
    """Answers of the policy, sampled with the next step's rollouts."""
    threshold: Share = 0.5
    """Share of these answers that must agree."""
    answer_pattern: OneGroup = BOXED
    """Regular expression whose one group is the answer; its last match in a reply counts."""


class TeacherConfig(Node):
    """Another model answers, over an OpenAI-compatible endpoint, while training goes on."""

    kind: Literal["teacher"] = "teacher"
    base_url: Url = Field(default=...)
    """Address of the endpoint, with the version: `http://host:8000/v1`. Required."""
    model: Annotated[str, Field(min_length=1)] = Field(default=...)
    """Name of the model there. Required."""
    api_key_env: str = ""
    """Environment variable that holds the key; empty for none."""
    prompt: str = (
        "Solve the problem and put the final answer in \\boxed{}. If it has no single answer, do not write a box."
        "\n\n{question}"
    )
    """Text of the request to the teacher; `{question}` is replaced."""
    answer_pattern: OneGroup = BOXED
    """Regular expression whose one group is the answer; its last match counts, and none refuses the problem."""
    max_tokens: PositiveInt = 2048
    """Longest reply."""
    timeout_s: Seconds = 60.0
    """Longest silence of a connection."""
    max_retries: Count = 3
    """Further tries after a time-out, a lost connection, status 408, 429 or 5xx; pauses grow from 1 s to 60 s."""
    concurrency: PositiveInt = 4
    """Requests at once."""

    def contradictions(self) -> Iterator[str]:
        if "{question}" not in self.prompt:
            yield "pool.augment.validator.prompt: {question} does not occur in it"


class AugmentConfig(Node):
    """New problems that the policy makes from prompts at the frontier; after HeaPA."""

    per_step: Count = 0
    """New problems requested from the policy in each step, each from a different prompt of the draw; 0 for none."""
    reach: Fraction = 0.25
    """A parent has been drawn and scored, and its success rate differs from `pool.target` by at most this."""
    template: str = (
        "Here is a problem:\n\n{question}\n\nWrite one new problem that is about as hard, with other numbers and "
        "another story. Put it between <problem> and </problem> and do not solve it."
    )
    """Text of the request to the policy. `{question}` and `{answer}` are the parent's, `{beginning}` is the first half
    of its question. When the template ends with `{beginning}`, the policy continues it; `pattern` reads both."""
    pattern: OneGroup = r"<problem>(.+?)</problem>"
    """Regular expression whose one group is the new question; it must match the reply exactly once."""
    ngram: PositiveInt = 8
    """Words of the n-grams by which two questions are compared; shorter questions are compared whole."""
    max_overlap: Share = 0.8
    """A question is refused as a copy of a known one when they have this share of the shorter's n-grams in common."""
    max_heldout_overlap: Share = 0.5
    """The same bound for held-out questions: a question that is this near to one of them is refused."""
    max_pending: PositiveInt = 64
    """Most problems that may wait for the validator; while so many wait, no new ones are requested."""
    budget: Count = 0
    """Most problems that the validator gets in the whole run; 0 for no bound."""
    validator: Annotated[ProgramCheckConfig | VoteConfig | TeacherConfig, Field(discriminator="kind")] = (
        ProgramCheckConfig()
    )
    """Who finds a new problem's answer, or refuses it."""

    def contradictions(self) -> Iterator[str]:
        if not any(name in self.template for name in ("{question}", "{beginning}")):
            yield "pool.augment.template: neither {question} nor {beginning} occurs in it"


class PoolConfig(Node):
    strategy: Literal["frontier", "uniform", "median", "prioritised", "easy_to_hard"] = "frontier"
    """`frontier`: prompts whose success rate is nearest to `target`. `uniform`: every prompt alike. `median`: nearest
    to the median of the last rewards, as HeaPA published. `prioritised`: at random, more often the nearer to `target`.
    `easy_to_hard`: passes over the data, each by level and then by success rate."""
    target: Fraction = 0.5
    """Target success rate: prompts near it are drawn."""
    exploration: Fraction = 0.25
    """Fraction of each draw that is kept for unseen and stale prompts."""
    cooldown_steps: Count = 2
    """Steps that an observed prompt rests before it may be drawn again."""
    decay: Fraction = 0.7
    """Each time a prompt is drawn again, the weight of its earlier trials is multiplied by this."""
    prior_strength: PositiveFloat = 2.0
    """Strength of the Beta prior on a success rate, as a number of trials; its mean is `target`."""
    stale_after_steps: PositiveInt = 20
    """A prompt that was not drawn for this many steps counts as stale."""
    reach: Fraction = 1.0
    """`frontier`: seen prompts further than this from `target` are drawn only when no unseen ones are left. Helps the
    start of a run, when the nearest seen prompts are still far away."""
    priority_exponent: Annotated[float, Field(ge=0.0, le=8.0)] = 1.0
    """`prioritised`: a prompt's weight is its nearness to `target` (1 at the target, 0 at the far end) raised to this
    power; 0 is uniform."""
    capacity: PositiveInt | None = None
    """Most prompts in the pool, those being sampled included. A new prompt beyond it evicts the one whose success rate
    is furthest from `target`. null: no bound."""
    retire: RetireConfig = RetireConfig()
    """Solved and hopeless prompts."""
    lineage: LineageConfig = LineageConfig()
    """Prompts made from others."""
    archive: ArchiveConfig = ArchiveConfig()
    """Evicted prompts."""
    augment: AugmentConfig = AugmentConfig()
    """New problems from the policy."""

    def contradictions(self) -> Iterator[str]:
        retire = self.retire
        if self.archive.capacity and self.capacity is None:
            yield "pool.archive.capacity: nothing is ever evicted without pool.capacity; set both"
        if self.archive.reinsert_per_step and not self.archive.capacity:
            yield "pool.archive.reinsert_per_step: nothing is archived without pool.archive.capacity; set both"
        if retire.after_visits and not retire.hopeless_below <= self.target <= retire.solved_above:
            yield (
                f"pool.retire: prompts at pool.target {self.target:g} would retire: it lies outside of "
                f"hopeless_below {retire.hopeless_below:g} and solved_above {retire.solved_above:g}"
            )
