"""Keys of the reward: components, whose weighted sum trains the policy. docs/rewards.md has an example of each kind."""

from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError, ValidationInfo, field_validator

from qarl.config.base import Count, Node, NonNegativeFloat, OneGroup, PathOrEmpty, PositiveInt, Regex, Seconds, Url

Kind = Literal[
    "exact",
    "math",
    "choice",
    "numeric",
    "regex",
    "format",
    "length",
    "overlong",
    "repetition",
    "code",
    "judge",
    "http",
    "reasoning_gym",
    "custom",
]


Tag = Annotated[str, Field(pattern=r"^[A-Za-z_][\w-]*$")]


class NoSettings(Node):
    pass


class ChoiceSettings(Node):
    letters: Annotated[str, Field(pattern="^[A-Z]{2,}$")] = "ABCDEFGHIJ"
    """The letters that an answer may be."""


class NumericSettings(Node):
    absolute: NonNegativeFloat = 0.0
    """Largest distance to the reference."""
    relative: NonNegativeFloat = 0.0
    """Largest distance as a share of the reference; the larger of the two bounds counts."""


class RegexSettings(Node):
    pattern: Regex = Field(default=...)
    """Regular expression; `.` also matches line ends. Required."""
    whole: bool = False
    """Match the whole response, not a part of it."""


class FormatSettings(Node):
    tags: Annotated[list[Tag], Field(min_length=1)] = ["think", "answer"]
    """Tags that the response has, each once, in this order, with nothing but white space around them."""
    opened: bool = False
    """The prompt ends with the first opening tag, so the response begins inside of it."""
    rest: bool = False
    """Other text may follow the last tag."""


class LengthSettings(Node):
    shortest: Count = 0
    """Fewest response tokens of a reward of 1."""
    longest: PositiveInt | None = None
    """Most response tokens of a reward of 1; null for no limit."""

    def contradictions(self) -> Iterator[str]:
        if self.longest is not None and self.longest < self.shortest:
            yield f"longest: {self.longest} is below shortest {self.shortest}"


class OverlongSettings(Node):
    limit: PositiveInt = Field(default=...)
    """Response tokens at which the reward is -1: `${rollout.sampling.max_new_tokens}`. Required."""
    cache: PositiveInt = Field(default=...)
    """Number of tokens before `limit` over which the reward falls from 0. Required."""

    def contradictions(self) -> Iterator[str]:
        if self.cache > self.limit:
            yield f"cache: {self.cache} exceeds limit {self.limit}"


class RepetitionSettings(Node):
    n: PositiveInt = 20
    """Tokens of an n-gram."""


class CodeSettings(Node):
    tests: str = ""
    """Field of the row's metadata with the tests; empty takes the answer. Tests are Python that raises when the program
    is wrong, or a list of {input, output} for standard input and output, also as JSON text."""
    partial: bool = False
    """The share of passed {input, output} tests, not 1 only when all pass."""
    python: PathOrEmpty = ""
    """Interpreter that runs the program; empty for the one of the run."""
    timeout_s: Seconds = 4.0
    """Wall-clock time of one test; the time of the processor is limited to the next whole second."""
    memory_mib: Annotated[int, Field(ge=64, le=2**20)] = 512
    """Address space of the program."""
    file_mib: Count = 1
    """Largest file that it may write, and most of its output."""
    network: bool = False
    """Let it use the network. Without it the host must permit network namespaces (`unshare`)."""


class EndpointSettings(Node):
    timeout_s: Seconds = 30.0
    """For one request."""
    max_retries: Count = 3
    """Further tries of a request that fails, with growing pauses."""
    api_key_env: str = ""
    """Environment variable with the key; empty sends none."""
    concurrency: PositiveInt = 8
    """Requests at once, in each verifier process."""


class JudgeSettings(EndpointSettings):
    base_url: Url = Field(default=...)
    """URL of an OpenAI-compatible endpoint, ending in /v1. Required."""
    model: str = Field(default=...)
    """Its name there. Required."""
    template: str = Field(default=...)
    """The question to the judge; `{prompt}`, `{response}` and `{answer}` are replaced. Required."""
    pattern: OneGroup = r"(?i)score[^\w-]*(-?\d+(?:\.\d+)?)"
    """Regular expression; the one group of its last match in the reply is the score."""
    lowest: float = 0.0
    """Score that makes the reward 0; lower ones count as this one."""
    highest: float = 10.0
    """Score that makes the reward 1; higher ones count as this one."""
    max_tokens: PositiveInt = 1024
    """Longest reply."""
    cache: PathOrEmpty = ""
    """File of replies (SQLite), which later runs and all verifier processes use; empty keeps them in each process."""
    budget: Count = 0
    """Most requests, of all runs with one `cache` file (without a file: of each verifier process); 0 for no limit."""

    def contradictions(self) -> Iterator[str]:
        if self.lowest >= self.highest:
            yield f"lowest: {self.lowest} is not below highest {self.highest}"
        if "{response}" not in self.template:
            yield "template: '{response}' does not occur in it"


class HttpSettings(EndpointSettings):
    url: Url = Field(default=...)
    """Gets a POST with the sample as JSON, answers `{"reward": number}`. Required."""


class CustomSettings(Node):
    function: str = Field(default=...)
    """`module:function` or `path/to/file.py:function`. Required."""
    kwargs: dict[str, Any] = {}
    """Further keyword arguments of the function."""
    scope: Literal["sample", "group", "batch"] = "sample"
    """What one call judges: a response, all responses to one prompt, or a batch."""
    at_once: PositiveInt = 1
    """Most responses of a batch; with `scope: sample`, calls of an async function that run at the same time."""


SETTINGS: dict[Kind, type[Node]] = {kind: NoSettings for kind in get_args(Kind)} | {
    "choice": ChoiceSettings,
    "numeric": NumericSettings,
    "regex": RegexSettings,
    "format": FormatSettings,
    "length": LengthSettings,
    "overlong": OverlongSettings,
    "repetition": RepetitionSettings,
    "code": CodeSettings,
    "judge": JudgeSettings,
    "http": HttpSettings,
    "custom": CustomSettings,
}
"""The settings of each kind."""
PENALTIES = ("overlong", "repetition")
"""Kinds whose reward is at most 0, and so never a success."""
GRADED = ("numeric", "exact", "math", "choice", "regex", "format", "length")
"""Kinds whose reward is 0 or 1."""


class ComponentConfig(Node):
    """One part of the reward."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]*$", max_length=60)] = ""
    """Name in metrics and tables; empty for that of the kind."""
    kind: Kind = Field(default=...)
    """How responses are judged. Required."""
    weight: float = 1.0
    """Factor of its reward in the sum; 0 measures only."""
    settings: dict[str, Any] = Field({}, validate_default=True)
    """Settings of the kind."""
    sources: list[str] = []
    """Judge only rows whose `data_source` is one of these; empty for all rows."""

    @field_validator("settings")
    @classmethod
    def _of_the_kind(cls, settings: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if kind := info.data.get("kind"):
            SETTINGS[kind].model_validate(settings)
        return settings

    @property
    def label(self) -> str:
        return self.name or self.kind

    @property
    def at_once(self) -> int:
        """Most responses that are judged at once; 0 for all responses to one prompt."""
        match self.full_settings():
            case CustomSettings(scope="group"):
                return 0
            case CustomSettings(at_once=size) | EndpointSettings(concurrency=size):
                return size
        return 1

    def full_settings(self) -> Node:
        """The settings with every default."""
        return SETTINGS[self.kind].model_validate(self.settings)


class RewardConfig(Node):
    kind: Kind = "exact"
    """The one component, where `components` is empty. `exact`: the whole completion equals the answer and was not cut
    off. `math`: the last answer is mathematically equal. `reasoning_gym`: the scorer of the generator that made the
    problem. `custom`: `reward.function`. docs/rewards.md has all kinds."""
    function: str | None = None
    """The function of the one custom reward, `(text, finish_reason, answer, **kwargs) -> reward`:
    `module:function` or `path/to/file.py:function`."""
    kwargs: dict[str, Any] = {}
    """Keyword arguments of `reward.function`."""
    components: list[ComponentConfig] = []
    """The parts of the reward, in place of `kind`; the reward is their weighted sum."""
    success: str = ""
    """Name of the component whose reward, in [0, 1], says whether a response is right: the pool, the accuracy and the
    evaluation use it. Empty for the first one that judges the row."""
    num_workers: PositiveInt = 1
    """Verifier processes."""
    timeout_s: Seconds = 5.0
    """A verifier that takes longer for one sample is killed; the sample gets reward 0 and a line is logged."""

    def contradictions(self) -> Iterator[str]:
        if (self.kind == "custom") != (self.function is not None) or (self.kwargs and self.function is None):
            yield "reward.function: `reward.kind: custom` needs it, and no other kind takes it or kwargs"
            return
        if self.components and self.kind != "exact":
            yield "reward.kind: it is one component; leave it out beside reward.components"
        try:
            parts = self.parts()
        except ValidationError:
            yield f"reward.kind: {self.kind} has settings that are required; list it in reward.components"
            return
        counts = Counter(part.label for part in parts)
        if repeated := [name for name, count in counts.items() if count > 1]:
            yield f"reward.components: two have the name '{repeated[0]}'; give each a name of its own"
        if self.success and self.success not in counts:
            yield f"reward.success: no component has the name '{self.success}', but {', '.join(counts)}"
        if not any(part.weight for part in parts):
            yield "reward.components: every weight is 0, so every response has the reward 0"
        yield from self._success_faults(parts)

    def _success_faults(self, parts: list[ComponentConfig]) -> Iterator[str]:
        chosen = next((part for part in parts if part.label == self.success), None)
        if chosen is not None and chosen.sources:
            yield f"reward.success: '{chosen.label}' judges some sources only; name one that judges all rows"
        judges = [chosen] if chosen else [part for i, part in enumerate(parts) if not _shadowed(part, parts[:i])]
        for part in judges:
            if part.kind in PENALTIES:
                yield (
                    f"reward.success: the reward of '{part.label}' is at most 0, so no response would be right; "
                    "name another component"
                )

    def parts(self) -> list[ComponentConfig]:
        """The components; of the short form, the one."""
        if self.components:
            return self.components
        settings = {"function": self.function, "kwargs": self.kwargs} if self.function is not None else {}
        return [ComponentConfig(kind=self.kind, settings=settings)]

    @property
    def kinds(self) -> set[str]:
        return {part.kind for part in self.parts()}

    @property
    def graded(self) -> bool:
        """Whether a reward may be other than the success."""
        parts = self.parts()
        return len(parts) > 1 or parts[0].kind not in GRADED or parts[0].weight != 1.0

    def functions(self) -> Iterator[tuple[str, str, dict[str, Any], str]]:
        """The user's functions: name, key, keyword arguments, scope."""
        for index, part in enumerate(self.parts()):
            if part.kind == "custom":
                key = f"reward.components[{index}].settings.function" if self.components else "reward.function"
                settings = CustomSettings.model_validate(part.settings)
                yield settings.function, key, settings.kwargs, settings.scope


def _shadowed(part: ComponentConfig, before: list[ComponentConfig]) -> bool:
    """Whether every row of `part` has an earlier component, which then decides on its success."""
    known = {source for other in before for source in other.sources}
    return any(not other.sources for other in before) or (bool(part.sources) and set(part.sources) <= known)
