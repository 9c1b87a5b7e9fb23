"""The tiny model: made whole or not at all, learns, round-trips, and never sees a held-out answer."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch.demo import controls, tiny_model
from qarl.config.policy import ModelConfig, SFTConfig, TinyModelConfig
from qarl.config.task import DatasetTaskConfig, SortingTaskConfig
from qarl.errors import ConfigError, ModelError
from qarl.tasks import make_task, sorting
from qarl.types import Prompt

TASK = SortingTaskConfig()
TEACHER = sorting.SortingTeacher(TASK.levels)
BUILD = TinyModelConfig(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=128,
    sft=SFTConfig(steps=60, batch_size=16, warmup_steps=10),
)


def quiet(line: str) -> None:
    """Takes notes and forgets them."""


def config_at(path: Path, build: TinyModelConfig | None = BUILD) -> ModelConfig:
    return ModelConfig(path=str(path), build=build)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A model directory and the lines noted while it was made."""
    notes: list[str] = []
    path = tmp_path_factory.mktemp("tiny") / "models" / "sorter"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_model, "LOG_EVERY", 20)
        tiny_model.ensure_model(config_at(path), TASK, 0, notes.append)
    return path, notes


def losses(notes: list[str]) -> list[float]:
    return [float(note.rpartition(" ")[2]) for note in notes if note.startswith("SFT ")]


def test_it_learns_and_says_so(built: tuple[Path, list[str]]) -> None:
    _, notes = built
    assert [note.partition(" loss")[0] for note in notes[1:]] == ["SFT 20/60", "SFT 40/60", "SFT 60/60"]
    assert losses(notes)[-1] < losses(notes)[0] - 0.1


def test_the_directory_is_complete(built: tuple[Path, list[str]]) -> None:
    path, _ = built
    assert [p.name for p in path.parent.iterdir()] == ["sorter"]
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.dtype == torch.bfloat16
    assert model.config.model_type == "qwen3"
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    assert len(tokenizer) == model.config.vocab_size == 64


def test_tokenizer_round_trip(built: tuple[Path, list[str]]) -> None:
    for tokenizer in (tiny_model.make_tokenizer(64), AutoTokenizer.from_pretrained(built[0])):
        ids = tokenizer.encode("529172=")
        assert tokenizer.convert_ids_to_tokens(ids) == ["<bos>", *"529172="]
        assert tokenizer.encode("529172=", add_special_tokens=False) == ids[1:]
        assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == "529172="
        assert tokenizer.encode("1 x\n", add_special_tokens=False)[1:] == [tokenizer.unk_token_id] * 3


def test_equal_seeds_give_equal_weights(tmp_path: Path) -> None:
    torch.manual_seed(123)
    before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    short = BUILD.model_copy(update={"sft": SFTConfig(steps=4, batch_size=16, warmup_steps=1)})
    states = []
    for name, seed in (("first", 0), ("same", 0), ("other", 1)):
        tiny_model.build(config_at(tmp_path / name, short), TASK, seed, quiet)
        states.append(AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict())
    first, same, other = states
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.get_num_threads() == threads


def test_saved_weights_are_the_trained_ones_in_the_dtype(tmp_path: Path) -> None:
    tokenizer = tiny_model.make_tokenizer(64)
    model = tiny_model.Qwen3ForCausalLM(tiny_model.architecture(BUILD, tokenizer))
    trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        tiny_model.save(model, tokenizer, tmp_path / name, name, {})
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        assert loaded.keys() == trained.keys()
        assert all(torch.equal(loaded[key], trained[key].to(dtype)) for key in trained)


def test_loss_counts_the_answer_and_the_end_only() -> None:
    tokenizer = tiny_model.make_tokenizer(64)
    model = tiny_model.Qwen3ForCausalLM(tiny_model.architecture(BUILD, tokenizer)).eval()
    demos = [("21=", "12"), ("529172=", "122579")]
    total, count = 0.0, 0
    for text, answer in demos:  # one at a time, without padding
        prompt = tokenizer.encode(text)
        response = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        for i, token in enumerate(response, start=len(prompt) - 1):
            total, count = total - logprobs[i, token].item(), count + 1
    assert tiny_model._loss(model, tokenizer, demos).item() == pytest.approx(total / count, rel=1e-5)


def test_packs_are_one_stream_of_demonstrations() -> None:
    tokenizer = tiny_model.make_tokenizer(64)
    sft = SFTConfig(batch_size=3, pack_tokens=50, swap_prob=0.0)
    ids_BL = tiny_model._packs(tokenizer, sft, TEACHER, random.Random(0))
    assert ids_BL.shape == (3, 50)
    texts = tokenizer.decode(ids_BL.flatten().tolist()).replace(" ", "").split("<eos>")[:-1]  # the last is cut
    assert len(texts) > 3
    for text in texts:
        assert text.startswith("<bos>")
        problem, _, answer = text.removeprefix("<bos>").partition("=")
        assert answer == sorting.solve(problem)
        assert not sorting.is_heldout(answer)


@torch.no_grad()
def test_a_packed_loss_counts_every_token() -> None:
    model = tiny_model.Qwen3ForCausalLM(tiny_model.architecture(BUILD, tiny_model.make_tokenizer(64))).eval()
    ids_BL = torch.randint(0, 64, (2, 9), generator=torch.manual_seed(0))
    logprobs = model(ids_BL).logits.log_softmax(-1)
    each = [logprobs[b, t, ids_BL[b, t + 1]].item() for b in range(2) for t in range(8)]
    assert tiny_model._packed_loss(model, ids_BL).item() == pytest.approx(-sum(each) / 16, rel=1e-5)


def test_a_packed_model_learns(tmp_path: Path) -> None:
    sft = SFTConfig(steps=100, batch_size=4, pack_tokens=64, warmup_steps=10)
    notes: list[str] = []
    tiny_model.build(config_at(tmp_path / "m", BUILD.model_copy(update={"sft": sft})), TASK, 0, notes.append)
    assert losses(notes)[-1] < losses(notes)[0] - 0.1


def test_step_schedule() -> None:
    factors = tiny_model.step_schedule(SFTConfig(steps=100, warmup_steps=10))
    assert len(factors) == 100
    assert factors[:2] == pytest.approx([0.1, 0.2])
    assert factors[9:71] == [1.0] * 62
    assert factors[-2:] == pytest.approx([2 / 30, 1 / 30])


def test_time_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 100.0, 102.5, 105.0, 110.0])
    monkeypatch.setattr(controls.time, "monotonic", lambda: next(clock))
    assert list(controls.time_schedule(SFTConfig(warmup_steps=2), 10.0)) == [0.5, 0.75, 0.5]


def test_continued_sft_trains_on(
    built: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controls, "time_schedule", lambda sft, seconds: [1.0] * 40)
    monkeypatch.setattr(tiny_model, "LOG_EVERY", 20)
    notes: list[str] = []
    target = tmp_path / "control"
    target.mkdir()
    (target / "old").touch()
    steps = controls.continue_sft(str(built[0]), str(target), config_at(built[0]), TEACHER, 1.0, 0, notes.append)
    assert steps == 40
    assert losses(notes)[-1] < losses(built[1])[-1]
    assert not (target / "old").exists()
    tiny_model.ensure_model(config_at(target), TASK, 0, notes.append)
    assert AutoModelForCausalLM.from_pretrained(target).dtype == torch.bfloat16


def test_continued_sft_needs_its_settings(built: tuple[Path, list[str]], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.build: not set"):
        controls.continue_sft(str(built[0]), str(tmp_path / "t"), config_at(built[0], None), TEACHER, 1.0, 0, quiet)


def test_teacher_accuracy() -> None:
    _, heldout = make_task(SortingTaskConfig(levels=[8]), tiny_model.make_tokenizer(64).encode).load(0, 50, quiet)
    assert controls.teacher_accuracy(TEACHER, heldout, 0.0, 0, 2) == 1.0
    # Eight digits with some repeats: a little above .8 ** 7 = .21.
    assert 0.2 < controls.teacher_accuracy(TEACHER, heldout, 0.2, 0, 40) < 0.45


def test_an_existing_model_is_used_and_differences_are_told(built: tuple[Path, list[str]], tmp_path: Path) -> None:
    path, _ = built
    stamp = (path / "model.safetensors").stat().st_mtime_ns
    notes: list[str] = []
    for build in (None, BUILD):
        tiny_model.ensure_model(config_at(path, build), TASK, 0, notes.append)
    assert notes == []
    other = config_at(path, BUILD.model_copy(update={"hidden_size": 96}))
    with pytest.raises(ModelError, match="was built with other settings of hidden_size; choose"):
        tiny_model.ensure_model(other, TASK, 0, notes.append)
    foreign = tmp_path / "foreign"
    shutil.copytree(path, foreign)
    (foreign / tiny_model.RECIPE).unlink()
    path = foreign
    stamp = (path / "model.safetensors").stat().st_mtime_ns
    tiny_model.ensure_model(config_at(path, other.build), TASK, 0, notes.append)
    assert notes == [f"{path}: exists and is used, although model.build differs: hidden_size 64 (not 96)"]
    assert (path / "model.safetensors").stat().st_mtime_ns == stamp


def test_two_runs_may_make_the_same_model_at_once(
    built: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "sorter"
    notes: list[str] = []
    monkeypatch.setattr(tiny_model, "train", lambda *_: shutil.copytree(built[0], path))  # the other one is faster
    tiny_model.ensure_model(config_at(path), TASK, 0, notes.append)
    assert notes[-1] == f"{path}: another run has made it meanwhile"
    assert [entry.name for entry in tmp_path.iterdir()] == ["sorter"]


def test_a_model_older_than_a_key_was_built_with_its_default(built: tuple[Path, list[str]], tmp_path: Path) -> None:
    path = tmp_path / "old"
    shutil.copytree(built[0], path)
    recipe = json.loads((path / tiny_model.RECIPE).read_text())
    del recipe["sft"]["pack_tokens"]
    (path / tiny_model.RECIPE).write_text(json.dumps(recipe))
    tiny_model.ensure_model(config_at(path), TASK, 0, quiet)
    packed = BUILD.model_copy(update={"sft": BUILD.sft.model_copy(update={"pack_tokens": 64})})
    with pytest.raises(ModelError, match="was built with other settings of sft"):
        tiny_model.ensure_model(config_at(path, packed), TASK, 0, quiet)


def test_prompts_are_demonstrated_where_the_task_has_no_teacher(tmp_path: Path) -> None:
    task = DatasetTaskConfig(train_path="t", heldout_path="h", chat=False)
    build = BUILD.model_copy(update={"characters": "ascii", "vocab_size": 128})
    config, notes = config_at(tmp_path / "m", build), []
    rows = [(f"What is {n} + {n}?", str(n + n)) for n in range(10)]
    prompts = [Prompt(text, text, answer, ()) for text, answer in rows]
    tiny_model.ensure_model(config, task, 0, notes.append, prompts)
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "m").decode(
            tiny_model.make_tokenizer(128, "ascii").encode("What is 3 + 3?"), skip_special_tokens=True
        )
        == "What is 3 + 3?"
    )
    tiny_model.ensure_model(config, task, 0, notes.append, prompts)
    tiny_model.check_model(config, task)
    with pytest.raises(ModelError, match="was built with other settings of demonstrations"):
        tiny_model.ensure_model(config, task, 0, notes.append, prompts[1:])
    assert len(notes) == 2


def test_nothing_there_and_nothing_to_build(tmp_path: Path) -> None:
    path = tmp_path / "none"
    with pytest.raises(ModelError) as caught:
        tiny_model.ensure_model(config_at(path, None), TASK, 0, quiet)
    hint = "download a model there or set model.build={}; `qarl plan` needs its config.json alone"
    assert str(caught.value) == f"{path}: no such model directory; {hint}"
    task = DatasetTaskConfig(train_path="t", heldout_path="h")
    with pytest.raises(ModelError, match="needs training prompts, or a task with a teacher, not dataset"):
        tiny_model.ensure_model(config_at(path), task, 0, quiet)


@pytest.mark.parametrize("content", ["{", "3"])
def test_config_json_is_broken(built: tuple[Path, list[str]], tmp_path: Path, content: str) -> None:
    path = tmp_path / "model"
    shutil.copytree(built[0], path)
    (path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json.*; download the model again"):
        tiny_model.ensure_model(config_at(path, None), TASK, 0, quiet)


def test_places_where_no_model_can_be_made(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ModelError, match="not a directory"):
        tiny_model.ensure_model(config_at(file), TASK, 0, quiet)
    with pytest.raises(ModelError, match="cannot make its folder"):
        tiny_model.build(config_at(file / "model"), TASK, 0, quiet)
    with pytest.raises(ModelError, match="something is there already"):
        tiny_model.build(config_at(tmp_path), TASK, 0, quiet)
    with pytest.raises(ModelError, match=r"model\.build\.vocab_size: 10 is too small"):
        tiny_model.build(config_at(tmp_path / "m", TinyModelConfig(vocab_size=10)), TASK, 0, quiet)


def test_a_save_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_model.make_tokenizer(64)
    model = tiny_model.Qwen3ForCausalLM(tiny_model.architecture(BUILD, tokenizer))

    def full(directory: str) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(tokenizer, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        tiny_model.save(model, tokenizer, tmp_path / "model", "float32", {})
    assert list(tmp_path.iterdir()) == []
