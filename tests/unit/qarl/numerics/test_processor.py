"""What a processor lacks: roundings that follow the engine's, and what a run says or refuses at its start."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

from launch.machine import Machine
from launch.preflight import engine_faults, faults, model_config
from launch.train import _Job
from qarl.config.io import load_config
from qarl.config.schedule import schemes_of
from qarl.model_folder import meta_model
from qarl.numerics import processor
from qarl.numerics.processor import cut_off, round_as_engine
from qarl.quant import fp8
from qarl.quant.parity import Parity, processor_note
from qarl.quant.scheme import QuantScheme

CPU = torch.device("cpu")
QUICKSTART = Path(__file__).parents[4] / "configs" / "quickstart.yaml"
NOTE = "no VNNI on this processor: the engine's W8A8 sums saturate; the engine kernel of the learner follows bit for"


def test_cutting_off_goes_towards_zero() -> None:
    x = torch.randn(1000, generator=torch.manual_seed(0)) * 10
    cut = cut_off(x, torch.bfloat16)
    assert cut.dtype == torch.bfloat16
    assert (cut.float().abs() <= x.abs()).all()
    assert ((x - cut.float()).abs() < x.abs() * 2**-7).all()
    assert (cut != x.bfloat16()).any()
    assert torch.equal(cut_off(cut.float(), torch.bfloat16), cut)
    assert cut_off(x, torch.float32) is x


@pytest.mark.parametrize("avx512", [True, False])
def test_rounding_as_the_engine_has_the_gradient_of_a_cast(avx512: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "has_avx512", lambda: avx512)
    x = torch.randn(100, generator=torch.manual_seed(0), requires_grad=True)
    y = round_as_engine(x, torch.bfloat16)
    assert torch.equal(y, x.bfloat16() if avx512 else cut_off(x.detach(), torch.bfloat16))
    upstream = torch.randn(100).bfloat16()
    (grad,) = torch.autograd.grad(y, x, upstream)
    assert torch.equal(grad, upstream.float())


def test_few_rows_are_filled_up() -> None:
    q_x, _ = fp8.quantize_activation(torch.randn(3, 8))
    filled = fp8.enough_rows(q_x).float()
    assert filled.shape == (4, 8)
    assert torch.equal(filled[:3], q_x.float())
    assert not filled[3].any()
    assert len(fp8.enough_rows(filled.to(fp8.E4M3).repeat(2, 1))) == 8


def test_saturating_sums_are_told_where_they_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    w8a8, w4a8 = QuantScheme(), QuantScheme("w4a8")
    monkeypatch.setattr(processor, "has_vnni", lambda: False)
    assert processor_note([w4a8, w8a8], CPU).startswith(NOTE)
    assert "\n" not in processor_note([w8a8], CPU)
    assert processor_note([w4a8, QuantScheme("none")], CPU) == processor_note([w8a8], torch.device("cuda")) == ""
    monkeypatch.setattr(processor, "has_vnni", lambda: True)
    assert processor_note([w8a8], CPU) == ""


@pytest.mark.parametrize("note", ["", NOTE])
def test_a_run_says_it_once_beside_the_parity(note: str) -> None:
    lines: list[str] = []
    job = object.__new__(_Job)
    job._config, job._device, job._log = load_config(QUICKSTART, []), "cpu", lines.append
    learner = SimpleNamespace(parity=lambda: [Parity("head", 0, 8)], processor_note=lambda: note)
    assert job._check_numerics(learner)
    assert lines == [*([note] if note else []), "numerics engine: head exact"]


@pytest.mark.parametrize("later", [False, True])
def test_w4a16_without_avx512_is_an_error_before_any_actor(later: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "has_avx512", lambda: False)
    asked = ["rollout.schedule=[{from_step: 9, scheme: w4a16}]"] if later else ["rollout.scheme=w4a16"]

    def found(machine: Machine) -> list[str]:
        return [fault for fault in map(str, faults(load_config(QUICKSTART, asked), machine)) if "AVX-512" in fault]

    [fault] = found(Machine("cpu", is_here=True))
    start = "rollout.scheme: vLLM has no w4a16 kernel on a processor without AVX-512; take w8a8_int8, w4a8, fp8"
    assert fault.startswith(start)
    assert found(Machine("cuda", is_here=True)) == found(Machine("cpu")) == []
    monkeypatch.setattr(processor, "has_avx512", lambda: True)
    assert found(Machine("cpu", is_here=True)) == []


def test_int8_experts_without_avx512_are_an_error_before_any_actor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "num_experts": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "num_hidden_layers": 1}
    AutoConfig.for_model("qwen3_moe", vocab_size=64, **sizes, **heads).save_pretrained(tmp_path)
    config = load_config(QUICKSTART, [f"model.path={tmp_path}"])
    monkeypatch.setattr(processor, "has_avx512", lambda: False)
    scheme, model = schemes_of(config.rollout)[0], meta_model(model_config(config))

    def found(machine: Machine) -> list[str]:
        return list(map(str, engine_faults(config, scheme, model, machine)))

    [fault] = found(Machine("cpu", is_here=True))
    assert "experts in w8a8_int8 with bfloat16 on cpu without AVX-512; add 're:" in fault
    assert found(Machine("cpu")) == found(Machine("cuda", is_here=True)) == []
    monkeypatch.setattr(processor, "has_avx512", lambda: True)
    assert found(Machine("cpu", is_here=True)) == []
