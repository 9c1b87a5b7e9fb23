"""`qarl bench publish`: bytes and time of a publication, beside a bfloat16 checkpoint that the engine quantizes again.

A process of its own for each scheme holds learner and engine; buckets go through Ray's object store as in a run.
"""

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from launch.cluster.token import confine_own_ray
from launch.demo.tiny_model import make_tokenizer
from launch.tools.bench.compare import HEADER, Case, compare
from launch.tools.child import own_process
from qarl.config.policy import RolloutConfig
from qarl.errors import ConfigError, KernelError
from qarl.quant.formats import engine_kernels, format_of
from qarl.quant.linear import quantized_linears, requantize
from qarl.quant.publish import checkpoint_tensors, write_engine_config
from qarl.quant.scheme import QuantScheme
from qarl.weights.wire import in_buckets, unpack
from rollout.engine import VLLMEngine, engine_env
from trainer.policy import Policy
from trainer.weights import StoredWeights, store

SCHEMES = (QuantScheme(), QuantScheme("w4a16"), QuantScheme("fp8_channel"))
VOCABULARY, HEAD_DIM = 4096, 64
AGAIN, SENT, PROVEN = "bfloat16 checkpoint, quantized again", "publication, not read back", "publication"


def bench(hidden: int, layers: int, rounds: int, model: Path | None) -> Iterator[str]:
    """The lines of the report, as soon as each is known. A scheme without an engine here is left out by name.

    `model`: a Hugging Face folder in place of a random Qwen3.
    """
    yield f"{model or f'Qwen3 of {layers} layers, width {hidden}'}; {rounds} rounds, wall time\n\n{HEADER}"
    os.environ.update(engine_env("cpu", RolloutConfig()))
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore", "RAY_USAGE_STATS_ENABLED": "0"}
    confine_own_ray()
    sizes = []
    for scheme in SCHEMES:
        try:
            engine_kernels(scheme, "cpu")
            with own_process() as call:
                rows, size = call(measure, scheme, hidden, layers, rounds, model)
        except (ConfigError, KernelError) as error:
            sizes.append(f"{scheme.label}: left out: {error}")
            continue
        yield from rows
        sizes.append(size)
    yield from ["", *sizes]


def measure(scheme: QuantScheme, hidden: int, layers: int, rounds: int, model: Path | None) -> tuple[list[str], str]:
    """Table rows, and a line about bytes. Starts an engine and Ray in this process."""
    import ray

    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="error")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, "step.safetensors")
        if model is None:
            make_model(model := Path(folder, "model"), hidden, layers)
        policy = Policy(model, torch.bfloat16, scheme, "stock")
        write_engine_config(Path(folder, "engine"), model, scheme)
        engine = VLLMEngine(Path(folder, "engine"), RolloutConfig(max_model_len=128), scheme, "bfloat16", "cpu")

        def through_disk() -> None:
            tensors = checkpoint_tensors(policy.model, quantized=False)
            save_file({name: tensor.contiguous().clone() for name, tensor in tensors}, checkpoint)
            engine.reload(quantized_again(checkpoint, scheme))

        def publish() -> StoredWeights:
            move(policy.model)
            return store(in_buckets(checkpoint_tensors(policy.model), copy=False), 0, scheme.label)

        runs = {
            AGAIN: through_disk,
            SENT: lambda: engine.reload(unpack(publish())),
            PROVEN: lambda: engine.load(publish()),
        }
        rows = compare(Case(scheme.label, runs), rounds, time.perf_counter)
        line = count_bytes(policy, scheme)
    ray.shutdown()
    return rows, line


def move(model: nn.Module) -> None:
    """Change every weight, as an optimizer's step does: a layer that has not changed is not always read back."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    requantize(model)


def make_model(folder: Path, hidden: int, layers: int) -> None:
    """Write a random Qwen3 in bfloat16."""
    sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers}
    heads = {"num_attention_heads": hidden // HEAD_DIM, "num_key_value_heads": max(1, hidden // HEAD_DIM // 4)}
    config = AutoConfig.for_model(
        "qwen3", **sizes, **heads, head_dim=HEAD_DIM, vocab_size=VOCABULARY, tie_word_embeddings=True
    )
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    make_tokenizer(VOCABULARY).save_pretrained(folder)


def quantized_again(checkpoint: Path, scheme: QuantScheme) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a full-precision checkpoint file, linear layers quantized on the way."""
    format_ = format_of(scheme)
    with safe_open(checkpoint, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            module, _, kind = name.rpartition(".")
            if kind == "weight" and module.endswith("_proj"):
                for key, tensor in format_.quantize(file.get_tensor(name)).items():
                    yield f"{module}.{key}", tensor
            else:
                yield name, file.get_tensor(name)


def count_bytes(policy: Policy, scheme: QuantScheme) -> str:
    """Published bytes by those of bfloat16: of the linear layers, and of everything."""
    linear = {name: 2 * module.weight.numel() for name, module in quantized_linears(policy.model)}
    sent = {name: tensor.nbytes for name, tensor in checkpoint_tensors(policy.model)}
    low_bit = sum(size for name, size in sent.items() if name.rpartition(".")[0] in linear)
    plain = sum(linear.values())
    rest = sum(sent.values()) - low_bit
    return (
        f"{scheme.label}: {sum(sent.values()) / 1e6:.1f} MB, of bfloat16's {(plain + rest) / 1e6:.1f} MB "
        f"{sum(sent.values()) / (plain + rest):.3f}; linear layers {low_bit / plain:.3f}"
    )
