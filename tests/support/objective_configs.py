"""Every objective and correction, as tests run through them."""

from __future__ import annotations

from typing import Any

from qarl.config.objective import (
    AdaptiveClip,
    CISPOConfig,
    DAPOConfig,
    DrGRPOConfig,
    GBPOConfig,
    GRPOConfig,
    GSPOConfig,
    NoCorrection,
    OnPolicyConfig,
    ReinforcePPConfig,
    RLOOConfig,
    SequenceMask,
    SequenceReject,
    SequenceTIS,
    TBPOConfig,
    TokenMask,
    TokenTIS,
)

WIDE: dict[str, Any] = {
    "seq_clip_ratio_low": 0.1,
    "seq_clip_ratio_high": 0.2,
    "neg_seq_clip_ratio_low": 0.15,
    "neg_seq_clip_ratio_high": 0.3,
}


PLAIN = [
    TBPOConfig(),
    TBPOConfig(**WIDE),
    TBPOConfig(**WIDE, level="token"),
    TBPOConfig(**WIDE, dual_clip=False),
    TBPOConfig(**WIDE, correction=NoCorrection()),
    TBPOConfig(**WIDE, positive_only=True),
    GRPOConfig(),
    GRPOConfig(clip_ratio_c=1.5, aggregation="token_mean"),
    DrGRPOConfig(normalizer=7),
    DAPOConfig(),
    GSPOConfig(),
    GSPOConfig(seq_clip_ratio_low=0.1, seq_clip_ratio_high=0.2),
    CISPOConfig(),
    CISPOConfig(is_clip_low=0.2, is_clip_high=0.3),
    GBPOConfig(),
    GBPOConfig(clip_ratio_high=0.05, aggregation="token_mean"),
    OnPolicyConfig(),
    OnPolicyConfig(aggregation="token_mean"),
    RLOOConfig(),
    ReinforcePPConfig(),
]


CORRECTIONS = [
    NoCorrection(),
    TokenTIS(cap=1.1),
    SequenceTIS(cap=1.1),
    TokenMask(low=0.8, high=1.3),
    SequenceMask(low=0.9, high=1.1),
    SequenceReject(low=0.9, high=1.1),
]


CORRECTED = [
    base.model_copy(update={"correction": correction})
    for base in (TBPOConfig(**WIDE), GRPOConfig(), GSPOConfig(), CISPOConfig(), OnPolicyConfig())
    for correction in CORRECTIONS[1:]
] + [
    GRPOConfig(correction=AdaptiveClip(cap=1.1)),
    DAPOConfig(correction=AdaptiveClip(cap=1.0), clip_ratio_c=1.5),
    GBPOConfig(correction=TokenTIS(cap=1.1)),
]


EVERY = PLAIN + CORRECTED


def label(config: Any) -> str:
    changed = {
        k: v.kind if hasattr(v, "kind") else v for k, v in config if k in config.model_fields_set and k != "kind"
    }
    return f"{config.kind}{changed or ''}"
