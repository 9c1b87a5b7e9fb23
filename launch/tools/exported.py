"""The work of `qarl export`: a checkpoint's model in a folder, which vLLM must sample from as a rollout worker does."""

import os
import shutil
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from launch.machine import Machine
from launch.preflight import check, checked_model, engine_faults
from launch.tools.child import own_process
from qarl.config.run import Config
from qarl.errors import CheckpointError, PublicationError, first_line
from qarl.quant.linear import requantize
from qarl.quant.publish import checkpoint_tensors, publish, write_checkpoint
from qarl.quant.scheme import QuantScheme
from qarl.types import Prompt, SampleRequest
from rollout.engine import engine_env
from rollout.stock import Sampled, sample_published, sample_stock
from trainer.deepspeed_files import checkpoint_weights
from trainer.policy import Policy

PROMPTS, PROMPT_TOKENS, RESPONSE_TOKENS = 16, 12, 32


def write_proven(config: Config, directory: str, scheme: QuantScheme, part: Path, out: Path) -> None:
    """Write the checkpoint in `directory` to `part` in `scheme`, prove that folder, and rename it to `out`.

    Raises as `launch.tools.export.export` does.
    """
    transformers_logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check(engine_faults(config, scheme, checked_model(config), Machine(device, is_here=True)))
    os.environ["DS_ACCELERATOR"] = device
    policy = Policy(config.model.path, getattr(torch, config.model.dtype), scheme, "stock", kernel="reference")
    try:
        policy.load_state_dict(checkpoint_weights(directory, config.learner.zero_stage))
    except RuntimeError as error:
        what = f"does not fit {config.model.path}: {first_line(error)}"
        raise CheckpointError(what, directory, "set model.path to the model of the run") from error
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
        with own_process() as call:
            return list(call(sample, *args))
    except (BrokenProcessPool, RuntimeError, ValueError, OSError) as error:
        what = f"vLLM cannot run what was exported: {first_line(error)}"
        raise PublicationError(what, "export", "nothing was written") from error
