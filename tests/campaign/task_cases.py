"""Tasks that give no problems: presets, mixtures, held-out sets, functions of the user's own, generators."""

from __future__ import annotations

import json
from pathlib import Path

from tests.campaign.harness import Case, rows
from tests.campaign.reward_cases import Words, cases

PRESETS: list[tuple[Words, Words]] = [
    (("task.preset=nothing",), ("task.preset", "'gsm8k'")),
    (("task.preset=3",), ("task.preset",)),
    (("task.preset=gsm8k",), ("train.jsonl:1", "####", "task.answer_delimiter")),
    (("task.preset=math",), ("train.jsonl:1", "problem", "task.question_key")),
    (("task.preset=verl",), ("train.jsonl:1", "prompt", "task.question_key")),
    (("task.preset=openai_chat",), ("train.jsonl:1", "messages", "task.question_key")),
    (("task.preset=openai_chat", "task.train_path=chats.jsonl"), ("chats.jsonl:2", "assistant")),
    (("task.preset=verl", "task.train_path=verl.jsonl"), ("verl.jsonl:2", "ground_truth")),
    (("task.question_key=question.0",), ("train.jsonl:1", "question.0")),
    (("task.question_key=answer.x.y",), ("train.jsonl:1", "answer.x.y")),
    (("task.source_key=nothing",), ("train.jsonl:1", "nothing", "task.source_key")),
    (("task.source_key=list", "task.train_path=sources.jsonl"), ("sources.jsonl:1", "list")),
    (("task.max_wrong_rows=-1",), ("task.max_wrong_rows",)),
    (("task.max_wrong_rows=64", "task.question_key=gone"), ("train.jsonl",)),
    (("task.system_prompt=hello",), ("task.chat", "system_prompt")),
    (("task.chat_template_kwargs={a: 1}",), ("task.chat", "chat_template_kwargs")),
    (("task.prompt_template=''",), ("task.prompt_template",)),
]  # fmt: skip

FILES: list[tuple[str, Words]] = [
    ("train_path=[]", ("task.train_path",)),
    ("train_path={}", ("task.train_path", "path")),
    ("train_path=[3]", ("task.train_path",)),
    ("train_path=[{}]", ("task.train_path", "path")),
    ("train_path=[[train.jsonl]]", ("task.train_path",)),
    ("train_path=[train.jsonl, gone.jsonl]", ("gone.jsonl", "No such file")),
    ("train_path=[{path: train.jsonl, weight: 0}]", ("weight",)),
    ("train_path=[{path: train.jsonl, weight: .inf}]", ("weight",)),
    ("train_path=[{path: train.jsonl, weight: 1}, other.jsonl]", ("task.train_path", "weight")),
    ("train_path=[{path: train.jsonl, weight: 1}, {path: other.jsonl, weight: 1.0e-9}]", ("other.jsonl", "weight")),
    ("train_path=[{path: train.jsonl, weight: 1.0e300}, {path: other.jsonl, weight: 1.0e300}]", ("weight",)),
    ("train_path=[{path: train.jsonl, questoin_key: q}]", ("questoin_key", "question_key")),
    ("train_path=[{path: train.jsonl, preset: math}]", ("train.jsonl:1", "problem")),
    ("train_path=[train.jsonl, heldout.jsonl]", ("heldout.jsonl", "every question")),
    ("train_path=[train.jsonl, train.jsonl]", ("train.jsonl", "seen before")),
    ("heldout_path={}", ("task.heldout_path",)),
    ("heldout_path=[heldout.jsonl]", ("task.heldout_path",)),
    ("heldout_path={'a b': heldout.jsonl}", ("task.heldout_path", "a b")),
    ("heldout_path={'': heldout.jsonl}", ("task.heldout_path",)),
    ("heldout_path={3: heldout.jsonl}", ("task.heldout_path",)),
    ("heldout_path={one: {}}", ("task.heldout_path.one", "path")),
    ("heldout_path={one: 3}", ("task.heldout_path.one",)),
    ("heldout_path={one: heldout.jsonl, two: gone.jsonl}", ("gone.jsonl", "No such file")),
    ("heldout_path={one: {path: heldout.jsonl, weight: 2}}", ("weight",)),
    ("heldout_path={one: heldout.jsonl, two: train.jsonl}", ("train.jsonl", "every question")),
]

FUNCTIONS: list[tuple[Words, Words]] = [
    ((), ("task.function",)),
    (("gone.py:f",), ("task.function", "gone.py")),
    (("f",), ("task.function", "module:function")),
    (("broken.py:f",), ("task.function", "broken.py", "ZeroDivisionError")),
    (("mine.py:Gone",), ("task.function", "Gone")),
    (("mine.py:number",), ("task.function", "not a function")),
    (("mine.py:no_seed",), ("task.function", "no_seed(seed)")),
    (("mine.py:raises",), ("mine.py:raises", "ZeroDivisionError")),
    (("mine.py:three",), ("mine.py:three", "held-out")),
    (("mine.py:one_list",), ("mine.py:one_list",)),
    (("mine.py:texts",), ("mine.py:texts", "row 1", "not a dict")),
    (("mine.py:no_answer",), ("mine.py:no_answer", "row 1", "answer")),
    (("mine.py:empty",), ("mine.py:empty", "no rows")),
    (("mine.py:no_sets",), ("mine.py:no_sets",)),
    (("mine.py:odd_set",), ("mine.py:odd_set",)),
    (("mine.py:generator_raises",), ("mine.py:generator_raises", "ZeroDivisionError")),
    (("mine.py:objects",), ("mine.py:objects", "row 1")),
    (("mine.py:Raises",), ("task.function", "ZeroDivisionError")),
    (("mine.py:NoCall",), ("task.function", "__call__")),
    (("mine.py:good", "task.kwargs={size: 3}"), ("task.function", "good(seed, size=3)")),
    (("mine.py:good", "task.kwargs=[1]"), ("task.kwargs",)),
    (("mine.py:good", "task.train_path=train.jsonl"), ("'task.train_path'",)),
]  # fmt: skip

GYM = ("reward.kind=reasoning_gym", "rollout.max_model_len=128")
GYMS: list[tuple[str, Words]] = [
    ("datasets: [{name: chain_sum, levels: [99]}]", ("task.datasets[0].levels", "99")),
    ("datasets: [{name: chain_sum, levels: [-1]}]", ("levels",)),
    ("datasets: [{name: chain_sum, levels: 3}]", ("levels", "list")),
    ("datasets: [{name: chain_sum, weight: 0}]", ("weight",)),
    ("datasets: [{name: chain_sum, weight: 1.0e300}, {name: chain_sum, weight: 1.0e300}]", ("weight",)),
    ("datasets: [{name: chain_sum, settings: {seed: 3}}]", ("settings", "seed")),
    ("datasets: [{name: chain_sum, settings: {size: 3}}]", ("settings", "size")),
    ("datasets: [{name: 3}]", ("name",)),
    ("datasets: [{name: ''}]", ("name",)),
    ("datasets: [{}]", ("name",)),
    ("datasets: [{name: chain_sum}], answer_pattern: '('", ("task.answer_pattern",)),
    ("datasets: [{name: chain_sum}], answer_pattern: '(a)(b)'", ("task.answer_pattern", "one group")),
    ("datasets: [{name: chain_sum}], num_prompts: 0", ("task.num_prompts",)),
    ("datasets: [{name: chain_sum}], chat: true", ("task.chat",)),
]

MINE = """
number = 3
def row(i): return {"question": f"{i}=", "answer": str(i)}
def good(seed): return [row(i) for i in range(64)], [row(i) for i in range(100, 116)]
def sets(seed): return good(seed)[0], {"a": good(seed)[1][:8], "b": good(seed)[1][8:]}
def no_seed(): return good(0)
def raises(seed): 1 / 0
def three(seed): return 3
def one_list(seed): return good(seed)[0]
def texts(seed): return ["7="] * 64, ["8="] * 16
def no_answer(seed): return [{"question": "7="}] * 64, good(seed)[1]
def empty(seed): return [], []
def no_sets(seed): return good(seed)[0], {}
def odd_set(seed): return good(seed)[0], {"a/b c": good(seed)[1]}
def objects(seed): return [{**row(i), "more": object()} for i in range(64)], good(seed)[1]
def generator_raises(seed):
    def rows():
        yield row(1)
        1 / 0
    return rows(), good(seed)[1]
class Raises:
    def __init__(self): 1 / 0
class NoCall:
    pass
"""


def inputs(folder: Path) -> None:
    (folder / "mine.py").write_text(MINE)
    (folder / "broken.py").write_text("1 / 0\n")
    (folder / "other.jsonl").write_text(rows(2000, 64))
    (folder / "train.txt").write_text(rows(100, 64))
    ask, reply = {"role": "user", "content": "7="}, {"role": "assistant", "content": "7"}
    chats = [{"messages": [ask, reply]}, {"messages": [ask]}]
    verl = [
        {"prompt": "7=", "reward_model": {"ground_truth": "7"}, "data_source": "d"},
        {"prompt": "8=", "data_source": "d", "reward_model": {}},
    ]
    sources = [{"question": "7=", "answer": "7", "list": ["a"]}]
    for name, table in (("chats", chats), ("verl", verl), ("sources", sources)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in table))


def custom(settings: Words) -> Words:
    function = f", function: '{settings[0]}'" if settings else ""
    return f"task={{kind: custom, chat: false{function}}}", *settings[1:]


GOOD: list[Words] = [
    ("task.train_path=[train.jsonl, other.jsonl]",),
    ("task.train_path=[{path: train.jsonl, weight: 3}, {path: other.jsonl, weight: 1}]",),
    ("task.heldout_path={one: heldout.jsonl, two: other.jsonl}",),
    ("task.train_path=train.txt",),
    ("task.train_path={path: train.jsonl, source: web}",),
    custom(("mine.py:good",)),
    custom(("mine.py:sets",)),
    ("task={kind: reasoning_gym, chat: false, datasets: [{name: chain_sum, levels: [0, 1]}]}", *GYM),
]  # fmt: skip

CASES = [
    *cases("preset", PRESETS, inputs),
    *cases("data files", [((f"task.{setting}",), words) for setting, words in FILES], inputs),
    *(
        Case("custom task", " ".join(settings) or "no function", words, custom(settings), inputs)
        for settings, words in FUNCTIONS
    ),
    *cases("generators", [((f"task={{kind: reasoning_gym, {tree}}}", *GYM), words) for tree, words in GYMS]),
    *cases("good task", [(settings, ()) for settings in GOOD], inputs),
]
