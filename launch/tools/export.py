"""`qarl export`: a run's newest checkpoint as a model folder, proven with vLLM before it gets its name."""

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from launch.preflight import Machine, check, checked_model, engine_faults
from launch.tools.child import end_with_parent
from qarl.config.io import load_config
from qarl.config.run import Config
from qarl.config.schedule import scheme_at
from qarl.errors import CheckpointError, ConfigError, PublicationError, first_line
from qarl.quant.linear import requantize
from qarl.quant.publish import checkpoint_tensors, publish, write_checkpoint
from qarl.quant.scheme import QuantScheme
from qarl.types import Prompt, SampleRequest
from rollout.engine import engine_env
from rollout.stock import Sampled, sample_published, sample_stock
from trainer.checkpoint import CheckpointStore
from trainer.deepspeed_files import checkpoint_weights
from trainer.policy import Policy

PROMPTS, PROMPT_TOKENS, RESPONSE_TOKENS = 16, 12, 32


def export(run_dir: Path, out: Path, scheme: QuantScheme | None) -> str:
    """Write the newest checkpoint of `run_dir` to the new folder `out`, in `scheme` or that of its rollouts.

    Stock vLLM, given the folder, must sample the tokens and log-probs of a rollout worker, given the learner's tensors,
    bit for bit (on CPU both with the kernels of a run); else there is no folder. Returns a line for the user.

    Raises:
        ConfigError: `run_dir` is no run's, or `out` exists.
        PreflightError: vLLM has no kernel of the scheme here, or none for the model's experts.
        CheckpointError: the run has no whole checkpoint, or one of another model.
        PublicationError: the folder cannot be written, or vLLM cannot load it, or computes something else from it.
    """
    transformers_logging.disable_progress_bar()
    part = out.with_name(f"{out.name}.unproven")
    if out.exists():
        raise ConfigError(f"{out} exists", hint="name a new folder")
    if part.exists():
        raise ConfigError(f"{part} exists: another export is at work, or was killed", hint="remove it")
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"{run_dir} is no run's folder", hint="name one that holds config.yaml and checkpoints/")
    config = load_config(run_dir / "config.yaml", [])
    found = CheckpointStore(run_dir / "checkpoints", config.train.keep_checkpoints).latest(print)
    if found is None:
        raise CheckpointError("the run has no checkpoint yet", str(run_dir), "see train.checkpoint_every")
    directory, state = found
    step = max(1, state["step"])
    of_run = scheme_at(config.rollout, step)
    scheme = of_run if scheme is None else QuantScheme.of(scheme.name, config.rollout.ignore, scheme.group_size)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not Path(config.model.path).is_dir():
        raise ConfigError(f"{config.model.path} is not here", "model.path", "start this where the run was started")
    check(engine_faults(config, scheme, checked_model(config), Machine(device, is_here=True)))
    os.environ["DS_ACCELERATOR"] = device
    policy = Policy(config.model.path, getattr(torch, config.model.dtype), scheme, "stock", kernel="reference")
    try:
        policy.load_state_dict(checkpoint_weights(directory, config.learner.zero_stage))
    except RuntimeError as error:
        raise CheckpointError(f"does not fit {config.model.path}: {first_line(error)}", directory) from error
    requantize(policy.model)
    try:
        tensors = checkpoint_tensors(policy.model, quantized=scheme.quantizes)
        write_checkpoint(tensors, part, Path(config.model.path), scheme)
        _prove(config, policy, scheme, part, device)
        part.rename(out)
    except (OSError, SafetensorError) as error:
        raise PublicationError(f"cannot be written: {error}", str(out), "nothing was left there") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return f"{out}: step {step} in {scheme.label}; vLLM samples from it what a rollout worker samples, bit for bit"


def _prove(config: Config, policy: Policy, scheme: QuantScheme, folder: Path, device: str) -> None:
    """Raises PublicationError unless stock vLLM on `folder` and a rollout worker with the policy's tensors agree."""
    sizes = {"max_model_len": PROMPT_TOKENS + RESPONSE_TOKENS, "tensor_parallel_size": 1}
    rollout = config.rollout.model_copy(update=sizes)
    vocabulary, random = policy.model.config.vocab_size, Random(0)
    requests = [
        SampleRequest(
            Prompt(str(i), "", "", tuple(random.randrange(vocabulary) for _ in range(PROMPT_TOKENS))),
            seed=i,
            temperature=1.0,
            max_new_tokens=RESPONSE_TOKENS,
            ignore_eos=True,
        )
        for i in range(PROMPTS)
    ]
    os.environ.update(engine_env(device, rollout))
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
    dtype = config.model.dtype
    weights = publish(policy.model, scheme, 0)
    ours = _in_own_process(sample_published, weights, folder, rollout, scheme, dtype, device, requests)
    stock = _in_own_process(sample_stock, folder, rollout, dtype, device, requests)
    if differing := sum(a != b for a, b in zip(stock, ours, strict=True)):
        what = f"{differing} of {len(requests)} responses of stock vLLM differ from a rollout worker's"
        raise PublicationError(what, f"export in {scheme.label}", "nothing was written")


def _in_own_process(sample: Callable[..., Sampled], *args: Any) -> Sampled:
    """A process holds one engine."""
    try:
        with ProcessPoolExecutor(1, get_context("spawn"), end_with_parent) as process:
            return process.submit(sample, *args).result()
    except (BrokenProcessPool, RuntimeError, ValueError, OSError) as error:
        what = f"vLLM cannot run what was exported: {first_line(error)}"
        raise PublicationError(what, "export", "nothing was written") from error
