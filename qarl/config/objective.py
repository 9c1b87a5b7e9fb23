"""One config class for each objective and each mismatch correction. Imports no torch; `qarl/objectives/registry.py`
maps each class to its function.

A new built-in objective is one class here, in the union below, and one file with its equation. An objective of your
own needs neither: see `CustomConfig`.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from qarl.config.base import Fraction, Node, NonNegativeFloat, PositiveFloat, PositiveInt

Aggregation = Literal["sequence_mean", "token_mean"]


class NoCorrection(Node):
    """Every weight is 1."""

    kind: Literal["none"] = "none"


class _TokenCap(Node):
    cap: Annotated[float, Field(ge=1.0)] = 2.0
    """Largest weight."""


class TokenTIS(_TokenCap):
    """Truncated importance sampling: `min(w_t, cap)`."""

    kind: Literal["token_tis"] = "token_tis"


class AdaptiveClip(_TokenCap):
    """Adaptive clipping range (QuRL): token TIS, and where a weight is truncated, the clip's upper bound is raised by
    the same factor."""

    kind: Literal["adaptive_clip"] = "adaptive_clip"


class SequenceTIS(Node):
    """Truncated importance sampling on the length-normalised sequence weight: `min(w_seq, cap)`."""

    kind: Literal["sequence_tis"] = "sequence_tis"
    cap: PositiveFloat = 2.0
    """Largest weight."""


class _Band(Node):
    low: NonNegativeFloat = 0.5
    """Smallest weight that is kept."""
    high: PositiveFloat = 2.0
    """Largest weight that is kept."""

    def contradictions(self) -> Iterator[str]:
        if not self.low <= 1 <= self.high:
            yield f"objective.correction: the band {self.low:g} to {self.high:g} does not hold 1"


class TokenMask(_Band):
    """IcePop: `w_t` inside the band, 0 outside."""

    kind: Literal["token_mask"] = "token_mask"
    high: PositiveFloat = 5.0
    """Largest weight that is kept. The default of the two sequence corrections is 2."""


class SequenceMask(_Band):
    """MIS: `w_seq` inside the band, 0 outside."""

    kind: Literal["sequence_mask"] = "sequence_mask"


class SequenceReject(_Band):
    """Sequence rejection: 1 when `w_seq` is inside the band, 0 outside."""

    kind: Literal["sequence_reject"] = "sequence_reject"


CorrectionConfig = Annotated[
    NoCorrection | TokenTIS | SequenceTIS | TokenMask | SequenceMask | SequenceReject, Field(discriminator="kind")
]
TokenClipCorrectionConfig = Annotated[
    NoCorrection | TokenTIS | AdaptiveClip | SequenceTIS | TokenMask | SequenceMask | SequenceReject,
    Field(discriminator="kind"),
]


class _Objective(Node):
    advantage: ClassVar[Mapping[str, object]] = MappingProxyType({})
    """Values of the `advantage` section that the objective's definition requires."""
    kl_coef: NonNegativeFloat = 0.0
    """Coefficient of the penalty on KL(pi_theta || reference). The reference is the initial model; with 0 no
    copy of it is kept."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """How the KL is estimated from sampled tokens. k2 and k3 pull towards the reference; the gradient of k1 is zero on
    average, so k1 only adds noise."""
    entropy_coef: NonNegativeFloat = 0.0
    """Coefficient of the bonus on the entropy of the next-token distribution."""


class TBPOConfig(_Objective):
    """TBPO (arXiv 2604.07853): sequence-level ratio, dual clip for negative advantages, capped mismatch weight."""

    kind: Literal["tbpo"] = "tbpo"
    seq_clip_ratio_low: PositiveFloat = 3e-4
    """eps_low: lower bound for positive advantages. In TBPO it never binds, because PPO's minimum takes the unclipped
    branch; in GSPO it binds for negative advantages."""
    seq_clip_ratio_high: PositiveFloat = 4e-4
    """eps_high: upper bound for positive advantages."""
    neg_seq_clip_ratio_low: PositiveFloat = 3e-4
    """Lower bound for negative advantages."""
    neg_seq_clip_ratio_high: PositiveFloat = 7e-4
    """Upper bound for negative advantages."""
    seq_tis_imp_ratio_cap: PositiveFloat = 2.0
    """C: cap on the sequence mismatch weight, when `correction` is null."""
    correction: CorrectionConfig | None = None
    """Weight that corrects the mismatch of sampler and learner. For TBPO null means its own, `sequence_tis` with the
    cap C. The other objectives have `none` by default."""
    level: Literal["sequence", "token"] = "sequence"
    """Ablation: `token` applies the band to the ratio of every token instead of the sequence's."""
    dual_clip: bool = True
    """Ablation: false bounds negative advantages from below only, as PPO's minimum does."""
    positive_only: bool = False
    """Ablation: leave sequences of negative advantage out of the loss."""


class _Corrected(_Objective):
    correction: CorrectionConfig = NoCorrection()
    """Weight that corrects the mismatch of sampler and learner."""


class TokenClip(_Objective):
    """Keys of the clipped minimum on token ratios."""

    correction: TokenClipCorrectionConfig = NoCorrection()
    """Weight that corrects the mismatch of sampler and learner."""
    clip_ratio_low: Fraction = 0.2
    """eps_low: a token's ratio is bounded below by 1 - eps_low (binds for negative advantages)."""
    clip_ratio_high: PositiveFloat = 0.2
    """eps_high: bounded above by 1 + eps_high (binds for positive advantages). DAPO: 0.28 by default."""
    clip_ratio_c: Annotated[float, Field(gt=1.0)] | None = None
    """Upper bound on a token's ratio for negative advantages (dual-clip PPO, arXiv 1912.09729); null for none."""


class GRPOConfig(TokenClip):
    """GRPO (arXiv 2402.03300) without its KL penalty: PPO's clipped minimum on token ratios."""

    kind: Literal["grpo"] = "grpo"
    aggregation: Aggregation = "sequence_mean"
    """`sequence_mean`: mean over the tokens of a sequence, then over sequences. `token_mean`: over all tokens."""


class DrGRPOConfig(TokenClip):
    """Dr. GRPO (arXiv 2503.20783): no division by a response's own length, no standard deviation."""

    advantage: ClassVar[Mapping[str, object]] = MappingProxyType({"estimator": "group", "normalize_by_std": False})
    kind: Literal["dr_grpo"] = "dr_grpo"
    normalizer: PositiveInt = Field(default=...)
    """Constant that divides the sum over a sequence's tokens. Required for Dr. GRPO; the generation budget is
    `${rollout.sampling.max_new_tokens}`."""


class DAPOConfig(TokenClip):
    """DAPO (arXiv 2503.14476): clip-higher and the mean over tokens. Its other two parts are `train.dynamic_sampling`
    and the reward kind `overlong`."""

    kind: Literal["dapo"] = "dapo"
    clip_ratio_high: PositiveFloat = 0.28
    """eps_high: upper bound."""


class GSPOConfig(_Corrected):
    """GSPO (arXiv 2507.18071): PPO's clipped minimum on the length-normalised sequence ratio."""

    kind: Literal["gspo"] = "gspo"
    seq_clip_ratio_low: PositiveFloat = 3e-4
    """eps_low: binds for negative advantages."""
    seq_clip_ratio_high: PositiveFloat = 4e-4
    """eps_high: binds for positive advantages."""


class CISPOConfig(_Corrected):
    """CISPO (MiniMax-M1, arXiv 2506.13585): the clipped token ratio is a weight; every token keeps a gradient."""

    kind: Literal["cispo"] = "cispo"
    is_clip_low: Fraction = 1.0
    """eps_low of CISPO's weight; 1 means no lower bound, as in the paper."""
    is_clip_high: PositiveFloat = 1.0
    """eps_high of CISPO's weight. The paper tunes it and gives no value."""


class GBPOConfig(_Corrected):
    """GBPO, bounded ratio RL (arXiv 2604.18578): pulls the token ratio to the upper bound for a positive advantage, to
    the lower bound for a negative one."""

    kind: Literal["gbpo"] = "gbpo"
    clip_ratio_low: Fraction = 0.2
    """eps_low: for a negative advantage the target is 1 - eps_low."""
    clip_ratio_high: PositiveFloat = 0.2
    """eps_high: for a positive one 1 + eps_high."""
    aggregation: Aggregation = "sequence_mean"
    """How tokens are averaged."""


class OnPolicyConfig(_Corrected):
    """Plain policy gradient, without a ratio: correct when each batch is used for one optimizer step."""

    kind: Literal["on_policy"] = "on_policy"
    aggregation: Aggregation = "sequence_mean"
    """How tokens are averaged."""


class RLOOConfig(_Corrected):
    """RLOO (arXiv 2402.14740): REINFORCE with the whole response as one action and the leave-one-out baseline."""

    advantage: ClassVar[Mapping[str, object]] = MappingProxyType(
        {"estimator": "leave_one_out", "normalize_by_std": False}
    )
    kind: Literal["rloo"] = "rloo"


class ReinforcePPConfig(TokenClip):
    """REINFORCE++ (arXiv 2501.03262): PPO's clipped minimum with advantages normalized over the batch."""

    advantage: ClassVar[Mapping[str, object]] = MappingProxyType(
        {"estimator": "batch", "normalize_by_std": True, "drop_zero_variance": False}
    )
    kind: Literal["reinforce_pp"] = "reinforce_pp"


class CustomConfig(_Objective):
    """An objective of your own: a function `(inputs: LossInputs, **kwargs) -> (loss, metrics)`."""

    kind: Literal["custom"] = "custom"
    function: str = Field(default=...)
    """The function of a custom objective: `module:function` or `path/to/file.py:function`, found in the working
    directory or on `sys.path`. Required for `custom`."""
    kwargs: dict[str, Any] = {}
    """Keyword arguments of the function."""


def _tbpo_by_default(value: Any) -> Any:
    return {"kind": "tbpo", **value} if isinstance(value, dict) else value


ObjectiveConfig = Annotated[
    TBPOConfig
    | GRPOConfig
    | DrGRPOConfig
    | DAPOConfig
    | GSPOConfig
    | CISPOConfig
    | GBPOConfig
    | OnPolicyConfig
    | RLOOConfig
    | ReinforcePPConfig
    | CustomConfig,
    Field(discriminator="kind"),
    BeforeValidator(_tbpo_by_default),
]
