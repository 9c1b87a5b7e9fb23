"""Tokens of what an environment gives continue the policy's own, as the chat template would have it."""

from __future__ import annotations

import pytest

from launch.demo.tiny_model import make_tokenizer
from qarl.config.task import SortingTaskConfig
from qarl.errors import DataError
from qarl.tasks.turns import TurnEncoder
from qarl.types import EnvironmentTurn

TEMPLATE = (
    "{% if tools %}9{{ tools | length }}{% endif %}"
    "{% for m in messages %}<bos>{{ {'user': '1', 'assistant': '2', 'tool': '3', 'system': '4'}[m.role] }}="
    "{{ m.content }}<eos>=={% endfor %}{% if add_generation_prompt %}<bos>2={% endif %}"
)


class ChatConfig(SortingTaskConfig):
    chat = True  # type: ignore[misc]
    system_prompt = "77"  # type: ignore[misc,assignment]


def encoder(chat: bool) -> TurnEncoder:
    tokenizer = make_tokenizer(64)
    tokenizer.chat_template = TEMPLATE
    return TurnEncoder(tokenizer, ChatConfig() if chat else SortingTaskConfig())


def test_without_chat_a_text_is_taken_as_it_is() -> None:
    plain = encoder(chat=False)
    assert plain.text(plain.prompt(EnvironmentTurn("12="))) == "<bos>12="
    assert plain.text(plain.following(EnvironmentTurn("34="), last=2)) == "34="


def test_with_chat_the_template_goes_on_after_the_end_token() -> None:
    tokenizer, chat = make_tokenizer(64), encoder(chat=True)
    end, digit = tokenizer.convert_tokens_to_ids(["<eos>", "5"])
    assert chat.text(chat.prompt(EnvironmentTurn("12"))) == "<bos>4=77<eos>==<bos>1=12<eos>==<bos>2="
    assert chat.text(chat.following(EnvironmentTurn("34"), end)) == "==<bos>1=34<eos>==<bos>2="
    assert chat.text(chat.following(EnvironmentTurn("34"), digit)) == "<eos>==<bos>1=34<eos>==<bos>2="
    tools = [{"role": "tool", "content": "5"}, {"role": "user", "content": "6"}]
    assert chat.text(chat.following(EnvironmentTurn(tools), end)) == "==<bos>3=5<eos>==<bos>1=6<eos>==<bos>2="
    with_tools = EnvironmentTurn({"messages": tools[1:], "tools": [{}, {}]})
    assert chat.text(chat.prompt(with_tools)).startswith("92<bos>4=77<eos>")


def test_ids_are_taken_as_they_are() -> None:
    assert encoder(chat=True).following(EnvironmentTurn([5, 6]), last=2) == (5, 6)
    assert encoder(chat=True).prompt(EnvironmentTurn([5, 6])) == (5, 6)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("1<eos>2", "special token '<eos>'"),
        ("", "gave nothing"),
        (None, "gave a NoneType"),
        ([{"role": "user"}], "gave a NoneType"),
        ([1.5], "gave a float"),
    ],
)
def test_what_cannot_be_given_is_named(given: object, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        encoder(chat=False).following(EnvironmentTurn(given), last=2)  # type: ignore[arg-type]
