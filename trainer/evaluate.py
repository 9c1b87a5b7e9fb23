"""Held-out accuracy, sampled by the rollout engines: the policy as it will be served."""

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

from qarl.config.run import Config
from qarl.protocols import Fleet, RewardService
from qarl.seeds import derive_seed
from qarl.types import Prompt


def evaluate(fleet: Fleet, rewards: RewardService, prompts: Sequence[Prompt], config: Config) -> dict[str, float]:
    """Sample k = `eval.num_samples` responses to each prompt at temperature 1, and with `eval.greedy` one at 0.

    Returns:
        `pass@1`, the share of right samples (avg@k); `pass@k`, the share of prompts with a right one; `greedy`, the
        share of right samples at temperature 0; `level_NN/pass@1` and `SET/pass@1` when the prompts have several levels
        or held-out sets; `mean_reward` of the samples where a reward may be other than 0 and 1. A sample is right when
        its success is 1, as in `reward/accuracy`. Seeds depend on the prompt alone, so two evaluations of one policy
        are equal.
    """
    k = config.eval.num_samples
    ask = config.rollout.sampling.request
    requests = [
        ask(prompt, derive_seed(config.seed, "eval", prompt.id, index), temperature=1.0)
        for prompt in prompts
        for index in range(k)
    ]
    if config.eval.greedy:
        requests += [ask(prompt, 0, temperature=0.0) for prompt in prompts]
    scores = rewards.score(fleet.sample(requests))
    right = [float(score.solved >= 1.0) for score in scores]
    groups = [right[i * k : (i + 1) * k] for i in range(len(prompts))]
    levels: dict[int, list[float]] = defaultdict(list)
    sets: dict[str, list[float]] = defaultdict(list)
    for prompt, group in zip(prompts, groups, strict=True):
        levels[prompt.level].append(fmean(group))
        sets[prompt.heldout_set].append(fmean(group))
    result = {"pass@1": fmean(map(fmean, groups)), f"pass@{k}": fmean(map(max, groups))}
    if config.eval.greedy:
        result["greedy"] = fmean(right[len(prompts) * k :])
    if config.reward.graded or config.environment.kind != "none":
        result["mean_reward"] = fmean(score.reward for score in scores[: len(prompts) * k])
    if len(levels) > 1:
        result |= {f"level_{level:02d}/pass@1": fmean(values) for level, values in sorted(levels.items())}
    if len(sets) > 1:
        result |= {f"{name}/pass@1": fmean(values) for name, values in sorted(sets.items())}
    return result
