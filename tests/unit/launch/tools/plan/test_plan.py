"""`qarl plan` from the command line: exit codes, reasons, and what it says of shipped and published models."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from launch.preflight import model_config
from launch.tools.plan import command
from launch.tools.plan.devices import CPU, GPUS, Device
from launch.tools.plan.measure import measure
from launch.tools.plan.planner import GPU_RESERVE, Planner
from launch.tools.plan.result import Estimate, Plan, Times, _range
from launch.tools.plan.shapes import shapes_of
from qarl.config.io import load_config
from qarl.config.run import Config
from qarl.errors import ConfigError
from qarl.model_folder import meta_model
from qarl.numerics import processor
from tests.support.plan_models import QWEN2_5_7B, QWEN3_30B_A3B

ROOT = Path(__file__).parents[5]
Run = Callable[..., tuple[int, dict[str, Any], list[str]]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `qarl plan ... --json` in an empty folder, as on a processor with AVX-512.

    Gives exit code, JSON and the lines on stderr.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processor, "has_avx512", lambda: True)

    def plan(*argv: str) -> tuple[int, dict[str, Any], list[str]]:
        capsys.readouterr()
        code = main(["plan", *argv, "--json"])
        out, err = capsys.readouterr()
        return code, json.loads(out) if out else {}, err.splitlines()

    return plan


@pytest.fixture
def qwen7b(tmp_path: Path) -> list[str]:
    """Arguments that put Qwen2.5-7B into the GSM8K config, on eight learner GPUs."""
    return published(tmp_path, QWEN2_5_7B)


def published(folder: Path, keys: dict[str, Any]) -> list[str]:
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(keys))
    return ["gsm8k_qwen2.5_0.5b", f"model.path={folder / 'model'}", "learner.num_ranks=8", "mismatch.unaligned_every=0"]


def test_quickstart_can_be_planned_before_its_model_is_made(run: Run) -> None:
    code, plan, err = run("quickstart", "cluster.device=cpu")
    assert (code, err, plan["faults"]) == (0, [], [])
    assert plan["parameters"] == 1_193_472  # README
    assert plan["engine"]["kv_per_token"] == 2 * 3 * 2 * 32 * 2
    kernels = {row["engine_kernel"] for row in plan["layers"]}
    assert kernels == {"CPUInt8ScaledMMLinearKernel", ""}
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("device", "setting", "fault"),
    [
        ("cpu", "rollout.transport=nccl", "rollout.transport: nccl is a transport between GPUs"),
        ("cpu", "rollout.batch_invariant=true", "rollout.batch_invariant: is a mode of the GPU engine"),
        ("h100", "rollout.transport=ipc", "rollout.transport: ipc reads the memory of a GPU that"),
        ("h100", "rollout.num_workers=3", "cluster.colocate: only one rollout worker and one learner rank can share"),
    ],
)
def test_settings_that_a_run_would_refuse_are_faults(run: Run, device: str, setting: str, fault: str) -> None:
    colocate = str("workers" in setting).lower()
    code, plan, err = run("quickstart", f"cluster.colocate={colocate}", setting, "--device", device)
    assert code == 2
    assert any(line.startswith(fault) for line in plan["faults"])
    assert any(line.startswith(f"qarl: {fault}") for line in err)


def test_a_model_that_is_not_there_is_one_line(run: Run) -> None:
    code, _, err = run("gsm8k_qwen2.5_0.5b", "model.path=models/mine")
    assert code == 2
    hint = "download a model there; `qarl plan` needs its config.json alone"
    assert err == [f"qarl: models/mine: no such model directory; {hint}"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "holds no config.json"),
        ("{", "Expecting property name"),
        ('{"model_type": "unheard_of"}', "model type `unheard_of`"),
        ('{"model_type": "gpt2"}', "plans know decoders with gated MLPs"),
        ('{"quantization_config": {"quant_method": "awq"}}', "is quantized already (awq)"),
    ],
)
def test_a_config_that_is_none(run: Run, text: str | None, words: str) -> None:
    Path("model").mkdir()
    if text is not None:
        Path("model/config.json").write_text(text)
    code, _, err = run("quickstart", "model.path=model", "cluster.device=cpu")
    assert code == 2
    assert len(err) == 1
    assert words in err[0]


def test_a_gpu_must_be_named_where_there_is_none(run: Run, qwen7b: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, _, err = run(*qwen7b)
    assert code == 2
    assert err == ["qarl: --device: which GPU? This machine has no GPU; name one of a100, h100, h200, l40s, b200"]
    says = "qarl: --measure: this machine has no h100 to measure; leave it out"
    assert run(*qwen7b, "--device", "h100", "--measure")[2] == [says]


def test_a_gpu_of_this_machine_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(ROOT / "configs" / "quickstart.yaml", ["cluster.device=cuda"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H200")
    assert command.choose_device(config, None).name == "h200"
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Quadro T1000")
    with pytest.raises(ConfigError, match="which GPU\\? This machine has quadro t1000"):
        command.choose_device(config, None)


def test_a_run_that_fits(run: Run, qwen7b: list[str]) -> None:
    code, plan, err = run(*qwen7b, "--device", "h100", "--response-tokens", "500")
    assert (code, err) == (0, [])
    assert plan["parameters"] == 7_615_616_512
    assert (plan["prompt_tokens"], plan["response_tokens"]) == (256, 500)
    own, plain = (next(e for e in plan["estimates"] if e["scheme"] == name) for name in ("w8a8_int8", "none"))
    assert own["published_bytes"] == 8_711_506_944
    assert plain["published_bytes"] == 2 * 7_615_616_512
    assert own["kv_tokens"] - plain["kv_tokens"] == pytest.approx(
        (plain["weight_bytes"] - own["weight_bytes"]) / 57_344, abs=16
    )
    assert own["times"]["step_s"] == pytest.approx(
        own["times"]["rollout_s"] + own["times"]["learner_s"] + own["times"]["publication_s"]
    )
    assert plan["verdict"][0].startswith("w8a8_int8 ")


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--device", "b200"], "w8a8_int8 on b200: model.layers.*.self_attn.q_proj [3584, 3584] and 6 more: Cutlass"),
        (["rollout.scheme=w4a8", "--device", "h100"], "the engine has no kernel on cuda"),
        (["learner.num_ranks=1", "--device", "h100"], "a learner rank needs "),
        (["rollout.gpu_memory_utilization=0.1", "--device", "h100"], "holds no sequence of rollout.max_model_len 2048"),
        (["learner.numerics=engine", "--device", "h100"], "numerics 'engine' runs on CPU, not on cuda"),
        (["rollout.ignore=[lm_hat]", "--device", "h100"], "'lm_hat' matches no linear layer of the model"),
        (["rollout.ignore=[lm_head,q_proj]", "--device", "h100"], "of which only one is quantized"),
        (["cluster.device=cpu", "learner.num_ranks=1"], "engines and learner together need "),
        (
            [
                *("cluster.device=cpu", "rollout.max_model_len=32768", "rollout.sampling.max_new_tokens=9"),
                "learner.max_tokens_per_micro_batch=32768",
            ],
            "of weights holds no",
        ),
    ],
)
def test_a_run_that_cannot_work_says_why(run: Run, qwen7b: list[str], argv: list[str], reason: str) -> None:
    code, plan, err = run(*qwen7b, *argv)
    assert code == 2
    assert [line for line in err if reason in line], err
    assert [f"qarl: {fault}" for fault in plan["faults"]] == err


def test_a_shape_that_groups_do_not_divide(run: Run) -> None:
    code, plan, err = run("quickstart", "rollout.scheme=w4a16", "rollout.group_size=128", "cluster.device=cpu")
    assert code == 2
    assert err == [
        "qarl: w4a16-g128 on cpu: model.layers.*.self_attn.q_proj [192, 192] and 5 more: "
        "groups of 128 do not divide K=192"
    ]
    assert plan["verdict"] == []
    assert run("quickstart", "rollout.scheme=w4a16", "rollout.group_size=32", "cluster.device=cpu")[0] == 0


def test_a_processor_without_avx512_has_no_w4a16(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "has_avx512", lambda: False)
    asked = ("quickstart", "rollout.scheme=w4a16", "rollout.group_size=32", "cluster.device=cpu")
    code, _, err = run(*asked)
    assert code == 2
    assert err == [
        "qarl: w4a16-g32 on cpu: rollout.scheme: vLLM has no w4a16 kernel on a processor without AVX-512; "
        "take w8a8_int8, w4a8, fp8_channel or none there, or run on another machine"
    ]
    assert run(*asked, "cluster.address=elsewhere:6379")[0] == 0
    assert run("quickstart", "cluster.device=cpu")[0] == 0


@pytest.mark.parametrize(
    ("vnni", "bfloat16", "ending"),
    [
        (True, True, "--measure takes this machine's"),
        (False, True, "this machine's (slower: this processor has no AVX512-VNNI)"),
        (False, False, "(slower: this processor has no AVX512-VNNI and AVX512-BF16)"),
    ],
)
def test_what_this_processor_lacks_is_told(
    run: Run, monkeypatch: pytest.MonkeyPatch, vnni: bool, bfloat16: bool, ending: str
) -> None:
    monkeypatch.setattr(processor, "has_vnni", lambda: vnni)
    monkeypatch.setattr(processor, "has_bfloat16_gemm", lambda: bfloat16)
    code, plan, _ = run("quickstart", "cluster.device=cpu")
    assert code == 0
    assert plan["device_source"].endswith(ending)


def test_every_stage_of_a_schedule_is_judged(run: Run) -> None:
    stage = "rollout.schedule=[{from_step: 9, scheme: w4a16, group_size: 128}]"
    code, _, err = run("quickstart", stage, "cluster.device=cpu")
    assert code == 2
    assert err[0].startswith("qarl: w4a16-g128 on cpu: ")


def test_a_mixture_of_experts(run: Run, tmp_path: Path) -> None:
    model = published(tmp_path, QWEN3_30B_A3B)
    code, plan, err = run(*model, "learner.num_ranks=64", "learner.zero_stage=3", "--device", "h200")
    assert (plan["parameters"], plan["active_parameters"]) == (30_532_122_624, 3_353_032_704)
    experts = next(row for row in plan["layers"] if row["name"].endswith("experts.up_proj"))
    assert experts["count"] == 48 * 128
    assert experts["engine_kernel"] == "CompressedTensorsW8A8Int8MoEMethod"
    assert (code, err) == (0, [])
    code, _, err = run(*model, "rollout.scheme=fp8_channel", "learner.num_ranks=64", "--device", "h200")
    assert code == 2
    assert "no known kernel for experts in fp8_channel with bfloat16 on cuda; add 're:.*mlp.experts.*'" in err[0]


def test_memory_follows_the_config(run: Run, qwen7b: list[str]) -> None:
    def learner(*argv: str) -> dict[str, int]:
        return run(*qwen7b, *argv, "--device", "h200")[1]["learner"]["2"]

    base = learner()
    assert learner("learner.max_tokens_per_micro_batch=2048")["activations"] * 2 == base["activations"]
    assert learner("learner.gradient_checkpointing=false")["activations"] > 10 * base["activations"]
    assert learner("mismatch.unaligned_every=5")["stock_policy"] == 2 * 7_615_616_512
    naive, one_step = learner("learner.aligned=false"), learner("learner.minibatches=1")
    assert (naive["quantized"], naive["stock_policy"]) == (0, 2 * 7_615_616_512 + one_step["quantized"])
    assert one_step["quantized"] < base["quantized"] < 2 * one_step["quantized"]
    assert learner("learner.num_ranks=16")["optimizer"] * 2 == base["optimizer"]


def test_a_shared_gpu_is_shared_and_an_engine_that_sleeps_leaves_it(run: Run, qwen7b: list[str]) -> None:
    def plan(*argv: str) -> dict[str, Any]:
        return run(*qwen7b, *argv, "--device", "h200")[1]

    alone, shared, asleep = (
        plan(f"cluster.colocate={colocate}", f"cluster.sleep={sleep}")
        for colocate, sleep in (("false", "true"), ("true", "false"), ("true", "true"))
    )
    assert alone["learner_budget"] - shared["learner_budget"] == shared["engine_budget"]
    assert alone["learner_budget"] - asleep["learner_budget"] == GPU_RESERVE
    ahead = plan("cluster.colocate=true", "train.max_staleness=1")
    assert ahead["learner_budget"] == shared["learner_budget"]


def test_what_a_learner_holds_must_fit_beside_an_engine_that_wakes(run: Run) -> None:
    """What an update takes besides may have the engine's place."""
    counts = "learner.num_ranks=1", "rollout.num_workers=1"
    one = ("gsm8k_qwen2.5_0.5b", *counts, "cluster.colocate=true", "--device", "l40s")

    def faults(share: float, sleep: str) -> str:
        settings = f"rollout.gpu_memory_utilization={share}", f"cluster.sleep={sleep}"
        return " ".join(run(*one, *settings)[1]["faults"])

    assert "while the engine is awake a learner rank holds" in faults(0.9, "true")
    assert faults(0.75, "true") == ""
    assert "a learner rank needs" in faults(0.75, "false")


def test_text_for_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["plan", "quickstart", "cluster.device=cpu"]) == 0
    text = capsys.readouterr().out
    for words in ("1,193,472 parameters", "ZeRO-1*", "CPUInt8ScaledMMLinearKernel", "(docs/plan.md)", "step"):
        assert words in text
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text  # nothing is cut off


# --- verdicts --------------------------------------------------------------------------------------------------------


def made(own_rollout: float, plain_rollout: float | None = 10.0, scheme: str = "w8a8_int8") -> Plan:
    """A plan whose learner takes 4 s and whose publication takes 1 s."""
    config = load_config(ROOT / "configs" / "quickstart.yaml", [f"rollout.scheme={scheme}"])
    plan = Planner(config, model_config(config), CPU).plan()

    def estimate(name: str, rollout: float | None) -> Estimate:
        times = None if rollout is None else Times(0.1, rollout, 4.0, 1.0)
        return Estimate(name, "" if times else "too large", 1, 1, 1, 1, 1, times)

    rows = [estimate(scheme, own_rollout)]
    if scheme != "none":
        rows.append(estimate("none", plain_rollout))
    fields = vars(plan) | {"estimates": rows, "by_batch": {1: 2.0, 8: 0.9}, "by_response": {10: 0.9, 100: 1.1}}
    return Plan(**fields)


@pytest.mark.parametrize(
    ("own_rollout", "first"),
    [
        (5.0, "w8a8_int8 pays: a training step is 1.50x as fast as in full precision."),
        (10.3, "w8a8_int8 changes little: a training step is 0.98x as fast as in full precision."),
        (20.0, "w8a8_int8 does not pay: a training step is 0.60x as fast as in full precision."),
    ],
)
def test_verdict(own_rollout: float, first: str) -> None:
    lines = list(made(own_rollout).verdict())
    assert lines[0] == first
    assert lines[1].startswith("Rollouts are 67% of a step in full precision")
    assert lines[1].endswith("if they cost nothing, a step would be 3.00x as fast.")
    assert lines[2:] == [
        "Decoding is faster up to about 1 sequences per engine.",
        "A step is faster from about 100 response tokens on.",
    ]


def test_verdict_without_an_alternative() -> None:
    assert list(made(5.0, plain_rollout=None).verdict()) == ["Full precision is no alternative: too large."]
    assert list(made(5.0, scheme="none").verdict()) == ["Rollouts are 50% of a step."]


def test_ranges() -> None:
    assert _range({1: 2.0, 8: 1.5}, "x") == "at any of 1 to 8 x"
    assert _range({1: 0.5, 8: 0.9}, "x") == "at none of 1 to 8 x"


# --- measuring -------------------------------------------------------------------------------------------------------


def test_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small and short: the figures are not judged, but that every format with a kernel here has one."""
    monkeypatch.setattr("launch.tools.plan.measure.FEATURES", 256)
    monkeypatch.setattr("launch.tools.plan.measure.STREAM_ROWS", 256)
    device = measure(CPU, seconds=0.01)
    engines_alone = {"weight_only"} if processor.has_avx512() else set()
    assert device.rates.keys() == {"fp32", "bf16", "int8", "w4a8", "fp8"} | engines_alone
    assert min(device.bandwidth, *device.rates.values()) > 0
    assert (device.gemm_efficiency, device.overlaps, device.step_s) == (1.0, False, CPU.step_s)
    assert device.source == "measured on this machine"


@pytest.mark.gpu
def test_measuring_a_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device: Device = measure(GPUS[0], seconds=0.1)
    assert device.rates["bf16"] > 1e12
    assert device.bandwidth > 1e11


def test_shipped_configs_are_unchanged_by_a_plan() -> None:
    config: Config = load_config(ROOT / "configs" / "quickstart.yaml")
    before = config.model_dump()
    Planner(config, model_config(config), CPU).plan()
    assert config.model_dump() == before


@pytest.mark.parametrize(
    ("recipe", "parameters"),  # as Hugging Face counts them in the model's files
    [
        ("qwen2.5_0.5b", 494_032_768),
        ("qwen2.5_math_1.5b", 1_543_714_304),
        ("qwen2.5_math_7b", 7_615_616_512),
        ("qwen3_8b", 8_190_735_360),
        ("qwen3_30b_a3b", 30_532_122_624),
    ],
)
def test_recipes_are_planned_without_their_models(recipe: str, parameters: int) -> None:
    config = load_config(ROOT / "configs" / "recipes" / f"{recipe}.yaml")
    assert not Path(config.model.path).exists()
    assert shapes_of(meta_model(model_config(config))).parameters == parameters


RECIPES = (ROOT / "docs" / "recipes.md").read_text()


@pytest.mark.parametrize(
    "row",
    [  # the experts of 30B take seconds to count
        pytest.param(row, marks=[pytest.mark.slow] if "30b" in row else [])
        for row in re.findall(r"^\| `(recipes/\S+ \| \w+ \| [\d.]+ .*)\|$", RECIPES, re.MULTILINE)
    ],
)
def test_the_page_of_recipes_shows_what_the_plan_says(run: Run, row: str) -> None:
    config, device, *speeds, share = (cell.strip(" `") for cell in row.split("|"))
    for scheme, shown in zip(("w4a16", "w8a8_int8", "fp8_channel"), speeds, strict=True):
        _, plan, faults = run(config, f"rollout.scheme={scheme}", "--device", device)
        if shown == "no kernel":
            assert "kernel" in faults[0].lower()
        else:
            assert f" a training step is {shown}x as fast" in plan["verdict"][0]
            assert f"Rollouts are {share} of a step in full precision" in plan["verdict"][1]
