"""Environment and shared fixtures. The environment must stand before torch is imported anywhere."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

os.environ.update(
    {
        "MKL_CBWR": "AVX512,STRICT",
        "OMP_NUM_THREADS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_ATTN_SPLIT_KV": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "WANDB_MODE": "offline",
    }
)

import pytest

if TYPE_CHECKING:
    from rollout.engine import VLLMEngine


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models of four architectures, two of them twice, with logits far from uniform."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from launch.demo.tiny_model import make_tokenizer

    shape = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 256,
        "max_position_embeddings": 1024,
        "initializer_range": 0.06,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    moe = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True}
    wide = {"intermediate_size": 1536}  # inputs of which oneDNN sums one row in another order than several
    large = {"num_attention_heads": 4, "head_dim": 256}  # attention prefills otherwise than it decodes in long contexts
    shapes = {"qwen3": shape, "qwen2": shape, "llama": shape | wide, "qwen3_moe": shape | moe}
    shapes["qwen3_large_heads"] = shape | large
    # A Llama as wide as SmolLM2-135M, with its heads; low-bit formats in groups of 128 cannot divide 576 features.
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
    shapes["smollm2"] = shape | heads | {"hidden_size": 576, "intermediate_size": 1536}
    architectures = {"qwen3_large_heads": "qwen3", "smollm2": "llama"}
    root = tmp_path_factory.mktemp("models")
    for kind in shapes:
        torch.manual_seed(0)
        config = AutoConfig.for_model(architectures.get(kind, kind), **shapes[kind])
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero-initialised biases would not be tested
                torch.nn.init.normal_(parameter, std=0.3)
        model.bfloat16().save_pretrained(root / kind)
        make_tokenizer(256).save_pretrained(root / kind)
    return {kind: root / kind for kind in shapes}


@pytest.fixture(scope="session")
def engine(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> VLLMEngine:
    """The one real vLLM engine of the session: W8A8, bfloat16, Qwen3. Tests load into it what they need."""
    import vllm.v1.engine.core

    from qarl.config.policy import RolloutConfig
    from qarl.quant.publish import write_engine_config
    from qarl.quant.scheme import QuantScheme
    from rollout.engine import VLLMEngine

    # The engines of a process share vLLM's process groups: another test's engine must not take them along when it goes.
    vllm.v1.engine.core.cleanup_dist_env_and_memory = lambda *_, **__: None
    folder = tmp_path_factory.mktemp("engine")
    write_engine_config(folder, tiny_models["qwen3"], QuantScheme())
    return VLLMEngine(folder, RolloutConfig(max_model_len=768, partial=True), QuantScheme(), "bfloat16", "cpu")


@pytest.fixture
def as_from_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In an empty folder, without the traceback switch; the handlers that `main` sets are taken back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.chdir(tmp_path)
    with patch.dict(os.environ):  # `main` adds to it
        os.environ.pop("QARL_TRACEBACK", None)
        yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def offline_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing answers to W&B: an offline run must not ask. Its files stay out of the home folder, and its service ends
    with the test: named in the environment, it would serve the runs that other tests kill."""
    import wandb

    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "data"))
    wandb.teardown()  # of the settings that an earlier test has read
    yield
    wandb.teardown()
    assert "WANDB_SERVICE" not in os.environ
