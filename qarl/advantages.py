"""From rewards to advantages."""

from collections.abc import Sequence
from statistics import mean, pstdev

from qarl.config.run import AdvantageConfig
from qarl.errors import DataError

EPSILON = 1e-6


def advantages(
    rewards_PG: Sequence[Sequence[float]], config: AdvantageConfig, prompt_ids: Sequence[str] = ()
) -> list[list[float]]:
    """One advantage a response, by `config.estimator`; std is the population's plus 1e-6, 1 unless `normalize_by_std`.

        group           (R - group mean) / group std          GRPO, arXiv 2402.03300; without std Dr. GRPO, 2503.20783
        leave_one_out   (R - mean of the others) / group std  RLOO, arXiv 2402.14740 (no std)
        group_batch     (R - group mean) / std of all R - group mean      REINFORCE++-baseline, arXiv 2501.03262
        batch           (R - mean of all) / std of all        REINFORCE++, arXiv 2501.03262

    "All" are the responses of the step that are learned from, and of groups that are dropped for zero variance.
    `prompt_ids` name the groups in errors; empty counts them from 0.
    Raises DataError for a group of fewer than two rewards, and for ids that are not one a group.
    """
    if prompt_ids and len(prompt_ids) != len(rewards_PG):
        raise DataError(f"{len(prompt_ids)} prompts {list(prompt_ids)} for {len(rewards_PG)} groups of rewards")
    for index, rewards_G in enumerate(rewards_PG):
        _check_size(rewards_G, where=f"prompt {prompt_ids[index]}" if prompt_ids else f"group {index}")
    match config.estimator:
        case "group":
            return [group_advantages(rewards_G, config.normalize_by_std) for rewards_G in rewards_PG]
        case "leave_one_out":
            centred = [group_advantages(rewards_G, config.normalize_by_std) for rewards_G in rewards_PG]
            # R - (sum - R) / (n - 1) = (R - mean) n / (n - 1)
            return [[value * len(values_G) / (len(values_G) - 1) for value in values_G] for values_G in centred]
        case "group_batch":
            centred_PG = [group_advantages(rewards_G, normalize_by_std=False) for rewards_G in rewards_PG]
        case "batch":
            centre = mean(reward for rewards_G in rewards_PG for reward in rewards_G) if rewards_PG else 0.0
            centred_PG = [[reward - centre for reward in rewards_G] for rewards_G in rewards_PG]
    everything = [value for centred_G in centred_PG for value in centred_G]
    scale = pstdev(everything) + EPSILON if config.normalize_by_std and everything else 1.0
    return [[value / scale for value in centred_G] for centred_G in centred_PG]


def group_advantages(rewards_G: Sequence[float], normalize_by_std: bool) -> list[float]:
    """GRPO's group-relative advantages (arXiv 2402.03300): `(R - mean) / (std + 1e-6)`, or `R - mean`.

    The standard deviation is the population's. A group of equal rewards has advantages of zero.
    Raises DataError for fewer than two rewards.
    """
    _check_size(rewards_G)
    centre = mean(rewards_G)  # exact, unlike fmean: equal rewards must not leave a rounding error over 1e-6
    scale = pstdev(rewards_G) + EPSILON if normalize_by_std else 1.0
    return [(reward - centre) / scale for reward in rewards_G]


def has_variance(rewards_G: Sequence[float]) -> bool:
    """Whether the group is informative: its rewards are not all equal."""
    return any(reward != rewards_G[0] for reward in rewards_G)


def _check_size(rewards_G: Sequence[float], where: str = "") -> None:
    if len(rewards_G) < 2:
        raise DataError(f"a group of {len(rewards_G)} has no baseline", where, hint="use train.group_size >= 2")
