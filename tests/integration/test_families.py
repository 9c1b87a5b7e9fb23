"""Fourteen model families, tiny and random: trained three steps, or refused in one line before anything starts.

`pytest -m slow tests/integration/test_families.py` compares the outcomes with the table in docs/models.md; with `-s` it
prints the rows.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from launch.demo.minimal import Mailer, publish, train_step
from launch.demo.tiny_model import make_tokenizer
from launch.machine import Machine
from launch.preflight import faults
from launch.run.prompts import load_prompts
from qarl.config.io import load_config
from qarl.config.run import Config
from qarl.config.schedule import scheme_at
from qarl.config.shipped import config_path
from qarl.prompts.pool import Pool
from qarl.quant.publish import write_engine_config
from rollout.engine import VLLMEngine
from trainer.learner import LearnerRank

pytestmark = pytest.mark.slow

TABLE = Path(__file__).parents[2] / "docs" / "models.md"
MOE = {"num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    # Experts first: the first engine of a process makes the process groups of all, and dense models need fewer.
    "Qwen3-MoE": ("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 64, **MOE}),
    "Llama": ("llama", {}),
    "Qwen2": ("qwen2", {}),
    "Qwen3": ("qwen3", {}),
    "Mistral": ("mistral", {"sliding_window": None}),
    "Mistral, sliding window": ("mistral", {"sliding_window": 8}),
    "Mixtral": ("mixtral", {"num_local_experts": 4, **MOE}),
    "Phi-3": ("phi3", {}),
    "Gemma-2": ("gemma2", {"sliding_window": 8}),
    "Gemma-3": ("gemma3_text", {"sliding_window": 8}),
    "Granite": ("granite", {"logits_scaling": 8.0}),
    "Cohere": ("cohere", {}),
    "OLMo-2": ("olmo2", {}),
    "GPT-NeoX": ("gpt_neox", {}),
    "GPT-2": ("gpt2", {}),
}
SMALL = (
    "train.steps=3",
    "train.prompts_per_step=8",
    "train.group_size=4",
    "learner.minibatches=2",
    "rollout.sampling.max_new_tokens=8",
    "learner.num_ranks=1",
    "rollout.num_workers=1",
)


def build(name: str, path: Path) -> None:
    kind, changes = FAMILIES[name]
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 1024}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.06}
    config = AutoConfig.for_model(kind, **(sizes | heads | special | changes))
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(path)
    make_tokenizer(256).save_pretrained(path)


def outcome(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """max |d log p| of three steps, or that the run does not start."""
    if found := faults(config, Machine("cpu", is_here=True)):
        assert all("\n" not in str(fault) for fault in found)
        return "refused"
    scheme = scheme_at(config.rollout, 1)
    write_engine_config(tmp_path / "engine", Path(config.model.path), scheme)
    _, prompts, _ = load_prompts(config, print)
    engine = VLLMEngine(tmp_path / "engine", config.rollout, scheme, config.model.dtype, "cpu")
    learner = LearnerRank(config, "cpu", rank=0, world_size=1, master="127.0.0.1:0", make_sender=Mailer)
    learner.start()
    publish(learner, engine, 0)
    capsys.readouterr()
    pool = Pool(prompts, config.pool, 0)
    for step in range(1, config.train.steps + 1):
        train_step(config, pool, engine, learner, step)
        publish(learner, engine, step)
    gaps = [float(gap) for gap in re.findall(r"max \|d log p\| (\S+)", capsys.readouterr().out)]
    assert len(gaps) == config.train.steps
    assert all(map(math.isfinite, gaps))
    return f"trains, {max(gaps):.2g}" if max(gaps) else "trains, exactly 0"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_trains_or_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import vllm.v1.engine.core

    # The engines of a process share vLLM's process groups: one must not take them along when it goes.
    monkeypatch.setattr(vllm.v1.engine.core, "cleanup_dist_env_and_memory", lambda *_, **__: None)
    build(name, tmp_path / "model")
    found: list[str] = []
    for numerics in ("auto", "stock"):
        own = [f"model.path={tmp_path}/model", "model.build=null", f"learner.numerics={numerics}"]
        config = load_config(config_path("quickstart"), [*SMALL, *own])
        try:
            found.append(outcome(config, tmp_path, capsys))
        except BaseException as error:
            with capsys.disabled():
                print(f"{name}, {numerics}: {error!r:.300}")
            raise
        if found[0].startswith("trains"):
            break
    row = f"| {name} | {' | '.join([*found, '-'][:2])} |"
    with capsys.disabled():
        print(row)
    rows = TABLE.read_text().splitlines() if TABLE.exists() else []
    listed = {line.split(" | ")[0].removeprefix("| "): line for line in rows}
    without_figures = re.compile(r"trains, [1-9][^|]*|trains, 0\.[^|]*")
    assert without_figures.sub("trains ", row) == without_figures.sub("trains ", listed.get(name, ""))
