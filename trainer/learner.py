"""One learner rank: a DeepSpeed engine around the aligned policy.

Suffixes: B sequences, T response tokens.
"""

import gc
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim.lr_scheduler import LambdaLR

from qarl.config.derived import kernel_of, numerics_of, sleeps
from qarl.config.run import Config
from qarl.config.schedule import scheme_at, schemes_of
from qarl.errors import CheckpointError, QarlError, first_line
from qarl.logs import redirect_output
from qarl.metrics import Metrics, maximum, mean
from qarl.numerics.dense import set_gradient_precision
from qarl.numerics.vllm_patch import PROCESS_ENV
from qarl.objectives.custom import check_objective
from qarl.objectives.ratios import LossInputs, Ratios, bounded_exp
from qarl.objectives.registry import compute_loss
from qarl.quant.changes import CodeChanges
from qarl.quant.linear import quantized_linears, requantize, switch_scheme
from qarl.quant.parity import Parity, check_parity, processor_note
from qarl.quant.publish import checkpoint_tensors, write_checkpoint
from qarl.quant.scheme import KernelKind, QuantScheme
from qarl.trace import StepTrace, span
from qarl.types import Numerics, TrainSequence
from qarl.weights.source import MakeSender, Manifest, WeightSender
from qarl.weights.wire import in_buckets, make_manifest
from trainer.batching import Batch, micro_batches, pad, prox_of
from trainer.deepspeed_files import TAG, UNREADABLE, plain_data_only, saved_ranks, universal_copy
from trainer.kept_weights import KeptWeights
from trainer.policy import Policy, PolicyOutput
from trainer.rendezvous import join_ranks, set_environment
from trainer.weights import StoredWeights, store

LOG = logging.getLogger(__name__)
Logprobs = npt.NDArray[np.float32]
CLIPPED = "actor/clip_fraction"
"""A metric of the objectives that is also logged for a step's last minibatch alone."""
MALLOC_ENV = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_TOP_PAD_": str(2**26)}
"""glibc keeps up to 1 GiB of freed memory for the next tensors: new pages from the system took a tenth of an update."""


def learner_env(device: str, threads: int) -> dict[str, str]:
    """Environment of a process that runs a learner rank; must be set before torch is imported there."""
    common = {"HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": device}
    if device == "cuda":
        return common
    return {**common, **PROCESS_ENV, **MALLOC_ENV, "OMP_NUM_THREADS": str(threads)}


class LearnerRank:
    """One rank of the data-parallel learner. All ranks get the same calls with the same arguments.

    Args:
        config: the run's config; `model.path` is what it starts from.
        device: "cpu" or "cuda".
        rank, world_size, master: for torch.distributed; `master` is "host:port".
        make_sender: builds what `send` sends with; None when weights go through the object store.
        log_file: where the output of the rank's process goes; None leaves it where it goes.
        trace: of some steps of the process.
    """

    def __init__(
        self,
        config: Config,
        device: str,
        rank: int,
        world_size: int,
        master: str,
        make_sender: MakeSender | None = None,
        log_file: Path | None = None,
        trace: StepTrace | None = None,
    ) -> None:
        redirect_output(log_file)
        set_environment(rank, world_size, master)
        self._config, self._rank, self._world_size = config, rank, world_size
        self._device, self._make_sender, self._trace = torch.device(device), make_sender, trace

    @span("start")
    def start(self) -> None:
        """Load the model and start DeepSpeed; not in the constructor, whose errors Ray hands on as text only.

        Raises UsageError: the model or a setting cannot be used.
        """
        config, device = self._config, self._device.type
        check_objective(config.objective)
        scheme = self._scheme = scheme_at(config.rollout, 1)
        self._numerics = numerics_of(config, device)
        self._dtype = getattr(torch, config.model.dtype)
        set_gradient_precision(config.learner.gradient_precision)
        self._start_engine()
        if device == "cpu":
            torch.set_num_threads(max(1, config.learner.num_threads))
        self._reference: Policy | None = None
        if config.objective.kl_coef:  # as it computed before training, low precision included: the KL starts at 0
            self._reference = self._make_policy(
                scheme if config.learner.aligned else QuantScheme("none"), self._numerics
            ).requires_grad_(False)
        self._stock_policies: dict[str, Policy] = {}
        self._sender: WeightSender | None = None

    def _start_engine(self, universal: bool = False) -> None:
        """Begin with the model's weights. `universal`: the checkpoint that it will load is a universal one."""
        config = self._config
        self._policy = self._make_policy(
            self._scheme if config.learner.aligned else QuantScheme("none"), self._numerics
        )
        self._policy.train()
        if config.learner.gradient_checkpointing:
            self._policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        self._engine = _deepspeed_engine(self._policy, config, self._device, universal)
        self._kept = KeptWeights(self._policy)

    @span("parity")
    def parity(self) -> list[Parity]:
        """How this process's arithmetic compares with the engine's ops."""
        if self._numerics != "engine":
            return []
        return check_parity(self._policy.model.config, self._dtype, self._scheme, self._kernel())

    def processor_note(self) -> str:
        """What the user should know of this rank's processor; empty for nothing."""
        return processor_note(schemes_of(self._config.rollout), self._device)

    @span("score")
    def score(
        self, sequences: Sequence[TrainSequence], aligned: bool = True, version: int | None = None
    ) -> dict[int, Logprobs]:
        """Log-probs of the `sequences` that this rank computes, by index; by the weights of a kept `version`."""
        policy = self._policy if aligned else self._stock_policy(QuantScheme("none"))
        rows: dict[int, Logprobs] = {}
        with torch.no_grad(), nullcontext() if version is None else self._kept.of(version):
            for indices in self._micro_batches(policy, sequences):
                batch = Batch.of([sequences[i] for i in indices or [0]], self._device)
                logp_BT = policy(batch).logprobs_BT.cpu()  # an idle rank computes too: sharding is collective
                for row, index in enumerate(indices):
                    rows[index] = logp_BT[row, : len(sequences[index].response_ids)].numpy().copy()
        return rows

    @span("update")
    def update(self, minibatches: Sequence[Sequence[TrainSequence]]) -> tuple[list[Metrics], list[float]]:
        """One optimizer step per minibatch.

        Returns this rank's partial metrics, and max |r_seq - 1| of each of its micro-batches of the first minibatch.
        """
        LOG.info("learns from %s sequences", [len(minibatch) for minibatch in minibatches])
        parts: list[Metrics] = []
        deviations: list[float] = []
        changes = CodeChanges(self._policy, self._gather, self._rank, self._world_size)
        for index, sequences in enumerate(minibatches):
            rank_batches = self._micro_batches(self._policy, sequences)
            lr = self._engine.get_lr()[0]  # before the step: the rate that it uses
            for number, indices in enumerate(rank_batches):
                self._engine.set_gradient_accumulation_boundary(number == len(rank_batches) - 1)
                inputs = self._loss_inputs(sequences, indices)
                if index == 0 and indices:
                    deviations.append(_ratio_deviation(inputs))
                metrics = self._backward(inputs, indices)
                parts.append(metrics)
                if index == len(minibatches) - 1 and CLIPPED in metrics:
                    parts.append({f"{CLIPPED}_last_minibatch": metrics[CLIPPED]})
                plain_norm = self._plain_norm() if number == len(rank_batches) - 1 else None
                self._engine.step()
            requantize(self._policy, self._gather)
            norm = float(self._engine.get_global_grad_norm()) if plain_norm is None else plain_norm
            norms = {"actor/grad_norm": mean(norm, 1), "actor/grad_norm_max": maximum(norm)}
            parts.append({"actor/lr": mean(lr, 1), **norms})
        parts.append(changes.metrics())
        return parts, deviations

    @span("publish")
    def publish(self, version: int) -> StoredWeights | None:
        """Put the current weights, in the engine's format, into Ray's object store; rank 0 returns them."""
        self._trace_until(version)
        if self._config.mismatch.stale_share:
            self._kept.keep(version, oldest=version - self._config.train.max_staleness)
        stored = None
        if self._rank == 0:
            stored = store(in_buckets(self._published_tensors(), copy=False), version, self._scheme.label)
        else:
            for _ in self._published_tensors():  # gathering sharded parameters is collective
                pass
        self._make_room()
        return stored

    @span("send")
    def send(self, version: int, workers: Sequence[Any]) -> Manifest | None:
        """Send the current weights to the rollout workers with these handles; rank 0 returns the manifest.

        Raises PublicationError: a worker died or refused what was sent, or the connection broke.
        """
        assert self._make_sender is not None
        self._trace_until(version)
        if self._sender is None:
            self._sender = self._make_sender(self._rank, self._published_tensors)
        digests = self._sender.send(workers)
        self._make_room()
        return make_manifest(version, self._scheme.label, digests) if self._rank == 0 else None

    def _make_room(self) -> None:
        """Give back what torch keeps of freed GPU memory, for an engine that wakes next."""
        if sleeps(self._config, self._device.type):
            torch.cuda.empty_cache()

    def _trace_until(self, version: int) -> None:
        if self._trace:
            self._trace.published(version)

    def _published_tensors(self) -> Iterator[tuple[str, Tensor]]:
        return checkpoint_tensors(self._quantized_policy().model, self._gather)

    @span("switch")
    def switch(self, scheme: QuantScheme) -> None:
        """Compute and publish in `scheme` from now on; the layers that are quantized stay the same."""
        self._scheme = scheme
        self._stock_policies = {}
        self._sender = None
        switch_scheme(self._policy.model, scheme, self._kernel(), self._gather)

    @span("save")
    def save(self, directory: str) -> None:
        """DeepSpeed checkpoint under `directory`. Raises QarlError when it cannot be written."""
        try:
            self._engine.save_checkpoint(directory, tag=TAG)
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError on a full disk
            raise QarlError(f"cannot be written: {first_line(error)}", directory, "make room, start again") from error

    @span("load")
    def load(self, directory: str) -> None:
        """Restore parameters, optimizer and schedule of any number of ranks. Raises CheckpointError."""
        is_universal = saved_ranks(directory) not in (0, self._world_size)
        if is_universal != self._engine.load_universal_checkpoint():  # it loads one kind only
            self._engine.destroy()
            del self._policy, self._engine, self._kept
            gc.collect()  # before the next one is built: there may be no room for two
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            self._start_engine(is_universal)
        with universal_copy(directory, self._rank) if is_universal else nullcontext(directory) as folder:
            self._load(folder)

    def _load(self, directory: str) -> None:
        try:
            with plain_data_only():
                path, _ = self._engine.load_checkpoint(directory, tag=TAG)
        except UNREADABLE as error:
            raise CheckpointError(f"cannot be loaded: {first_line(error)}", directory, "see its rank's log") from error
        if path is None:
            raise CheckpointError("holds no DeepSpeed checkpoint", where=directory, hint="start with run.resume=false")
        requantize(self._policy, self._gather)

    @span("export")
    def export(self, directory: str, quantized: bool) -> None:
        """Write a Hugging Face folder; with `quantized` in compressed-tensors format."""
        scheme = self._scheme if quantized else QuantScheme("none")
        policy = self._quantized_policy() if quantized else self._policy
        tensors = checkpoint_tensors(policy.model, self._gather, quantized)
        if self._rank == 0:
            write_checkpoint(tensors, Path(directory), Path(self._config.model.path), scheme)
        else:
            for _ in tensors:  # gathering sharded parameters is collective
                pass

    def _loss_inputs(self, sequences: Sequence[TrainSequence], indices: list[int]) -> LossInputs:
        """A micro-batch after its forward; an idle rank takes any, because the forward is collective."""
        rows = indices or [0]
        prox = [prox_of(sequences[i]) for i in rows]
        batch = Batch.of([sequences[i] for i in rows], self._device)
        output = self._forward(batch)
        return LossInputs(
            logp_theta_BT=output.logprobs_BT,
            logp_prox_BT=pad(prox, batch.mask_BT),
            logp_samp_BT=pad([sequences[i].sampler_logprobs_T for i in rows], batch.mask_BT),
            mask_BT=batch.loss_mask_BT,
            advantage_B=torch.tensor([sequences[i].advantage for i in rows], dtype=torch.float32, device=self._device),
            num_sequences=len(sequences),
            num_tokens=sum(sequence.loss_tokens for sequence in sequences),
            ids=[sequences[i].id for i in rows],
            logp_ref_BT=None if self._reference is None else self._reference(batch).logprobs_BT,
            entropy_BT=output.entropy_BT,
        )

    def _backward(self, inputs: LossInputs, indices: list[int]) -> Metrics:
        loss, metrics = compute_loss(inputs, self._config.objective)
        # DeepSpeed averages gradients over ranks, but the loss is already divided by the size of the whole minibatch.
        # An idle rank joins the collective calls with a gradient of 0.
        self._engine.backward(loss * (self._world_size if indices else 0))
        return metrics if indices else {}

    def _forward(self, batch: Batch) -> PolicyOutput:
        """Log-probs with gradient, and entropies when the objective or a metric needs them."""
        entropy = "value" if self._config.learner.calculate_entropy else "none"
        if self._config.objective.entropy_coef:
            entropy = "gradient"
        return self._engine(batch, entropy)

    def _micro_batches(self, policy: Policy, sequences: Sequence[TrainSequence]) -> list[list[int]]:
        """This rank's micro-batches as indices: as many on every rank, so that collectives meet; some may be empty."""
        max_tokens = self._config.learner.max_tokens_per_micro_batch
        return micro_batches(sequences, max_tokens, self._world_size, policy.keeps_padding)[self._rank]

    def _plain_norm(self) -> float | None:
        """Norm of the gradients as they are before a step, where DeepSpeed does not tell it afterwards: at stage 0 in
        float32."""
        if self._dtype != torch.float32 or self._config.learner.zero_stage:
            return None
        return get_total_norm([p.grad for p in self._policy.parameters() if p.grad is not None]).item()

    def _quantized_policy(self) -> Policy:
        """The policy that is published; the naive baseline's weights are quantized on the way out only."""
        return self._policy if self._config.learner.aligned else self._stock_policy(self._scheme)

    def _stock_policy(self, scheme: QuantScheme) -> Policy:
        """A stock transformers model in `scheme` with the current weights."""
        if scheme.name not in self._stock_policies:
            self._stock_policies[scheme.name] = self._make_policy(scheme, "stock")
        policy = self._stock_policies[scheme.name]
        parameters = dict(checkpoint_tensors(policy.model, quantized=False))  # they share the parameters' memory
        with torch.no_grad():
            for name, tensor in checkpoint_tensors(self._policy.model, self._gather, quantized=False):
                parameters[name].copy_(tensor)
        requantize(policy)
        return policy

    def _make_policy(self, scheme: QuantScheme, numerics: Numerics) -> Policy:
        config = self._config
        settings = (config.rollout.sampling.temperature, self._device, self._kernel())
        return Policy(config.model.path, self._dtype, scheme, numerics, *settings, config.rollout.tensor_parallel_size)

    def _kernel(self) -> KernelKind:
        return kernel_of(self._config, self._numerics, self._device.type)

    def _gather(self, parameters: list[nn.Parameter]) -> AbstractContextManager[object]:
        if self._config.learner.zero_stage < 3:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(parameters)


def _ratio_deviation(inputs: LossInputs) -> float:
    """max |r_seq - 1| of the sequences."""
    r_B = bounded_exp(Ratios.of(inputs).log_r_B.detach())
    return (r_B - 1).abs().max().item()


def _deepspeed_engine(policy: Policy, config: Config, device: torch.device, universal: bool) -> Any:
    import deepspeed
    import deepspeed.ops

    if device.type == "cpu":
        # Skips a 40 s compilation at the first start; gloo carries the gradients instead. Guarded by a test.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    join_ranks(device.type)
    deepspeed.init_distributed(auto_mpi_discovery=False)
    optimizer = config.learner.optimizer
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # nominal: the learner sets the accumulation boundary itself
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optimizer.max_grad_norm,
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": config.learner.zero_stage},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": optimizer.lr,
                "betas": optimizer.betas,
                "weight_decay": optimizer.weight_decay,
                "torch_adam": True,  # DeepSpeed's own are compiled at the first start, for minutes
                "fused": True,
            },
        },
        "steps_per_print": 10**9,
        "checkpoint": {"load_universal": universal},
    }
    warmup = max(1, optimizer.warmup_steps)
    engine, *_ = deepspeed.initialize(
        model=policy,
        model_parameters=[p for p in policy.parameters() if p.requires_grad],
        lr_scheduler=lambda adam: LambdaLR(adam, lambda step: min(1.0, (step + 1) / warmup)),
        config=settings,
    )
    assert all(module.weight.dtype == getattr(torch, config.model.dtype) for _, module in quantized_linears(policy))
    return engine
