import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from launch.run.tables import MAX_TOKENS, texts_of, with_tokens

LETTERS = "abcdef"


def decode(ids: list[int]) -> str:
    return "".join(LETTERS[i] for i in ids)


def test_error_tokens_are_marked_in_the_text() -> None:
    row = with_tokens({"reward": 1.0, "token_ids": [0, 1, 2, 3], "token_errors": [0, 1, 1, 0]}, decode)
    assert row == {"reward": 1.0, "token_errors": [0, 1, 1, 0], "marked": "a⟦bc⟧d", "tokens": ["a", "b", "c", "d"]}
    assert with_tokens({"token_ids": [0], "token_errors": [0]}, decode)["marked"] == ""


def test_of_long_responses_the_values_are_cut_and_no_text() -> None:
    row = with_tokens({"response": "x" * 5000, "token_ids": [1] * 5000, "token_logprobs": [0.0] * 5000}, None)
    assert row == {"response": "x" * 5000, "token_logprobs": [0.0] * MAX_TOKENS}
    flags = [0] * (MAX_TOKENS + 2) + [1]
    row = with_tokens({"token_ids": [0] * MAX_TOKENS + [1, 2, 3], "token_errors": flags}, decode)
    assert row["tokens"] == ["a"] * MAX_TOKENS + ["bcd"]
    assert row["marked"] == "a" * MAX_TOKENS + "bc⟦d⟧"
    assert row["token_errors"] == [0] * MAX_TOKENS


def byte_level() -> Tokenizer:
    """A token for each byte, by its value, and of some pairs of bytes one more."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]  # the others are moved to 256 and on
    hidden = [byte for byte in range(256) if byte not in visible]
    names = [chr(byte if byte in visible else 256 + hidden.index(byte)) for byte in range(256)]
    pairs = [(names[a], names[b]) for a, b in (b"he", b"\xe2\x82", b"\x98\x80", b" \xf0")]
    vocab = {name: i for i, name in enumerate([*names, *map("".join, pairs)])}
    tokenizer = Tokenizer(models.BPE(vocab, pairs))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def word_pieces() -> Tokenizer:
    """Words with their spaces, of which decoding strips the first, and bytes of other characters."""
    vocab = {"▁a": 0, "▁b": 1, "c": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


TOKENIZERS = {"byte level": (byte_level(), 0, 259), "word pieces": (word_pieces(), 3, 2)}
"""Each with the id of its first byte, and the last id that it may decode beside any other."""


@pytest.mark.parametrize("name", TOKENIZERS)
@given(st.data())
def test_the_texts_of_the_tokens_are_the_text(name: str, data: st.DataObject) -> None:
    tokenizer, first_byte, last = TOKENIZERS[name]
    character = st.characters(codec="utf-8").map(lambda one: [first_byte + byte for byte in one.encode()])
    token = st.integers(0, last).map(lambda one: [one])
    ids = [one for part in data.draw(st.lists(character | token, max_size=12)) for one in part]
    texts = texts_of(ids, tokenizer.decode)
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids)


def test_a_character_of_several_tokens_belongs_to_the_last() -> None:
    ids = [*b"n\xc3\xa9 ", 257, 0xAC, 259, 0x9F, 258, ord("!")]
    row = with_tokens({"token_ids": ids, "token_errors": [0, 1, 1, 0, 0, 0, 0, 0, 1, 0]}, byte_level().decode)
    assert row["tokens"] == ["n", "", "é", " ", "", "€", "", "", " 😀", "!"]
    assert row["marked"] == "n⟦é⟧ €⟦ 😀⟧!"
