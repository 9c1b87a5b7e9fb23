"""Prompts whose tokens are not what the data says are refused before anything starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers.normalizers import Replace

from launch.demo.tiny_model import make_tokenizer
from launch.run.prompts import fill_pool, load_prompts
from qarl.config.io import validate
from qarl.config.policy import ModelConfig, TinyModelConfig
from qarl.config.run import Config
from qarl.errors import ConfigError, UsageError
from tests.support.fakes import make_prompts

CHAT = "{% for m in messages %}<bos>{{ m.content }}<eos>{% endfor %}"


@pytest.fixture
def run(tiny_models: dict[str, Path], tmp_path: Path) -> Any:
    """A config of a data set whose only training question is given, with a model of 256 tokens."""
    model = Path(shutil.copytree(tiny_models["llama"], tmp_path / "model"))

    def make(question: Any, **task: Any) -> Config:
        for name, text in (("train", question), ("heldout", "2=")):
            (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question": text, "answer": "1"}))
        paths = {f"{name}_path": str(tmp_path / f"{name}.jsonl") for name in ("train", "heldout")}
        return validate(
            {"model": {"path": str(model)}, "task": {"kind": "dataset", "chat": False, **paths, **task}}, "c"
        )

    return make


def refused(config: Config) -> str:
    with pytest.raises(UsageError) as caught:
        load_prompts(config, lambda _: None)
    return str(caught.value)


def test_good_prompts_begin_once(run: Any) -> None:
    _, [prompt], _ = load_prompts(run("12="), lambda _: None)
    assert prompt.token_ids[0] == 1
    assert 1 not in prompt.token_ids[1:]


def test_a_file_of_verl_as_it_is(run: Any, tmp_path: Path) -> None:
    row = {"data_source": "sums", "prompt": [{"role": "user", "content": "1="}], "reward_model": {"ground_truth": "1"}}
    table = pa.Table.from_pylist([row, {**row, "prompt": [{"role": "user", "content": "12="}]}])
    pq.write_table(table, tmp_path / "verl.parquet")
    tokenizer = make_tokenizer(256)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(tmp_path / "model")
    heldout = {
        "path": str(tmp_path / "heldout.jsonl"),
        "question_key": "question",
        "answer_key": "answer",
        "source_key": "",
    }
    paths = {"train_path": str(tmp_path / "verl.parquet"), "heldout_path": heldout}
    _, train, _ = load_prompts(run("9=", chat=True, preset="verl", **paths), lambda _: None)
    assert [(prompt.text, prompt.answer, prompt.source) for prompt in train] == [
        ("1=", "1", "sums"),
        ("12=", "1", "sums"),
    ]
    assert tokenizer.decode(train[1].token_ids).replace(" ", "") == "<bos>12=<eos>"


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("token", ["<eos>", "<pad>", "<bos>"])
def test_a_special_token_in_the_data(run: Any, tmp_path: Path, token: str, chat: bool) -> None:
    tokenizer = make_tokenizer(256)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(tmp_path / "model")
    line = refused(run(f"12{token}3", chat=chat))
    assert line.startswith(f"{tmp_path}/train.jsonl:1: the question '12{token}3' holds the special token '{token}'")
    messages = [{"role": "system", "content": f"4{token}"}, {"role": "user", "content": "2"}]
    assert f"'4{token}' holds the special token" in refused(run(messages, chat=chat))


@pytest.mark.parametrize("template", ["{% if", "{{ raise_exception('no system role') }}", "{{ messages[3].content }}"])
def test_a_chat_template_that_fails(run: Any, tmp_path: Path, template: str) -> None:
    tokenizer = make_tokenizer(256)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "model")
    line = refused(run("12=", chat=True))
    assert f"{tmp_path / 'model'}: chat template: " in line
    assert "\n" not in line


def test_a_template_that_begins_a_second_time(run: Any) -> None:
    line = refused(run("12=", prompt_template="<bos>{question}"))
    assert line.startswith("task.prompt_template: prompts begin with '<bos>' twice")


def test_ids_beyond_the_embedding(run: Any, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(256)
    tokenizer.add_tokens(["plus"])
    tokenizer.save_pretrained(tmp_path / "model")
    assert "makes the id 256, but the model's embedding ends at 255" in refused(run("1plus1"))


def test_a_question_without_tokens(run: Any, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(256)
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.backend_tokenizer.normalizer = Replace("a", "")
    tokenizer.save_pretrained(tmp_path / "model")
    assert "has no tokens" in refused(run("aaa"))


def test_characters_that_a_built_tokenizer_lacks(run: Any) -> None:
    config = run("1 + 2")
    assert load_prompts(config, lambda _: None)  # another tokenizer's unknown token is its own affair
    built = config.model_copy(update={"model": config.model.model_copy(update={"build": TinyModelConfig()})})
    line = "the question '1 + 2' has characters that the tokenizer of model.build lacks; "
    assert refused(built) == f"{line}set model.build.characters=ascii, or leave such rows out"


def test_characters_beyond_ascii(run: Any) -> None:
    config, build = run("1 + ë"), TinyModelConfig(characters="ascii", vocab_size=128)
    built = config.model_copy(update={"model": ModelConfig(path="built", build=build)})
    line = "the question '1 + ë' has characters that the tokenizer of model.build lacks; leave such rows out"
    assert refused(built) == line


def test_more_prompts_a_step_than_there_are() -> None:
    config = pool_config(prompts_per_step=25)
    with pytest.raises(ConfigError, match=r"train\.prompts_per_step: 25 prompts a step, but there are 24; lower it"):
        fill_pool(config, make_prompts(24), print)


@pytest.mark.parametrize(
    ("per_step", "rest", "steps", "is_short"), [(8, 2, 9, False), (9, 2, 9, True), (9, 2, 2, False)]
)
def test_a_pool_that_will_run_dry_is_told_at_the_start(per_step: int, rest: int, steps: int, is_short: bool) -> None:
    said: list[str] = []
    fill_pool(pool_config(per_step, rest, steps), make_prompts(24), said.append)
    assert len(said) == is_short
    assert all("some steps will have fewer, or none" in line for line in said)


def pool_config(prompts_per_step: int, rest: int = 2, steps: int = 100) -> Config:
    train = {"prompts_per_step": prompts_per_step, "steps": steps}
    tree: dict[str, Any] = {"model": {"path": "m"}, "task": {"kind": "sorting"}, "train": train}
    return validate(tree | {"pool": {"cooldown_steps": rest}}, "test")
