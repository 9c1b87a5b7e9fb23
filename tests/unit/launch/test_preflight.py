"""What cannot make a run, settings and model folders, is told in a line each before anything starts."""

from __future__ import annotations

import ctypes
import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from launch.demo.pretrained import fetch_missing
from launch.demo.tiny_model import check_model
from launch.machine import Machine, bundles, sharing_line
from launch.preflight import check_longest, check_numerics, faults, scheme_faults, setting_faults
from qarl.config.derived import choose_counts, sleeps
from qarl.config.io import load_config, validate
from qarl.config.run import Config, DebugConfig
from qarl.config.schedule import schemes_of
from qarl.config.shipped import config_path
from qarl.errors import ConfigError, ModelError, ResourceError
from qarl.model_folder import meta_model
from rollout.engine import engine_env

WEIGHTS = "model.safetensors"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
Break = Callable[[Path], object]


def keys(**changes: Any) -> Break:
    """Changes keys of config.json; None removes one."""

    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        kept = {key: value for key, value in config.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))

    return apply


def text(name: str, content: str) -> Break:
    return lambda folder: (folder / name).write_text(content)


def cut(name: str) -> Break:
    """Keeps the first two thirds of a file."""

    def apply(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) * 2 // 3])

    return apply


def tensors(change: Callable[[dict[str, Any]], Any]) -> Break:
    def apply(folder: Path) -> None:
        stored = load_file(folder / WEIGHTS)
        change(stored)
        save_file(stored, folder / WEIGHTS, {"format": "pt"})

    return apply


def sharded(folder: Path) -> None:
    """Two shards, of which the second is missing."""
    stored = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(stored)
    save_file({name: stored[name] for name in names[:5]}, folder / "a.safetensors", {"format": "pt"})
    shards = {name: "a.safetensors" if name in names[:5] else "b.safetensors" for name in names}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": shards}))


def removed(*names: str) -> Break:
    return lambda folder: [(folder / name).unlink(missing_ok=True) for name in names]


NORM, MLP = "model.layers.2.input_layernorm.weight", "model.layers.0.mlp.down_proj.weight"
BROKEN: dict[str, tuple[Break, str]] = {
    # config.json
    "no config": (removed("config.json"), "holds no config.json"),
    "config is a list": (text("config.json", "[]"), "not a JSON object"),
    "config is empty": (text("config.json", "{}"), "names no model_type"),
    "config is no JSON": (text("config.json", "{"), "config.json: JSONDecodeError"),
    "config is no text": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"), "config.json"),
    "config of LFS": (text("config.json", LFS), "Git LFS pointer"),
    "model_type unknown": (keys(model_type="nonesuch"), "nonesuch"),
    "model_type a number": (keys(model_type=3), "names no model_type"),
    "auto_map": (keys(model_type="own", auto_map={"AutoConfig": "own.Config"}), "config.json"),
    "T5": (keys(model_type="t5"), "not a model of text alone"),
    "vision": (keys(model_type="qwen2_vl"), "not a model of text alone"),
    "other class": (keys(architectures=["LlamaForCausalLM"]), "names the architectures"),
    "no class": (keys(architectures=None), "names the architectures"),
    "width a string": (keys(hidden_size="256"), "config.json"),
    "layers a list": (keys(num_hidden_layers=[3]), "config.json"),
    "no heads": (keys(num_attention_heads=0), "config.json"),
    "odd heads": (keys(num_attention_heads=7, num_key_value_heads=7, head_dim=None), ""),
    "key/value heads": (keys(num_key_value_heads=3), ""),
    "narrow heads": (keys(head_dim=24), ""),
    "no width": (keys(hidden_size=0), "of other shapes than config.json says"),
    "wrong width": (keys(hidden_size=128), "of other shapes than config.json says"),
    "wrong vocabulary": (keys(vocab_size=128), "of other shapes than config.json says"),
    "negative vocabulary": (keys(vocab_size=-1), "config.json"),
    "more layers": (keys(num_hidden_layers=4, layer_types=None), "weights are missing"),
    "fewer layers": (keys(num_hidden_layers=2, layer_types=None), "stored but no part of this model"),
    "unknown RoPE": (keys(rope_parameters={"rope_type": "nonesuch", "rope_theta": 1e4}), "config.json"),
    "activation": (keys(hidden_act="gelu"), "with silu only"),
    "short contexts": (keys(max_position_embeddings=16), "rollout.max_model_len: the model's contexts"),
    "quantized": (keys(quantization_config={"quant_method": "gptq"}), "quantized already (gptq)"),
    "quantized, by name": (keys(quantization_config="gptq"), "quantized already (gptq)"),
    "compressed": (keys(compression_config={"quant_method": "compressed-tensors"}), "quantized already"),
    "another tool's": (text("hf_quant_config.json", "{}"), "quantized already"),
    "generation config nowhere": (
        lambda folder: (
            (folder / "generation_config.json").unlink(),
            (folder / "generation_config.json").symlink_to("gone"),
        ),
        "generation_config.json: is no file",
    ),
    "generation config": (text("generation_config.json", "["), "generation_config.json"),
    # weights
    "no weights": (removed(WEIGHTS), "holds no weights"),
    "weights empty": (text(WEIGHTS, ""), WEIGHTS),
    "weights cut short": (cut(WEIGHTS), WEIGHTS),
    "weights of LFS": (text(WEIGHTS, LFS), "Git LFS pointer"),
    "shard missing": (sharded, "b.safetensors is missing"),
    "index broken": (lambda folder: (sharded(folder), text(f"{WEIGHTS}.index.json", "[]")(folder)), "index"),
    "tensor missing": (tensors(lambda t: t.pop(NORM)), f"{NORM} first"),
    "tensor too many": (tensors(lambda t: t.update({f"{NORM}_scale": torch.ones(1)})), f"{NORM}_scale first"),
    "tensor misshapen": (tensors(lambda t: t.update({NORM: torch.ones(7)})), f"{NORM}, 7 and not 256"),
    "int8": (tensors(lambda t: t.update({MLP: t[MLP].to(torch.int8)})), "stored as I8"),
    "fp8": (tensors(lambda t: t.update({MLP: t[MLP].to(torch.float8_e4m3fn)})), "stored as F8_E4M3"),
    "pickle broken": (
        lambda folder: (removed(WEIGHTS)(folder), text("pytorch_model.bin", "x")(folder)),
        "pytorch_model.bin",
    ),
    # tokenizer
    "no tokenizer": (removed("tokenizer.json"), "holds no tokenizer"),
    "tokenizer cut short": (cut("tokenizer.json"), "tokenizer"),
    "tokenizer of LFS": (text("tokenizer.json", LFS), "tokenizer"),
    "tokenizer config": (text("tokenizer_config.json", "[]"), "tokenizer"),
    "vocabulary empty": (
        text("tokenizer.json", json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}})),
        "tokenizer",
    ),
}


def lines(folder: Path, *overrides: str) -> list[str]:
    config = load_config(config_path("quickstart"), [f"model.path={folder}", "model.build=null", *overrides])
    return [str(fault) for fault in faults(config, Machine("cpu"))]


@pytest.fixture
def folder(tiny_models: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_models["qwen3"], tmp_path / "model"))


def test_a_good_folder_has_no_fault(folder: Path) -> None:
    assert lines(folder, "rollout.sampling.stop_token_ids=[255]") == []
    [line] = lines(folder, "rollout.sampling.stop_token_ids=[2,256]")
    assert line.startswith("rollout.sampling.stop_token_ids: 256 is no token: the model's embedding ends at 255")


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_folder_is_one_line(folder: Path, kind: str, recwarn: pytest.WarningsRecorder) -> None:
    change, reason = BROKEN[kind]
    change(folder)
    [line] = lines(folder)
    assert not [str(warning.message) for warning in recwarn if warning.category is UserWarning]
    assert reason in line
    assert "\n" not in line
    assert str(folder) in line or "rollout.max_model_len" in line


@pytest.mark.parametrize("recipe", ["[", "[]", "{}", "3", '{"sft": 3}', '{"sft": {"lr": "x"}}', '{"fetch": null}'])
@pytest.mark.parametrize("source", ["build", "fetch"])
def test_a_garbage_recipe(folder: Path, recipe: str, source: str) -> None:
    (folder / "qarl_build.json").write_text(recipe)
    fetch = {"package": "a", "version": "1", "sha256": "0" * 64}
    own = ["model.build=null", f"model.fetch={json.dumps(fetch)}"] if source == "fetch" else []
    config = load_config(config_path("quickstart"), [f"model.path={folder}", *own])
    with pytest.raises(ModelError, match=r"qarl_build\.json|was (built|made) with other settings"):
        check_model(config.model, config.task) if source == "build" else fetch_missing(config, print)


def test_a_head_that_would_be_quantized(folder: Path) -> None:
    [line] = lines(folder, "rollout.ignore=[]")
    assert line == "rollout.ignore: the model's head would be quantized; add 'lm_head' to the list"


@pytest.mark.parametrize("numerics", ["auto", "stock"])
@pytest.mark.parametrize(
    "kind",
    ["mixtral", "gemma2", "cohere", "olmo2", "gpt_neox", "gpt2", "bloom"],
)
def test_models_whose_weights_nothing_publishes(folder: Path, kind: str, numerics: str) -> None:
    """The learner left Mixtral's experts in full precision without a word; others failed in the engine."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 256}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, **sizes)
    (folder / WEIGHTS).unlink()
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    found = lines(folder, f"learner.numerics={numerics}")
    assert any(f"{folder}: qarl publishes the weights of" in line and f"not of {kind};" in line for line in found)


def test_kv_caches_fit_the_memory() -> None:
    config = make_settings(rollout={"kv_cache_gib": 5, "num_workers": 2})
    assert texts(config, Machine("cpu", memory=10 * 2**30, is_here=True)) == []
    [fault] = texts(config, Machine("cpu", memory=9 * 2**30, is_here=True))
    assert fault == "rollout.kv_cache_gib: the KV caches of all workers take 10 GiB, this machine has 9.0 GiB; lower it"


def test_a_kv_cache_holds_the_longest_sequence() -> None:
    def settings(longest: int) -> Config:
        rollout = {"kv_cache_gib": 4, "max_model_len": longest}
        return make_settings(rollout=rollout, learner={"max_tokens_per_micro_batch": longest})

    shape = AutoConfig.for_model("llama", num_hidden_layers=32, num_attention_heads=32, hidden_size=4096)
    longest = (4 * 2**30 // (2 * 32 * 4096 * 2 * 128) - 1) * 128  # 63 blocks of 128 tokens, of 512 KiB each
    check_longest(settings(longest), shape, "cpu")
    more = settings(longest + 1)
    with pytest.raises(
        ResourceError, match=r"^rollout\.kv_cache_gib 4: holds no sequence of rollout\.max_model_len 8065;"
    ):
        check_longest(more, shape, "cpu")
    check_longest(more, shape, "cuda")  # vLLM measures what is free there
    shape.sliding_window = 4096
    check_longest(more, shape, "cpu")


@pytest.mark.parametrize("variable", ["RAY_TMPDIR", "TMPDIR"])
@pytest.mark.parametrize(("folder", "reason"), [("x" * 100, "100 bytes"), ("gone", "no folder that you may write")])
def test_a_folder_that_ray_cannot_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, folder: str, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv(variable, folder)
    assert texts(make_settings(), Machine("cpu")) == []  # a Ray of somebody else
    [fault] = texts(make_settings(), Machine("cpu", is_here=True))
    assert fault.startswith(f"{variable} {folder}: ")
    assert reason in fault


def test_the_teachers_key_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    validator = {"kind": "teacher", "base_url": "http://u", "model": "m", "api_key_env": "NO_SUCH_KEY"}
    [fault] = texts(make_settings(pool={"augment": {"per_step": 1, "validator": validator}}), Machine("cpu"))
    assert "NO_SUCH_KEY" in fault
    monkeypatch.setenv("NO_SUCH_KEY", "secret")
    assert texts(make_settings(pool={"augment": {"per_step": 1, "validator": validator}}), Machine("cpu")) == []


def test_controls_need_a_teacher_and_a_model_that_was_built() -> None:
    build = {"path": "none", "build": {}}
    rows = {"kind": "dataset", "train_path": "t.jsonl", "heldout_path": "h.jsonl"}
    for sections in ({}, {"model": build, "task": rows}):
        [fault] = texts(make_settings(controls={"sft_continued": True}, **sections), Machine("cpu"))
        assert fault.startswith("controls.sft_continued: needs a task with a teacher, and a model that model.build")
    assert texts(make_settings(controls={"teacher": True}, model=build), Machine("cpu")) == []


def make_settings(**sections: Any) -> Config:
    return validate({"model": {"path": "none"}, "task": {"kind": "sorting"}} | sections, "test")


def texts(config: Config, machine: Machine) -> list[str]:
    return [str(fault) for fault in setting_faults(config, machine)]


def test_the_cpu_engine_needs_libnuma_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", Mock(side_effect=OSError("libnuma.so.1: no such file")))
    line = "vLLM's CPU kernels: libnuma.so.1: no such file; install it, for example the package libnuma1"
    assert texts(make_settings(), Machine("cpu", is_here=True)) == [line]
    assert texts(make_settings(), Machine("cpu")) == texts(make_settings(), Machine("cuda", is_here=True)) == []


def test_a_validator_needs_the_tasks_program() -> None:
    task = {"kind": "dataset", "train_path": "t", "heldout_path": "h"}
    for validator, expected in (("program", 1), ("vote", 0)):
        augment = {"per_step": 1, "validator": {"kind": validator}}
        found = texts(make_config(task=task, pool={"augment": augment}), Machine("cpu"))
        line = "pool.augment.validator.kind: task dataset has no program to check; use vote or teacher"
        assert found == [line] * expected


# --- settings and resources ------------------------------------------------------------------------------------------


def make_config(**sections: dict[str, Any]) -> Config:
    tree: dict[str, Any] = {"model": {"path": "none"}, "task": {"kind": "sorting"}}
    return validate(tree | sections, "test")


def settings_of(config: Config, device: str, **counts: float) -> list[str]:
    return [str(fault) for fault in setting_faults(config, Machine(device, **counts))]


def test_bundles_are_workers_then_ranks() -> None:
    config = make_config(
        rollout={"num_workers": 2, "num_cpus_per_worker": 3.0},
        learner={"num_ranks": 3, "num_cpus_per_rank": 0.5},
    )
    assert bundles(config, "cpu") == ([{"CPU": 3.0}] * 2, [{"CPU": 0.5}] * 3)
    assert bundles(config, "cuda") == ([{"CPU": 3.0, "GPU": 1.0}] * 2, [{"CPU": 0.5, "GPU": 1.0}] * 3)
    without_engine = config.model_copy(update={"debug": DebugConfig(train_from="batches")})
    assert bundles(without_engine, "cpu") == ([], [{"CPU": 0.5}] * 3)
    rollout = {"num_workers": 1, "num_cpus_per_worker": 3.0, "tensor_parallel_size": 2}
    two = make_config(rollout=rollout, learner={"num_ranks": 1})
    assert bundles(two, "cuda") == ([{"CPU": 6.0, "GPU": 2.0}], [{"CPU": 1.0, "GPU": 1.0}])
    assert settings_of(config, "cpu", cpus=7.5) == settings_of(config, "cuda", cpus=7.5, gpus=5.0) == []
    [fault] = settings_of(config, "cpu", cpus=7.0)
    assert "request 7.5 CPUs, 7 are available" in fault
    assert "rollout.num_cpus_per_worker" in fault
    [fault] = settings_of(config, "cuda", gpus=0.0)
    assert "request 5 GPUs, 0 are available" in fault


def test_batch_invariance_is_a_mode_of_the_gpu_engine() -> None:
    for asked, flag in ((True, "1"), (False, "0")):
        config = make_config(rollout={"batch_invariant": asked})
        assert engine_env("cuda", config.rollout)["VLLM_BATCH_INVARIANT"] == flag
        assert "VLLM_BATCH_INVARIANT" not in engine_env("cpu", config.rollout)
    config = make_config(rollout={"batch_invariant": True})
    assert settings_of(config, "cuda") == []
    [fault] = settings_of(config, "cpu")
    assert re.match(r"rollout\.batch_invariant: is a mode of the GPU engine.*set it to false", fault)


@pytest.mark.parametrize(
    ("transport", "colocate", "device", "reason"),
    [
        ("nccl", False, "cpu", "nccl is a transport between GPUs; set it to object_store"),
        ("ipc", True, "cpu", "ipc is a transport between GPUs; set it to object_store"),
        ("nccl", True, "cuda", "NCCL cannot have two processes on one GPU; set it to ipc or object_store"),
        ("ipc", False, "cuda", "ipc reads the memory of a GPU that worker and learner share"),
        ("nccl", False, "cuda", ""),
        ("ipc", True, "cuda", ""),
        ("object_store", True, "cuda", ""),
    ],
)
def test_a_transport_needs_its_placement(transport: str, colocate: bool, device: str, reason: str) -> None:
    config = make_config(rollout={"transport": transport}, cluster={"colocate": colocate})
    found = settings_of(config, device)
    assert len(found) == bool(reason)
    assert all(fault.startswith(f"rollout.transport: {reason}") for fault in found)


def test_processes_of_an_engine() -> None:
    """On CPU two; they divide a model evenly, and take whole GPUs."""
    one, two, three = (make_config(rollout={"num_workers": 1, "tensor_parallel_size": size}) for size in (1, 2, 3))
    assert settings_of(two, "cpu") == settings_of(three, "cuda") == []
    [fault] = settings_of(three, "cpu")
    assert fault.startswith("rollout.tensor_parallel_size: each process of an engine on CPU adds the products")
    memory = Machine("cpu", memory=2**30, is_here=True)
    assert (texts(one, memory), len(texts(two, memory))) == ([], 1)
    shared = make_config(rollout={"num_workers": 1, "tensor_parallel_size": 2}, cluster={"colocate": True})
    assert "can share a GPU, each of one process" in settings_of(shared, "cuda")[0]


@pytest.mark.parametrize(
    ("kind", "processes", "reason"),
    [
        ("qwen3", 2, ""),
        ("qwen3", 4, "4 does not divide the model's 2 key/value heads; lower it"),
        ("qwen3", 3, "3 does not divide the model's 8 heads; lower it"),
        ("qwen3_moe", 2, "the learner follows divided layers of llama, qwen2, qwen3, not of qwen3_moe; set it to 1"),
    ],
)
def test_an_engine_divides_the_model_evenly(kind: str, processes: int, reason: str) -> None:
    rollout = {"tensor_parallel_size": processes}
    tree = AutoConfig.for_model(
        kind, num_hidden_layers=1, vocab_size=64, num_attention_heads=8, num_key_value_heads=2, intermediate_size=512
    )
    check = partial(check_numerics, make_config(rollout=rollout), meta_model(tree), "cuda")
    if reason:
        with pytest.raises(ConfigError, match=f"^rollout.tensor_parallel_size: {reason}$"):
            check()
    else:
        check()


@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_a_scheme_that_the_engine_lacks_is_an_error_before_any_actor(kernel: str) -> None:
    """The learner's reference kernel is no way out: a run needs an engine."""
    later = [{"from_step": 3, "scheme": "nvfp4a16"}]
    config = make_config(rollout={"scheme": "w4a16", "schedule": later}, learner={"kernel": kernel})
    model = meta_model(AutoConfig.for_model("qwen3", num_hidden_layers=1, vocab_size=64))
    first, second = schemes_of(config.rollout)
    [fault] = scheme_faults(config, second, model, Machine("cpu"))
    assert str(fault).startswith("rollout.scheme: vLLM has no nvfp4a16 kernel on cpu; take w8a8_int8, w4a16")
    assert scheme_faults(config, first, model, Machine("cpu")) == []
    assert [scheme_faults(config, scheme, model, Machine("cuda")) for scheme in (first, second)] == [[], []]


def test_colocated_actors_share_the_gpus() -> None:
    config = choose_counts(make_config(cluster={"colocate": True}), "cuda", 8)
    assert bundles(config, "cuda") == ([{"CPU": 1.0, "GPU": 0.5}], [{"CPU": 1.0, "GPU": 0.5}])


@pytest.mark.parametrize(
    ("device", "sections", "line"),
    [
        ("cuda", {}, "cluster.colocate: the engine gives its GPU memory back while the learner works"),
        ("cuda", {"cluster": {"colocate": True, "sleep": False}}, "keeps its GPU memory while the learner works, (clu"),
        ("cuda", {"train": {"max_staleness": 1}}, "keeps its GPU memory while the learner works, as it samples mean"),
        ("cuda", {"cluster": {"colocate": False}}, None),
        ("cpu", {}, None),
    ],
)
def test_only_engines_on_the_gpu_of_a_learner_that_waits_sleep(
    device: str, sections: dict[str, Any], line: str | None
) -> None:
    config = make_config(**{"cluster": {"colocate": True}, **sections})
    assert sleeps(config, device) == (line is not None and "gives" in line)
    said = sharing_line(config, device)
    assert line in said if line else not said


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_device_that_is_set_is_taken(device: str) -> None:
    config = make_config(cluster={"device": device})
    assert Machine.of(config, 1.0, 1.0, 0.0).device == Machine.of(config, 1.0, 0.0, 0.0).device == device
    auto = make_config()
    assert [Machine.of(auto, 1.0, gpus, 0.0).device for gpus in (0.0, 1.0)] == ["cpu", "cuda"]
