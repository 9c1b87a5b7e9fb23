"""What is wrong with a run, as far as the input alone shows: one list of faults, before anything starts.

`train`, `plan`, `export` and `submit` use it; a fault that only some machines have is checked against a `Machine`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from launch.demo.tiny_model import architecture, check_model, make_tokenizer
from launch.early import check_engine_library, check_ray_folder, read_model
from launch.machine import Machine, bundles, find_machine
from launch.run.tensorboard import check_tensorboard
from qarl.config.derived import choose_counts, kernel_of, numerics_of
from qarl.config.run import TRACKERS, Config
from qarl.config.schedule import schemes_of
from qarl.config.shipped import model_sizes
from qarl.errors import ConfigError, QarlError, ResourceError, UsageError
from qarl.hooks import check_call, load_function
from qarl.model_folder import check_folder, meta_model, read_config
from qarl.numerics.engine_limits import check_engine_model, kv_bytes, sequences_in_cache
from qarl.numerics.engine_ops import BLOCK_SIZE
from qarl.numerics.profile import apply_profile
from qarl.numerics.shards import EXACT_ON_CPU
from qarl.objectives.custom import check_objective
from qarl.quant.experts import check_engine
from qarl.quant.format import LearnerKernel
from qarl.quant.formats import check_processor, engine_kernels, format_of
from qarl.quant.kernels import find_kernel
from qarl.quant.linear import covered_linears
from qarl.quant.scheme import QuantScheme
from qarl.tasks import make_task
from rewards.custom import check_function
from rewards.endpoint import api_key
from rewards.kinds import check_component
from trainer.batches import batch_file


class PreflightError(UsageError):
    """The input cannot make a run: a line for each fault."""


def preflight(config: Config) -> Machine:
    """The machine that `config` runs on; joins the cluster of `cluster.address`, starts nothing.

    Raises:
        PreflightError: the run cannot work there; a line for each fault.
        ResourceError: no cluster answers.
    """
    machine = find_machine(config)
    check(faults(config, machine))
    return machine


def check(found: list[QarlError]) -> None:
    """Raises PreflightError when there are faults."""
    if found:
        raise PreflightError("\n".join(dict.fromkeys(map(str, found))))


def faults(config: Config, machine: Machine) -> list[QarlError]:
    """Everything wrong with `config` on `machine`; empty when the run can start."""
    found = setting_faults(config, machine)
    try:
        check_model(config.model, config.task)
        model = checked_model(config)
    except QarlError as error:
        return [*found, error]
    for scheme in schemes_of(config.rollout):
        found += scheme_faults(config, scheme, model, machine)
    found += stop_faults(config, model.config.vocab_size)
    check = partial(check_longest, config, model.config, machine.device)
    return found + _failures(partial(check_numerics, config, model, machine.device), check)


def setting_faults(config: Config, machine: Machine) -> list[QarlError]:
    """Settings that contradict each other, or that `machine` lacks, whatever the model."""
    config = choose_counts(config, machine.device, machine.cpus)
    return _failures(
        partial(_check_batch_invariance, config, machine.device),
        partial(_check_tensor_parallel, config, machine.device),
        partial(_check_transport, config, machine.device),
        partial(_check_colocation, config, machine.device),
        partial(_check_resources, config, machine),
        partial(_check_kv_cache, config, machine),
        *([check_ray_folder] if machine.is_here else ()),
        *([check_engine_library] if machine.is_here and machine.device == "cpu" else ()),
        partial(_check_validator, config),
        partial(_check_controls, config),
        partial(make_task, config.task),
        partial(_check_batches, config),
        *([check_tensorboard] if "tensorboard" in config.tracking.trackers else []),
        *(partial(_check_tracker, name) for name in config.tracking.trackers if name not in TRACKERS),
        partial(check_objective, config.objective),
    ) + judge_faults(config)


def judge_faults(config: Config) -> list[QarlError]:
    """Why rewards or environment cannot work here."""
    return _failures(
        partial(_check_environment, config),
        *(partial(check_component, part) for part in config.reward.parts()),
        *(partial(check_function, *function) for function in config.reward.functions()),
    )


def _check_batches(config: Config) -> None:
    """Raises UsageError: `debug.train_from` lacks the batch of a step."""
    for step in range(1, config.train.steps + 1) if config.debug.train_from else ():
        file = batch_file(Path(str(config.debug.train_from)), step)
        if not file.is_file():
            steps = f"set train.steps={step - 1}" if step > 1 else "name a folder that has it"
            raise UsageError(f"{file} is missing", "debug.train_from", f"{steps}, or save more (debug.save_batches)")


def faults_on_any_machine(config: Config) -> list[QarlError]:
    """What is wrong wherever `config` runs."""
    lists = [faults(config, Machine(device)) for device in ("cpu", "cuda")]
    common = set.intersection(*({str(fault) for fault in found} for found in lists))
    return [fault for fault in lists[0] if str(fault) in common]


def scheme_faults(config: Config, scheme: QuantScheme, model: Any, machine: Machine) -> list[QarlError]:
    """Why engine or learner cannot compute `model`, which may be on the meta device, in `scheme`."""
    found = engine_faults(config, scheme, model, machine)
    if not found and _knows_kernels(machine):
        found = _failures(partial(learner_kernel, config, scheme, machine.device))
    return found


def engine_faults(config: Config, scheme: QuantScheme, model: Any, machine: Machine) -> list[QarlError]:
    """Why the engine cannot compute `model` in `scheme`."""
    found = _failures(partial(engine_kernels, scheme, machine.device))
    if machine.is_here and not found:
        found = _failures(partial(check_processor, scheme, machine.device))
    found += _failures(partial(covered_linears, model, scheme), partial(_check_head, model, scheme))
    if not found and _knows_kernels(machine):
        found = _failures(partial(check_engine, scheme, model.config.to_dict(), config.model.dtype, machine.device))
    return found


def _check_head(model: Any, scheme: QuantScheme) -> None:
    """The engine and the read-back of its layers know a head in full precision only."""
    name = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), "")
    if name and scheme.covers(name):
        raise ConfigError("the model's head would be quantized", "rollout.ignore", f"add '{name}' to the list")


def _knows_kernels(machine: Machine) -> bool:
    """On CPU the processor decides on kernels."""
    return machine.is_here or machine.device == "cuda"


def check_numerics(config: Config, model: Any, device: str) -> None:
    """Gives `model`, best on the meta device, its numerics.

    Raises ModelError, KernelError, ConfigError: numerics or engine do not cover it.
    """
    check_engine_model(model.config, config.rollout.max_model_len, device, config.rollout.tensor_parallel_size)
    numerics = numerics_of(config, device)
    if numerics == "engine" and device == "cpu":
        numerics = "portable"  # covers the same models, and does not load the engine's library
    apply_profile(model, numerics, torch.device(device))


def learner_kernel(config: Config, scheme: QuantScheme, device: str) -> LearnerKernel | None:
    """The learner's GEMM in `scheme`; None for the dense one. Raises KernelError: there is none."""
    if not (scheme.quantizes and config.learner.aligned):
        return None
    kind = kernel_of(config, numerics_of(config, device), device)
    return find_kernel(format_of(scheme), device, getattr(torch, config.model.dtype), kind)


def model_config(config: Config) -> Any:
    """The transformers config of the model: of its folder, or of what `model.build` will make there, or of the sizes
    that are known of a published model.

    Raises ModelError when there is none, or the model is quantized already.
    """
    path, build = Path(config.model.path), config.model.build
    if not path.exists() and build is not None:
        return architecture(build, make_tokenizer(build.vocab_size, build.characters))
    if not path.exists() and (sizes := model_sizes(config.model.path)):
        return read_config(sizes)
    read_model(config.model, config.task)
    return read_config(path)


def checked_model(config: Config) -> Any:
    """The model on the meta device; of a folder that exists everything is checked. Raises ModelError."""
    path = Path(config.model.path)
    return check_folder(path) if path.exists() else meta_model(model_config(config))


def _check_tracker(name: str) -> None:
    check_call(load_function(name, "tracking.trackers"), ("config", "run_dir"), {}, "tracking.trackers")


def _failures(*checks: Callable[[], Any]) -> list[QarlError]:
    """What the checks raise."""
    found = []
    for check in checks:
        try:
            check()
        except QarlError as error:
            found.append(error)
    return found


def _check_kv_cache(config: Config, machine: Machine) -> None:
    rollout = config.rollout
    requested = rollout.num_workers * rollout.tensor_parallel_size * rollout.kv_cache_gib
    if machine.device == "cpu" and machine.is_here and requested * 2**30 > machine.memory:
        what = f"the KV caches of all workers take {requested} GiB, this machine has {machine.memory / 2**30:.1f} GiB"
        raise ResourceError(what, "rollout.kv_cache_gib", "lower it")


def check_longest(config: Config, shape: Any, device: str) -> None:
    """Raises ResourceError: the KV cache of an engine on CPU has no room for one sequence of the longest length.

    `shape` is the transformers config of the model. Nothing is said of one with sliding windows: only the engine knows.
    """
    if device != "cpu" or getattr(shape, "sliding_window", None):
        return
    rollout = config.rollout
    token = kv_bytes(shape, getattr(torch, config.model.dtype).itemsize) // rollout.tensor_parallel_size
    blocks = rollout.kv_cache_gib * 2**30 // (token * BLOCK_SIZE)
    if not sequences_in_cache(blocks, BLOCK_SIZE, rollout.max_model_len):
        what = f"holds no sequence of rollout.max_model_len {rollout.max_model_len}"
        where = f"rollout.kv_cache_gib {rollout.kv_cache_gib}"
        raise ResourceError(what, where, "raise it, or lower rollout.max_model_len")


def _check_validator(config: Config) -> None:
    validator, where = config.pool.augment.validator, "pool.augment.validator.kind"
    if not config.pool.augment.per_step:
        return
    if validator.kind == "teacher" and validator.api_key_env:
        api_key(validator.api_key_env, "pool.augment.validator.api_key_env")
    if validator.kind == "program" and make_task(config.task).solve is None:
        raise ConfigError(f"task {config.task.kind} has no program to check", where, "use vote or teacher")


def _check_controls(config: Config) -> None:
    asked = [name for name, is_set in config.controls.model_dump().items() if is_set]
    if asked and (config.model.build is None or make_task(config.task).teacher is None):
        what = "needs a task with a teacher, and a model that model.build has made"
        raise ConfigError(what, f"controls.{asked[0]}", "set it to false")


def stop_faults(config: Config, vocab_size: int) -> list[QarlError]:
    """Tokens that should end a response, and are none of the model's."""
    what = f"is no token: the model's embedding ends at {vocab_size - 1}"
    return [
        ConfigError(f"{token} {what}", "rollout.sampling.stop_token_ids", "see the tokenizer's files")
        for token in config.rollout.sampling.stop_token_ids
        if token >= vocab_size
    ]


def _check_environment(config: Config) -> None:
    environment = config.environment
    if environment.python is None:
        if environment.function is not None:
            where = "environment.function"
            check_call(load_function(environment.function, where), (), environment.settings, where)
    elif shutil.which(environment.python) is None:
        hint = "it is a program, for example /path/to/venv/bin/python"
        raise ConfigError(f"no such interpreter: {environment.python}", "environment.python", hint)


def _check_batch_invariance(config: Config, device: str) -> None:
    if device == "cpu" and config.rollout.batch_invariant:
        raise ConfigError(
            "is a mode of the GPU engine; on CPU the kernels give a token one value in any batch",
            "rollout.batch_invariant",
            "set it to false",
        )


def _check_tensor_parallel(config: Config, device: str) -> None:
    if device == "cpu" and config.rollout.tensor_parallel_size > EXACT_ON_CPU:
        raise ConfigError(
            "each process of an engine on CPU adds the products of the others in an order of its own, so that from 3 "
            "processes on they disagree, and no learner agrees with all of them",
            "rollout.tensor_parallel_size",
            f"set it to {EXACT_ON_CPU}, or start more workers",
        )


def _check_transport(config: Config, device: str) -> None:
    transport, where = config.rollout.transport, "rollout.transport"
    if transport != "object_store" and device == "cpu":
        raise ConfigError(f"{transport} is a transport between GPUs", where, "set it to object_store")
    if transport == "nccl" and config.cluster.colocate:
        raise ConfigError("NCCL cannot have two processes on one GPU", where, "set it to ipc or object_store")
    if transport == "ipc" and not config.cluster.colocate:
        raise ConfigError(
            "ipc reads the memory of a GPU that worker and learner share",
            where,
            "set it to nccl or object_store, or cluster.colocate to true",
        )


def _check_colocation(config: Config, device: str) -> None:
    pair = (config.rollout.num_workers, config.rollout.tensor_parallel_size, config.learner.num_ranks)
    if device == "cuda" and config.cluster.colocate and pair != (1, 1, 1):
        raise ResourceError(
            "only one rollout worker and one learner rank can share a GPU, each of one process",
            "cluster.colocate",
            "set it to false",
        )


def _check_resources(config: Config, machine: Machine) -> None:
    """Waiting for what a whole cluster lacks would never end."""
    workers, ranks = bundles(config, machine.device)
    for kind, available in (("GPU", machine.gpus), ("CPU", machine.cpus)):
        requested = sum(bundle.get(kind, 0.0) for bundle in workers + ranks)
        if requested > available:
            share = "let one pair share a GPU (cluster.colocate=true)"
            reserve = "rollout.num_cpus_per_worker or learner.num_cpus_per_rank"
            raise ResourceError(
                f"{config.rollout.num_workers} rollout workers and {config.learner.num_ranks} learner ranks request "
                f"{requested:g} {kind}s, {available:g} are available",
                "",
                f"lower rollout.num_workers or learner.num_ranks, {share if kind == 'GPU' else reserve}, or add nodes",
            )
