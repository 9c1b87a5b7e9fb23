"""`qarl plan`: will the run fit, and will quantized rollouts pay? From the config alone; no weights, no cluster.

`launch.tools.plan.command` prints it. Every time is an estimate (docs/plan.md).
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any, get_args

import torch

from launch import limits
from launch.machine import Machine
from launch.preflight import check_numerics, learner_kernel, scheme_faults, setting_faults
from launch.tools.plan import memory, speed
from launch.tools.plan.devices import Device
from launch.tools.plan.layers import layer_rows
from launch.tools.plan.memory import EngineMemory, LearnerMemory, Variant
from launch.tools.plan.result import NOT_TIMED, Estimate, Plan, Slowdown, Speeds, Times
from launch.tools.plan.shapes import shapes_of
from launch.tools.plan.timing import time_model
from qarl.config.derived import choose_counts, numerics_of, sleeps
from qarl.config.policy import PROBE_PROMPTS
from qarl.config.run import Config
from qarl.config.schedule import schemes_of
from qarl.errors import KernelError, ModelError
from qarl.model_folder import meta_model
from qarl.numerics import processor
from qarl.numerics.engine_ops import BLOCK_SIZE
from qarl.quant.format import LearnerKernel
from qarl.quant.formats import format_of
from qarl.quant.kernels import check_capability
from qarl.quant.scheme import QuantScheme, SchemeName
from trainer.policy import head_rows
from trainer.proof import SHORT_PROBE_TOKENS

GIB = 2**30
GPU_BLOCK = 16
"""Tokens of a KV-cache block on CUDA, vLLM's default."""
GPU_RESERVE = GIB
"""Assumed for the CUDA context, captured graphs and fragments, of each process on a GPU."""
CPU_PROCESS = int(0.7 * GIB)
"""An engine's or a learner's process before it holds a model: resident size measured on CPU."""
PROMPT_TOKENS = 256
"""Assumed length of a prompt, where the model's context leaves room for it."""
BATCHES = (1, 4, 16, 64, 256, 1024)


class Planner:
    """Plans one config on machines with `device`.

    Args:
        model: the transformers config of the model (`model_config`).
        prompt_tokens: mean length of the prompts; by default 256, or what `rollout.max_model_len` leaves.
        response_tokens: mean length of the responses; by default `rollout.sampling.max_new_tokens`, which the longest
            always has.
        measure: time a few layers of the model on this machine, a CPU, in place of the device's rates.
    Raises:
        ModelError: an architecture that plans do not know.
    """

    def __init__(
        self,
        config: Config,
        model: Any,
        device: Device,
        prompt_tokens: int | None = None,
        response_tokens: int | None = None,
        measure: bool = False,
    ) -> None:
        config = choose_counts(config, device.kind, limits.cores(), width=model.hidden_size)
        rollout, train = config.rollout, config.train
        longest = rollout.sampling.max_new_tokens
        self._config, self._device = config, device
        self._measure = measure and device.kind == "cpu" and config.learner.aligned
        self._machine = Machine(device.kind, is_here=config.cluster.address is None)
        self._model_config, self._model = model, meta_model(model, getattr(torch, config.model.dtype))
        self._shapes = shapes_of(self._model)
        self._numerics = numerics_of(config, device.kind)
        self._schemes = schemes_of(rollout)
        self._load = speed.Load(
            samples=train.prompts_per_step * train.group_size,
            prompt_tokens=min(prompt_tokens or PROMPT_TOKENS, rollout.max_model_len - longest),
            response_tokens=response_tokens or longest,
            longest=longest,
            workers=rollout.num_workers,
            ranks=config.learner.num_ranks,
            minibatches=config.learner.minibatches,
        )

    def plan(self) -> Plan:
        config, shapes, scheme = self._config, self._shapes, self._schemes[0]
        variant, (gemm, gemm_fault) = self._variant(scheme), self._gemm(scheme)
        compared = [scheme, *(replace(scheme, name=name) for name in get_args(SchemeName) if name != scheme.name)]
        stages = [stage for stage in range(4) if stage or config.model.dtype == "float32"]
        learner = {stage: self._learner(variant, gemm, stage) for stage in stages}
        formulas = [self._estimate(one, self._load) for one in compared]
        estimates = [self._measured(one, estimate) for one, estimate in zip(compared, formulas, strict=True)]
        return Plan(
            run=config.run.name,
            model=config.model.path,
            device=self._device.name,
            device_source=self._device.source,
            scheme=scheme.label,
            numerics=self._numerics,
            learner_kernel=gemm.kind if gemm else "none" if gemm_fault else "dense",
            parameters=shapes.parameters,
            active_parameters=shapes.active_parameters,
            prompt_tokens=self._load.prompt_tokens,
            response_tokens=self._load.response_tokens,
            layers=layer_rows(variant, self._device),
            learner=learner,
            learner_budget=self._learner_budget,
            zero_stage=config.learner.zero_stage,
            ranks=config.learner.num_ranks,
            engine=self._engine(variant),
            engine_budget=self._engine_budget,
            estimates=estimates,
            slowdown=_slowdown(formulas[0].times, estimates[0].times),
            by_batch={} if estimates[0].fault else self._by_batch(scheme),
            by_response={} if estimates[0].fault else self._by_response(scheme),
            faults=list(self._faults(learner, self._engine(variant))),
        )

    def faults(self) -> list[str]:
        """Why the run cannot work, as in its plan."""
        scheme, stage = self._schemes[0], self._config.learner.zero_stage
        variant, (gemm, _) = self._variant(scheme), self._gemm(scheme)
        return list(self._faults({stage: self._learner(variant, gemm, stage)}, self._engine(variant)))

    def speeds(self) -> Speeds:
        """How fast the parts of this run are, which must have no faults."""
        scheme, load = self._schemes[0], replace(self._load, ranks=1)
        variant, engine, training = self._variant(scheme), self._engine(self._variant(scheme)), self._training(scheme)
        tokens = load.prompt_tokens + load.response_tokens
        learner = partial(speed.learner, device=self._device)
        bare, learned = replace(load, minibatches=0), load.samples * load.response_tokens
        update = learner(replace(training, prox=False), load=bare)
        return Speeds(
            slots=min(self._config.rollout.max_num_seqs, engine.sequences(load.prompt_tokens + load.longest)),
            decode_s=cache(
                partial(speed.decode_step, variant, self._device, context=tokens - load.response_tokens / 2)
            ),
            prefill_s=speed.prefill(variant, self._device, 1, load.prompt_tokens),
            score_s=(learner(replace(training, prox=True), load=bare) - update) / learned,
            update_s=update / learned,
            optimizer_s=(learner(replace(training, prox=False), load=load) - update) / load.minibatches,
            publish_s=speed.publication(variant, self._device),
            published_bytes=variant.published_bytes,
            gradient_bytes=self._shapes.parameters * self._shapes.dtype_bytes,
        )

    # --- what quantizes ----------------------------------------------------------------------------------------------

    def _variant(self, scheme: QuantScheme) -> Variant:
        if not scheme.quantizes:
            return Variant(self._shapes)
        covered = frozenset(m.name for m in self._shapes.matrices if scheme.covers(m.name))
        return Variant(self._shapes, format_of(scheme), covered)

    def _gemm(self, scheme: QuantScheme) -> tuple[LearnerKernel | None, str]:
        """The learner's kernel in `scheme`; None for the dense one, or with the reason why there is none."""
        try:
            kernel = learner_kernel(self._config, scheme, self._device.kind)
            if kernel:
                check_capability(scheme.name, kernel, self._device.capability)
        except KernelError as error:
            return None, str(error)
        return kernel, ""

    def _scheme_fault(self, scheme: QuantScheme) -> str:
        """Why learner or engine cannot compute in `scheme`; empty when they can."""
        for row in layer_rows(self._variant(scheme), self._device):
            if row.fault:
                return f"{row.name}: {row.fault}"
        found = scheme_faults(self._config, scheme, self._model, self._machine)
        return str(found[0]) if found else self._gemm(scheme)[1]

    # --- memory ------------------------------------------------------------------------------------------------------

    @property
    def _on_cuda(self) -> bool:
        return self._device.kind == "cuda"

    @property
    def _engine_budget(self) -> int:
        """Bytes that an engine may take: its fraction of a GPU; the machine's memory on CPU."""
        if not self._on_cuda:
            return int(self._device.memory)
        return int(self._device.memory * self._config.rollout.gpu_memory_utilization)

    @property
    def _learner_budget(self) -> int:
        """Bytes that a rank may take: a GPU minus an engine on the same GPU, of which little is left while it sleeps;
        the machine's memory on CPU."""
        if not self._on_cuda:
            return int(self._device.memory)
        engine = self._engine_budget if self._config.cluster.colocate else 0
        return int(self._device.memory) - (GPU_RESERVE if self._sleeps else engine) - GPU_RESERVE

    @property
    def _sleeps(self) -> bool:
        return sleeps(self._config, self._device.kind)

    @property
    def _dense_bytes(self) -> int:
        """Bytes of a dense weight in the layout that GEMMs on CPU read."""
        return self._shapes.dtype_bytes if processor.has_bfloat16_gemm() else 4

    def _engine(self, variant: Variant) -> EngineMemory:
        """Bytes of one process of an engine."""
        rollout, shapes, shards = self._config.rollout, self._shapes, self._config.rollout.tensor_parallel_size
        tokens = max(rollout.max_num_batched_tokens, rollout.max_model_len)
        weights, working = variant.engine_weights // shards, memory.working_bytes(shapes, tokens, rollout.max_num_seqs)
        if self._on_cuda:
            cache, block = max(0, self._engine_budget - GPU_RESERVE - weights - working), GPU_BLOCK
        else:
            weights += memory.dense_copies(variant, self._dense_bytes, engine=True) // shards
            cache, block = rollout.kv_cache_gib * GIB, BLOCK_SIZE
        return EngineMemory(weights, working, cache, shapes.kv_bytes // shards, block)

    def _learner(self, variant: Variant, gemm: LearnerKernel | None, stage: int) -> LearnerMemory:
        """Bytes of one rank, with a micro-batch as full as it can be."""
        learner, rollout, shapes, train = self._config.learner, self._config.rollout, self._shapes, self._config.train
        longest = train.prompts_per_step * train.group_size * rollout.max_model_len
        tokens = min(learner.max_tokens_per_micro_batch, -(-longest // (learner.minibatches * learner.num_ranks)))
        quantized = memory.quantized_bytes(variant, gemm.prepared_bits if gemm else 0)
        plain, stock_policy, portable = shapes.parameters * shapes.dtype_bytes, 0, self._numerics == "portable"
        if not learner.aligned:
            stock_policy, quantized = (plain + quantized if variant.format_ else 0), 0
        elif self._config.mismatch.unaligned_every and variant.format_:
            stock_policy = plain
        if self._numerics == "engine":
            quantized += memory.dense_copies(variant, self._dense_bytes)
        if learner.aligned and learner.minibatches > 1:
            quantized += variant.packed_bytes // learner.num_ranks  # of before the update, which `CodeChanges` compares
        return memory.learner_memory(
            shapes,
            stage,
            learner.num_ranks,
            quantized=quantized,
            stock_policy=stock_policy,
            activations=memory.activation_bytes(shapes, tokens, portable, learner.gradient_checkpointing),
            logits=memory.logits_bytes(shapes, tokens, head_rows(shapes.head.n)),
            foreach=self._on_cuda,
        )

    def _host_bytes(self, learner: LearnerMemory, engine: EngineMemory, published: int) -> int:
        """Bytes of all processes of a run on CPU: engines, ranks, and a publication's copies on its way."""
        workers, ranks = self._load.workers * self._config.rollout.tensor_parallel_size, self._load.ranks
        engines = workers * (engine.weights + engine.working + engine.kv_cache + CPU_PROCESS)
        return engines + ranks * (learner.peak + CPU_PROCESS) + (2 + workers) * published

    # --- time --------------------------------------------------------------------------------------------------------

    def _estimate(self, scheme: QuantScheme, load: speed.Load) -> Estimate:
        variant, engine = self._variant(scheme), self._engine(self._variant(scheme))
        rollout = self._config.rollout
        samples = -(-load.samples // load.workers)
        fitting = engine.sequences(load.prompt_tokens + load.longest)
        slots = min(rollout.max_num_seqs, samples, fitting)
        fault = self._scheme_fault(scheme) or ("" if slots else "no longest sequence fits its KV cache")
        if variant.format_ and variant.format_.arithmetic not in self._device.rates:
            fault = fault or f"no {variant.format_.arithmetic} rate is known for {self._device.name}"
        estimate = Estimate(
            scheme=scheme.label,
            fault=fault,
            weight_bytes=engine.weights,
            published_bytes=variant.published_bytes,
            kv_tokens=engine.tokens,
            sequences=engine.sequences(rollout.max_model_len),
            slots=slots,
        )
        if fault:
            return estimate
        context = load.prompt_tokens + load.response_tokens / 2
        return replace(
            estimate,
            times=Times(
                decode_s=speed.decode_step(variant, self._device, slots, context),
                rollout_s=speed.rollout(variant, self._device, load, slots),
                learner_s=speed.learner(self._training(scheme), self._device, load),
                publication_s=self._publication(variant),
            ),
        )

    def _measured(self, scheme: QuantScheme, estimate: Estimate) -> Estimate:
        """`estimate` with the times of layers on this machine; of the run's own format and full precision alone."""
        if not (self._measure and estimate.times and scheme.name in ("none", self._schemes[0].name)):
            return estimate
        load, device = self._load, self._device
        active = max(1, round(estimate.slots * load.response_tokens / load.longest))
        layer = (self._shapes.parameters - self._shapes.embedding) // self._shapes.layers
        times = time_model(self._config, self._model_config, layer, scheme, load, active)
        decode = times.decode + device.step_s + active * device.sequence_s
        batches = -(-load.samples // load.workers) / estimate.slots
        learner = times.update + (times.score if self._config.learner.prox == "recompute" else 0.0)
        rollout = times.prefill + batches * load.longest * decode
        measured = replace(estimate.times, decode_s=decode, rollout_s=rollout, learner_s=learner)
        return replace(estimate, times=measured)

    def _publication(self, variant: Variant) -> float:
        """One weight transfer, and the probe with which every engine proves it."""
        tokens = min(SHORT_PROBE_TOKENS, self._config.rollout.sampling.max_new_tokens)
        step = speed.decode_step(variant, self._device, PROBE_PROMPTS, self._load.prompt_tokens)
        return speed.publication(variant, self._device) + tokens * step

    def _training(self, scheme: QuantScheme) -> speed.Training:
        learner, (gemm, _) = self._config.learner, self._gemm(scheme)
        return speed.Training(
            variant=self._variant(scheme) if learner.aligned else Variant(self._shapes),
            arithmetic=(gemm and gemm.arithmetic) or speed.dense(self._shapes),
            rounding_bytes=gemm.rounding_bytes if gemm else (0, 0),
            prox=learner.prox == "recompute" or not learner.aligned,
            checkpointing=learner.gradient_checkpointing,
            cores=1 if self._on_cuda else learner.num_threads,
        )

    def _by_batch(self, scheme: QuantScheme) -> dict[int, float]:
        context = self._load.prompt_tokens + self._load.response_tokens / 2
        low, plain = self._variant(scheme), Variant(self._shapes)
        step = partial(speed.decode_step, device=self._device, context=context)
        return {batch: step(plain, batch=batch) / step(low, batch=batch) for batch in BATCHES}

    def _by_response(self, scheme: QuantScheme) -> dict[int, float]:
        """Empty when full precision does not fit."""
        ratios = {}
        tokens = self._load.response_tokens
        for response in sorted({max(1, tokens // part) for part in (1, 4, 16, 64)}):
            load = replace(self._load, response_tokens=response, longest=response)
            low, plain = (self._estimate(one, load).times for one in (scheme, replace(scheme, name="none")))
            if low and plain:
                ratios[response] = plain.step_s / low.step_s
        return ratios

    # --- verdict -----------------------------------------------------------------------------------------------------

    def _faults(self, learner: dict[int, LearnerMemory], engine: EngineMemory) -> Iterator[str]:
        """Why the run cannot work."""
        yield from map(str, setting_faults(self._config, self._machine))
        for scheme in self._schemes:
            where = f"{scheme.label} on {self._device.name}"
            rows = [row for row in layer_rows(self._variant(scheme), self._device) if row.fault]
            for fault in dict.fromkeys(row.fault for row in rows):
                first, *more = [row for row in rows if row.fault == fault]
                others = f" and {len(more)} more" if more else ""
                yield f"{where}: {first.name} [{first.n}, {first.k}]{others}: {fault}"
            if not rows and (fault := self._scheme_fault(scheme)):
                yield f"{where}: {fault}"
        try:
            check_numerics(self._config, self._model, self._device.kind)
        except (ModelError, KernelError) as error:
            yield str(error)
        yield from self._memory_faults(learner[self._config.learner.zero_stage], engine)

    def _memory_faults(self, learner: LearnerMemory, engine: EngineMemory) -> Iterator[str]:
        rollout = self._config.rollout
        if not engine.sequences(rollout.max_model_len):
            room = "rollout.gpu_memory_utilization" if self._on_cuda else "rollout.kv_cache_gib"
            yield (
                f"an engine's KV cache of {_gib(engine.kv_cache)} beside {_gib(engine.weights)} of weights holds no "
                f"sequence of rollout.max_model_len {rollout.max_model_len}; raise {room}"
            )
        if self._on_cuda and learner.peak > self._learner_budget:
            yield (
                f"a learner rank needs {_gib(learner.peak)} of {_gib(self._learner_budget)}; raise learner.num_ranks "
                "or learner.zero_stage, set learner.gradient_checkpointing, or lower learner.max_tokens_per_micro_batch"
            )
        beside = int(self._device.memory) - self._engine_budget - GPU_RESERVE
        if self._sleeps and learner.held > beside:
            yield (
                f"while the engine is awake a learner rank holds {_gib(learner.held)}, beside it are {_gib(beside)}; "
                "lower rollout.gpu_memory_utilization, or set cluster.colocate to false"
            )
        needed = self._host_bytes(learner, engine, self._variant(self._schemes[0]).published_bytes)
        if not self._on_cuda and self._config.cluster.address is None and needed > self._device.memory:
            yield (
                f"engines and learner together need {_gib(needed)}, this machine has {_gib(self._device.memory)}; "
                "lower learner.max_tokens_per_micro_batch, rollout.kv_cache_gib or rollout.num_workers"
            )


def _slowdown(formula: Times | None, measured: Times | None) -> Slowdown:
    if formula is None or measured is None:
        return NOT_TIMED
    return Slowdown(measured.rollout_s / formula.rollout_s, measured.learner_s / formula.learner_s)


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
