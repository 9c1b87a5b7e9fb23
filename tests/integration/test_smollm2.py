"""A pretrained model in the real engine against the learner, bit for bit. By name: it downloads 93 MB.

pytest -m slow tests/integration/test_smollm2.py
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from launch.demo.pretrained import fetch
from qarl.config.io import load_config
from qarl.config.policy import RolloutConfig
from qarl.config.shipped import config_path
from qarl.quant.publish import publish, write_engine_config
from qarl.quant.scheme import QuantScheme
from qarl.types import Prompt, SampleRequest
from rollout.engine import VLLMEngine
from tests.support.real_engine import gap
from trainer.policy import Policy

QUESTIONS = ("What is 3 + 4?", "Tom has 5 apples and buys 7 more. How many apples does he have? Think step by step.")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = load_config(config_path("smollm2_chain_sum"), []).model.fetch
    assert source is not None
    path = tmp_path_factory.mktemp("smollm2") / "model"
    fetch(source, path, print)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scheme", ["none", "w8a8_int8"])
def test_groups_of_long_responses_have_no_mismatch(scheme: str, dtype: str, model: Path, tmp_path: Path) -> None:
    """Four responses share each prompt in the learner's forward, as in training."""
    form = QuantScheme.of(scheme, ("lm_head",), 128)  # type: ignore[arg-type]
    write_engine_config(tmp_path, model, form)
    engine = VLLMEngine(tmp_path, RolloutConfig(max_model_len=256), form, dtype, "cpu")
    policy = Policy(model, getattr(torch, dtype), form, "engine")
    engine.load(publish(policy.model, form, 0))
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = []
    for text in QUESTIONS:
        turn = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
        prompts.append(Prompt(text, text, "", tuple(ids)))
    samples = engine.generate([SampleRequest(prompt, seed, 1.0, 96) for prompt in prompts for seed in range(4)])
    assert max(len(sample.response_ids) for sample in samples) > 60
    assert gap(policy, samples).abs_max == 0.0
    unaligned = Policy(model, getattr(torch, dtype), QuantScheme("none"), "stock")
    assert gap(unaligned, samples).abs_max > 0.0
