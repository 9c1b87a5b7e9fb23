"""Settings that cannot work: values of every key, and settings that contradict each other, the data or the machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qarl.config.io import documentation
from tests.campaign.harness import CONFIG, Case


def with_value(key: str, value: Any) -> Callable[[Path], object]:
    """The good config with `value` at the dotted key."""

    def edit(folder: Path) -> None:
        tree = json.loads(json.dumps(CONFIG))
        node = tree
        *path, last = key.split(".")
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
        (folder / "c.yaml").write_text(json.dumps(tree))

    return edit


SETTINGS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("learner.zero_stage=0",), ("learner.zero_stage",)),
    (("rollout.kv_cache_gib=100000",), ("rollout.kv_cache_gib", "GiB")),
    (("rollout.kv_cache_gib=99999999999999999999999",), ("rollout.kv_cache_gib",)),
    (("learner.optimizer.betas=[1.0, 0.9]",), ("learner.optimizer.betas",)),
    (("learner.optimizer.betas=[0.9, 1.0]",), ("learner.optimizer.betas",)),
    (("learner.optimizer.betas=[0.9]",), ("learner.optimizer.betas",)),
    (("rollout.gpu_memory_utilization=0",), ("rollout.gpu_memory_utilization",)),
    (("rollout.gpu_memory_utilization=0.0",), ("rollout.gpu_memory_utilization",)),
    (("rollout.max_num_seqs=100000000000000000000",), ("rollout.max_num_seqs",)),
    (("rollout.max_num_seqs=5000",), ("rollout.max_num_seqs", "rollout.max_num_batched_tokens")),
    (("rollout.num_workers=1000",), ("rollout.num_workers", "CPUs")),
    (("cluster.device=cuda",), ("GPU",)),
    (("cluster.colocate=true", "cluster.device=cuda"), ("GPU",)),
    (("rollout.batch_invariant=true",), ("rollout.batch_invariant",)),
    (("rollout.transport=nccl",), ("rollout.transport",)),
    (("rollout.transport=ipc",), ("rollout.transport",)),
    (("learner.kernel=triton",), ("learner.kernel",)),
    (("rollout.scheme=nvfp4a16",), ("rollout.scheme",)),
    (("rollout.ignore=['re:(']",), ("rollout.ignore",)),
    (("rollout.ignore=['no_such_layer']",), ("rollout.ignore",)),
    (("rollout.ignore=['re:.*']",), ("rollout.ignore",)),
    (("rollout.ignore=[]",), ("rollout.ignore",)),
    (("rollout.schedule=[{from_step: 1, scheme: w4a16}]",), ("rollout.schedule",)),
    (("rollout.schedule=[{from_step: 3, scheme: w4a16}, {from_step: 2, scheme: w8a8_int8}]",), ("rollout.schedule",)),
    (("rollout.schedule=[3]",), ("rollout.schedule",)),
    (("train.group_size=1",), ("train.group_size",)),
    (("learner.minibatches=5",), ("learner.minibatches", "train.prompts_per_step")),
    (("learner.max_tokens_per_micro_batch=63",), ("learner.max_tokens_per_micro_batch",)),
    (("rollout.sampling.max_new_tokens=64",), ("rollout.sampling.max_new_tokens", "rollout.max_model_len")),
    (("rollout.sampling.max_new_tokens=62",), ("rollout.max_model_len",)),
    (("rollout.sampling.temperature=0",), ("rollout.sampling.temperature",)),
    (("rollout.sampling.temperature=1e-30",), ("rollout.sampling.temperature",)),
    (("rollout.sampling.temperature=1e300",), ("rollout.sampling.temperature",)),
    (("rollout.num_cpus_per_worker=1e-30",), ("rollout.num_cpus_per_worker",)),
    (("learner.num_cpus_per_rank=0.00001",), ("learner.num_cpus_per_rank",)),
    (("rollout.num_cpus_per_worker=1.5", "rollout.num_workers=1"), ("rollout.num_cpus_per_worker", "whole")),
    (("rollout.max_model_len=4096", "learner.max_tokens_per_micro_batch=4096"), ("rollout.max_model_len",)),
    (("reward.timeout_s=1e300",), ("reward.timeout_s",)),
    (("rollout.timeout_s=1e300",), ("rollout.timeout_s",)),
    (("cluster.placement_timeout_s=1e300",), ("cluster.placement_timeout_s",)),
    (("train.prompts_per_step=5000",), ("train.prompts_per_step", "64")),
    (("pool.capacity=3",), ("pool.capacity",)),
    (("reward.kind=math", "reward.function=x:y"), ("reward.function",)),
    (("reward.kind=custom",), ("reward.function",)),
    (("reward.kind=custom", "reward.function=gone.py:f"), ("reward.function", "gone.py")),
    (("reward.kind=custom", "reward.function=json:dumps"), ()),
    (("reward.kind=custom", "reward.function=json:nothing"), ("reward.function", "nothing")),
    (("reward.kind=custom", "reward.function=f"), ("reward.function",)),
    (("reward.kind=custom", "reward.function=':'"), ("reward.function",)),
    (("reward.kind=custom", "reward.function='..:f'"), ("reward.function",)),
    (("reward.kind=custom", "reward.function='a b:f'"), ("reward.function",)),
    (("objective={kind: custom, function: 'gone.py:f'}",), ("objective.function", "gone.py")),
    (("tracking.trackers=[]",), ("tracking.trackers",)),
    (("tracking.wandb_project=a/b",), ("tracking.wandb_project", "W&B wants")),
    (("tracking.trackers=[jsonl, jsonl]",), ("tracking.trackers",)),
    (("tracking.trackers=[jsonl, 'gone.py:f']",), ("tracking.trackers", "gone.py")),
    (("tracking.trackers=[jsonl, nothing]",), ("tracking.trackers", "nothing")),
    (("debug.train_from=nowhere",), ("debug.train_from", "nowhere")),
    (("debug.profile_steps=[3, 1]",), ("debug.profile_steps",)),
    (("debug.profile_steps=[1]",), ("debug.profile_steps",)),
    (("debug.profile_steps=[50, 60]",), ("debug.profile_steps", "train.steps")),
    (("model.path=nowhere",), ("nowhere", "no such model directory")),
    (("model.path=c.yaml",), ("c.yaml", "not a directory")),
    (("model.path=''",), ("model.path",)),
    (("run.dir=''",), ("run.dir",)),
    (("task.train_path=''",), ("task.train_path",)),
    (("task.prompt_template=hello",), ("task.prompt_template",)),
    (("task.prompt_template='{question} {question}'",), ("task.prompt_template",)),
    (("task.chat=true",), ("task.chat",)),
    (("task.question_key=''",), ("task.question_key",)),
    (("task.answer_delimiter='####'",), ("task.answer_delimiter",)),
    (("task.level_key=nothing",), ("task.level_key",)),
    (("task={kind: sorting, levels: []}",), ("task.levels",)),
    (("task={kind: sorting, levels: [0]}",), ("task.levels",)),
    (("task={kind: sorting, levels: [2, 2]}",), ("task.levels",)),
    (("task={kind: sorting, levels: [1000000]}",), ("task.levels",)),
    (("task={kind: sorting, levels: [100]}",), ("rollout.max_model_len",)),
    (("task={kind: sorting, num_prompts: 100000000000}",), ("task.num_prompts",)),
    (("task={kind: reasoning_gym, datasets: [{name: chain_sums}]}", "reward.kind=reasoning_gym"), ("task.datasets[0].name", "chain_sum")),
    (("task={kind: reasoning_gym, datasets: [{name: chain_sum, settings: {terms: 2}}]}", "reward.kind=reasoning_gym"), ("settings", "terms")),
    (("task={kind: reasoning_gym, datasets: [{name: chain_sum, settings: {min_terms: -1}}]}", "reward.kind=reasoning_gym"), ("settings",)),
    (("task={kind: reasoning_gym, datasets: [{name: chain_sum, settings: {min_terms: x}}]}", "reward.kind=reasoning_gym"), ("settings",)),
    (("task={kind: reasoning_gym, datasets: [{name: chain_sum, settings: [1]}]}", "reward.kind=reasoning_gym"), ("settings",)),
    (("task={kind: reasoning_gym, datasets: []}", "reward.kind=reasoning_gym"), ("task.datasets",)),
    (("task={kind: reasoning_gym, datasets: chain_sum}", "reward.kind=reasoning_gym"), ("task.datasets",)),
    (("task={kind: reasoning_gym, datasets: [chain_sum]}", "reward.kind=reasoning_gym"), ("task.datasets",)),
    (("pool.augment={per_step: 1}",), ("pool.augment",)),
    (("pool.augment={per_step: 1, validator: {kind: teacher, base_url: 'http://x', model: m, api_key_env: NO_SUCH_KEY}}",), ("NO_SUCH_KEY",)),
    (("cluster.address=127.0.0.1:1",), ("cluster.address", "no Ray cluster answers")),
    (("cluster.address=no.such.host.invalid:6379",), ("cluster.address", "no Ray cluster answers")),
    (("cluster.address='127.0.0.1:99999'",), ("cluster.address",)),
    (("cluster.address=nonsense",), ("cluster.address",)),
    (("cluster.address=''",), ("cluster.address",)),
    (("cluster.address='ray://127.0.0.1:1'",), ("cluster.address",)),
    (("cluster.address='http://127.0.0.1:1'",), ("cluster.address",)),
]  # fmt: skip

SAID: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("train.prompts_per_step=64",), ("train.prompts_per_step", "pool.cooldown_steps")),
    (("pool.cooldown_steps=1000", "train.steps=100"), ("pool.cooldown_steps",)),
    (("task={kind: sorting, levels: [1]}",), ("9 of 2048", "1 of 4 held-out")),
    (("eval.final_num_prompts=17",), ("16 of 17 held-out",)),
]
"""What runs, but not as asked."""

SECTION = (
    "train",
    "rollout",
    "learner",
    "eval",
    "pool",
    "advantage",
    "mismatch",
    "tracking",
    "run",
    "reward",
    "cluster",
)


def wrong_values() -> list[Case]:
    """A value of a wrong type for every key that a good config may have, so that no key's message is forgotten."""
    found = []
    values: list[Any] = [{"a": [1]}, [[1, 2], {"b": None}], -7.5, "caf\u00e9 \u2603"]
    free = ("kwargs", "settings", "chat_template_kwargs")
    for number, (key, default, _) in enumerate(documentation()):
        section = key.partition(".")[0]
        if (
            section not in SECTION
            or "augment" in key
            or default == ""
            or key.endswith(free)
            or key.startswith(("rollout.schedule.", "reward.components."))  # within lists: see loop_cases.py
        ):
            continue
        value = values[number % 3]
        name = f"{key}={json.dumps(value)}"
        found.append(Case("wrong type", name, (key,), edit=with_value(key, value)))
    return found


CASES = [
    *(Case("setting", " ".join(settings), words, settings) for settings, words in SETTINGS),
    *(Case("said at the start", " ".join(settings), words, settings, is_good=True) for settings, words in SAID),
    *wrong_values(),
]
