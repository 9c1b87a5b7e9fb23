"""`qarl train --dry-run`: what a run would do and where, without starting or writing anything."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing

import ray

from launch.machine import Machine, bundles, counts_line, with_counts
from launch.preflight import learner_kernel, model_config, preflight
from launch.run.environments import start_rewards
from launch.run.folder import RunFolder
from launch.run.prompts import fill_pool, load_prompts
from launch.run.wandb_run import check_login
from launch.tools.plan.command import choose_device
from launch.tools.plan.planner import Planner
from launch.tools.plan.result import Plan
from qarl.config.derived import numerics_of
from qarl.config.run import Config
from qarl.config.schedule import schemes_of
from qarl.errors import UsageError
from qarl.quant.formats import engine_kernels


def dry_run(config: Config) -> int:
    """Print what would run where; returns 0, or 2 with the reasons on stderr when the plan says that it cannot work.

    Raises UsageError: a fault that `qarl train` would report before it starts.
    """
    with ExitStack() as stack:
        stack.callback(ray.shutdown)
        config = with_counts(config)
        folder = RunFolder(config, print)
        check_login(config)
        machine = preflight(config)
    if folder.is_complete:
        print(folder.nothing_left)
        return 0
    print(f"run: {folder.path}, " + (f"continues after step {folder.step}" if folder.saved else "from the beginning"))
    _, train, heldout = load_prompts(config, print)
    fill_pool(config, train, print)
    with closing(start_rewards(config, print, None)) as rewards:
        rewards.check([*train, *heldout])
    print(f"prompts: {len(train)} for training, {len(heldout)} held out")
    print(*describe(config, machine), sep="\n")
    try:
        plan = _plan(config, machine)
    except UsageError as error:
        print(f"plan: not available: {error}")
        return 0
    print(*(f"plan: {line}" for line in plan.verdict()), sep="\n")
    for fault in plan.faults:
        print(f"qarl: {fault}", file=sys.stderr)
    return UsageError.exit_code if plan.faults else 0


def describe(config: Config, machine: Machine) -> Iterator[str]:
    """Device, numerics, kernels, and which actor gets what."""
    device, experts = machine.device, "moe_intermediate_size" in model_config(config).to_dict()
    yield (
        f"machine: {device}, {machine.cpus:g} CPUs, {machine.gpus:g} GPUs, {machine.memory / 2**30:.1f} GiB of memory"
    )
    yield counts_line(config, device)
    yield f"numerics: {numerics_of(config, device)}"
    for scheme in schemes_of(config.rollout):
        engine = ", ".join(engine_kernels(scheme, device, experts)) or "full precision"
        learner = learner_kernel(config, scheme, device)
        yield f"scheme: {scheme.label}, engine kernels {engine}, learner kernel {learner.kind if learner else 'dense'}"
    for role, actors in zip(("rollout worker", "learner rank"), bundles(config, device), strict=True):
        for number, bundle in enumerate(actors):
            yield f"{role} {number}: " + ", ".join(f"{count:g} {kind}" for kind, count in bundle.items())


def _plan(config: Config, machine: Machine) -> Plan:
    cluster = config.cluster.model_copy(update={"device": machine.device})
    placed = config.model_copy(update={"cluster": cluster})
    return Planner(placed, model_config(placed), choose_device(placed, None)).plan()
