"""Settings of the loop that contradict each other: staleness, stragglers, objectives, pool, trackers; and random ones."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from qarl.config.base import Node
from qarl.config.environment import EnvironmentConfig
from qarl.config.error_tokens import ErrorTokensConfig
from qarl.config.io import documentation
from qarl.config.objective import ObjectiveConfig
from qarl.config.pool import AugmentConfig, TeacherConfig, VoteConfig
from qarl.config.reward import SETTINGS
from qarl.config.run import ControlsConfig, DebugConfig
from qarl.config.task import TaskConfig
from tests.campaign.harness import CONFIG, Case
from tests.campaign.reward_cases import Words, cases
from tests.campaign.setting_cases import with_value

STALE = "train.max_staleness=1"
ROLLOUTS: list[tuple[Words, Words]] = [
    (("train.max_staleness=-1",), ("train.max_staleness",)),
    (("train.max_staleness=one",), ("train.max_staleness",)),
    ((STALE, "rollout.transport=ipc"), ("rollout.transport",)),
    (("rollout.stragglers.kind=keep",), ("rollout.stragglers.kind", "train.max_staleness")),
    (("rollout.stragglers.kind=drop",), ("rollout.stragglers.kind", "'wait'")),
    (("rollout.stragglers=keep",), ("rollout.stragglers",)),
    (("rollout.stragglers.times_median=1.0",), ("rollout.stragglers.times_median",)),
    (("rollout.stragglers.after_s=0",), ("rollout.stragglers.after_s",)),
    (("rollout.stragglers.after_s=soon",), ("rollout.stragglers.after_s",)),
    (("train.allocation=best",), ("train.allocation", "'frontier'")),
    (("train.dynamic_sampling=1", "advantage.drop_zero_variance=false"), ("train.dynamic_sampling",)),
    (("advantage.estimator=batch",), ("advantage.drop_zero_variance",)),
    (("advantage.estimator=best",), ("advantage.estimator", "'group'")),
    (("rollout.sampling.top_p=0.9",), ("rollout.sampling.top_p", "temperature")),
    (("rollout.sampling.top_k=5",), ("rollout.sampling.top_k", "temperature")),
    (("rollout.sampling.stop=a",), ("rollout.sampling.stop", "list")),
    (("rollout.sampling.stop=['']",), ("rollout.sampling.stop",)),
    (("rollout.sampling.stop_token_ids=[64]",), ("rollout.sampling.stop_token_ids", "63")),
    (("rollout.sampling.stop_token_ids=[-1]",), ("rollout.sampling.stop_token_ids",)),
    (("eval.num_samples=0",), ("eval.num_samples",)),
    (("learner.num_ranks=0", "learner.num_threads=many"), ("learner.num_threads",)),
    (("learner.num_ranks=all",), ("learner.num_ranks",)),
    (("rollout.num_workers=auto", "rollout.kv_cache_gib=0"), ("rollout.kv_cache_gib",)),
    (("learner.numerics=exact",), ("learner.numerics", "'engine'")),
    (("learner.prox=never",), ("learner.prox", "'recompute'")),
    (("learner.gradient_precision=low",), ("learner.gradient_precision", "'medium'")),
    (("error_tokens.mode=delete",), ("error_tokens.mode", "'measure'")),
    (("debug.rollout_only=true", "debug.train_from=model"), ("debug.train_from",)),
    (("debug.train_from=runs/r/batches",), ("debug.train_from",)),
    (("debug.train_from=model",), ("debug.train_from", "missing")),
    (("debug.profile_steps=[1, x]",), ("debug.profile_steps",)),
    (("controls.teacher=true",), ("controls.teacher",)),
    (("controls.sft_continued=true",), ("controls.sft_continued",)),
]  # fmt: skip

OBJECTIVES: list[tuple[Words, Words]] = [
    (("objective.kind=rloo",), ("objective.kind", "advantage.estimator=leave_one_out")),
    (("objective.kind=dr_grpo",), ("normalizer",)),
    (("objective={kind: dr_grpo, normalizer: 8}",), ("advantage.normalize_by_std=false",)),
    (("objective.kind=reinforce_pp",), ("advantage.estimator=batch",)),
    (("objective={kind: grpo, clip_ratio_low: 1.5}",), ("clip_ratio_low",)),
    (("objective={kind: grpo, clip_ratio_c: 1.0}",), ("clip_ratio_c",)),
    (("objective={kind: grpo, seq_clip_ratio_low: 0.1}",), ("seq_clip_ratio_low",)),
    (("objective={kind: tbpo, correction: token_tis}",), ("objective.correction",)),
    (("objective={kind: tbpo, correction: {kind: adaptive_clip}}",), ("objective.correction", "'token_tis'")),
    (("objective={kind: tbpo, correction: {kind: nothing}}",), ("objective.correction", "'token_tis'")),
    (("objective={kind: tbpo, correction: {kind: token_mask, low: 2}}",), ("objective.correction", "band")),
    (("objective={kind: tbpo, correction: {kind: token_tis, cap: 0.5}}",), ("cap",)),
    (("objective={kind: tbpo, kl_estimator: k4}",), ("kl_estimator",)),
    (("objective={kind: tbpo, kl_coef: -1}",), ("kl_coef",)),
    (("objective={kind: tbpo, level: word}",), ("level",)),
    (("objective={kind: custom}",), ("function",)),
    (("objective={kind: custom, function: 'json:dumps', kwargs: 3}",), ("kwargs",)),
]  # fmt: skip

TEACHER = "validator: {kind: teacher, base_url: 'http://127.0.0.1:1/v1', model: m"
POOLS: list[tuple[Words, Words]] = [
    (("pool.strategy=best",), ("pool.strategy", "'frontier'")),
    (("pool.archive.capacity=3",), ("pool.archive.capacity", "pool.capacity")),
    (("pool.archive.reinsert_per_step=3",), ("pool.archive.reinsert_per_step",)),
    (("pool.retire={hopeless_below: 0.5, solved_above: 0.5}",), ("pool.retire.hopeless_below",)),
    (("pool.retire={after_visits: 1, hopeless_below: 0.6}",), ("pool.retire", "pool.target")),
    (("pool.priority_exponent=9",), ("pool.priority_exponent",)),
    (("pool.augment={template: hello}",), ("pool.augment.template",)),
    (("pool.augment={pattern: '('}",), ("pool.augment.pattern",)),
    (("pool.augment={pattern: abc}",), ("pool.augment.pattern", "one group")),
    (("pool.augment={max_overlap: 0}",), ("pool.augment.max_overlap",)),
    (("pool.augment={validator: {kind: vote, answer_pattern: abc}}",), ("answer_pattern", "one group")),
    (("pool.augment={validator: {kind: vote, threshold: 0}}",), ("threshold",)),
    (("pool.augment={validator: {kind: teacher}}",), ("base_url", "model")),
    ((f"pool.augment={{{TEACHER}, prompt: hello}}}}",), ("prompt", "{question}")),
    (("pool.augment={validator: {kind: teacher, base_url: 'http://a b', model: m}}",), ("base_url",)),
]  # fmt: skip

TRACKERS: list[tuple[Words, Words]] = [
    (("tracking.trackers=jsonl",), ("tracking.trackers", "list")),
    (("tracking.trackers=[wandb]",), ("tracking.trackers", "jsonl")),
    (("tracking.trackers=[jsonl, 3]",), ("tracking.trackers",)),
    (("tracking.trackers=[jsonl, 'mine.py:one_argument']",), ("tracking.trackers", "one_argument(config, run_dir)")),
    (("tracking.trackers=[jsonl, 'mine.py:gone']",), ("tracking.trackers", "gone")),
    (("tracking.trackers=[jsonl, 'mine.py:raises']",), ("tracking.trackers", "ZeroDivisionError")),
    (("tracking.trackers=[jsonl, 'mine.py:nothing']",), ("tracking.trackers", "NoneType", "log")),
    (("tracking.trackers=[jsonl, wandb]", "tracking.wandb_mode=online"), ("wandb", "offline")),
    (("tracking.wandb_mode=sometimes",), ("tracking.wandb_mode", "'offline'")),
    (("tracking.alert_reward_drop=1",), ("tracking.alert_reward_drop",)),
    (("tracking.alert_reward_drop=0",), ("tracking.alert_reward_drop",)),
    (("tracking.table_rows=0",), ("tracking.table_rows",)),
    (("mismatch.token_bounds=[]", "mismatch.stop_above=-1"), ("mismatch.stop_above",)),
]  # fmt: skip
MINE = """
def one_argument(config): return None
def raises(config, run_dir): 1 / 0
def nothing(config, run_dir): return None
"""

GOOD: list[Words] = [
    (STALE,),
    (STALE, "train.dynamic_sampling=2", "rollout.schedule=[{from_step: 2, scheme: fp8_channel}]"),
    ("train.max_staleness=3", "rollout.stragglers.kind=keep"),
    ("rollout.stragglers={kind: return, after_s: 1}",),
    ("train.allocation=frontier",),
    ("objective={kind: rloo}", "advantage={estimator: leave_one_out, normalize_by_std: false}"),
    ("objective={kind: grpo, correction: {kind: adaptive_clip}}",),
    ("rollout.sampling={max_new_tokens: 16, stop: ['7'], stop_token_ids: [5]}",),
    ("rollout.num_workers=auto", "learner.num_ranks=auto"),
]


def of_node(prefix: str, node: type[Node], base: dict[str, Any], place: Callable[[Any], Any]) -> list[Case]:
    """A value of a wrong type for every key of `node`; `place` puts the values of its keys where they belong."""
    found = []
    for number, (name, field) in enumerate(node.model_fields.items()):
        if name == "kind":
            continue
        wrong: Any = 3 if "dict" in str(field.annotation) else ({"a": [1]}, [[1], {"b": None}])[number % 2]
        key, value = place({**base, name: wrong})
        words = (name,)
        found.append(
            Case("wrong type of a kind", f"{prefix} {name}={json.dumps(wrong)}", words, edit=with_value(key, value))
        )
    return found


def members(union: Any) -> list[type[Node]]:
    return list(get_args(get_args(union)[0]))


def required(node: type[Node]) -> dict[str, Any]:
    """Values for the keys that `node` requires."""
    values = {"function": "json:dumps", "train_path": "train.jsonl", "heldout_path": "heldout.jsonl", "normalizer": 8}
    values |= {"datasets": [{"name": "chain_sum"}], "pattern": "a", "limit": 8, "cache": 2}
    values |= {"base_url": "http://x", "url": "http://x", "model": "m", "template": "{response}"}
    return {name: values[name] for name, field in node.model_fields.items() if field.is_required()}


def wrong_types() -> list[Case]:
    """Every key of every kind of task, objective, reward and validator, and of the smaller sections."""
    found: list[Case] = []
    for key, union in (("task", TaskConfig), ("objective", ObjectiveConfig)):
        for node in members(union):
            kind = node.model_fields["kind"].default
            base = {"kind": kind, **required(node)}
            found += of_node(f"{key} {kind}:", node, base, lambda tree, key=key: (key, tree))
    for kind, node in SETTINGS.items():

        def part(tree: Any, kind: str = kind) -> Any:
            return "reward.components", [{"kind": "exact"}, {"kind": kind, "settings": tree}]

        found += of_node(f"reward {kind}:", node, required(node), part)
    for node, kind in ((VoteConfig, "vote"), (TeacherConfig, "teacher")):
        place = "pool.augment.validator"
        found += of_node(f"{kind}:", node, {"kind": kind, **required(node)}, lambda tree, at=place: (at, tree))
    sections = {"environment": EnvironmentConfig, "error_tokens": ErrorTokensConfig, "controls": ControlsConfig}
    for key, node in {**sections, "debug": DebugConfig, "pool.augment": AugmentConfig}.items():
        found += of_node(f"{key}:", node, {}, lambda tree, key=key: (key, tree))
    return found


VALUES: tuple[Any, ...] = (
    *(
        0,
        1,
        -1,
        2,
        7,
        10**12,
        -(2**63),
        0.5,
        1e-300,
        1e300,
        "",
        "x",
        "auto",
        "none",
        [],
        {},
        [0],
        [""],
        None,
        True,
        False,
    ),
)
RANDOM = 250
"""Inputs with two random keys, of random values."""


def random_settings() -> list[Case]:
    """Whatever they are, the answer is the run or one line."""
    keys = [
        key for key, default, _ in documentation() if default != "" and not key.startswith(("model.fetch", "cluster.a"))
    ]
    drawn = random.Random(0)
    found = []
    for number in range(RANDOM):
        chosen = {key: drawn.choice(VALUES) for key in drawn.sample(keys, 2)}

        def edit(folder: Path, chosen: dict[str, Any] = chosen) -> None:
            tree = json.loads(json.dumps(CONFIG))
            for key, value in chosen.items():
                node, (*path, last) = tree, key.split(".")
                for part in path:
                    inner = node.get(part)
                    node[part] = inner if isinstance(inner, dict) else {}
                    node = node[part]
                node[last] = value
            (folder / "c.yaml").write_text(json.dumps(tree))

        found.append(
            Case("random settings", f"{number}: {json.dumps(chosen)}", edit=edit, is_either=True, exit_code=(1, 2))
        )
    return found


def trackers(folder: Path) -> None:
    (folder / "mine.py").write_text(MINE)


CASES = [
    *cases("rollouts", ROLLOUTS),
    *cases("objective", OBJECTIVES),
    *cases("pool", POOLS),
    *cases("trackers", TRACKERS, trackers),
    Case(
        "trackers",
        "a key of W&B that is too short",
        ("tracking.wandb_mode", "40+ characters", "offline"),
        ("tracking.trackers=[jsonl, wandb]", "tracking.wandb_mode=online"),
        env=(("WANDB_API_KEY", "tooshort"),),
    ),
    *cases("good loop", [(settings, ()) for settings in GOOD]),
    *wrong_types(),
    *random_settings(),
]
