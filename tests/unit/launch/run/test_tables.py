from launch.run.tables import MAX_TOKENS, with_tokens

LETTERS = "abcdef"


def decode(ids: list[int]) -> str:
    return "".join(LETTERS[i] for i in ids)


def test_error_tokens_are_marked_in_the_text() -> None:
    row = with_tokens({"reward": 1.0, "token_ids": [0, 1, 2, 3], "token_errors": [0, 1, 1, 0]}, decode)
    assert row == {"reward": 1.0, "token_errors": [0, 1, 1, 0], "marked": "a⟦bc⟧d", "tokens": ["a", "b", "c", "d"]}
    assert with_tokens({"token_ids": [0], "token_errors": [0]}, decode)["marked"] == ""


def test_long_responses_are_cut() -> None:
    row = with_tokens({"response": "x" * 5000, "token_ids": [1] * 5000, "token_logprobs": [0.0] * 5000}, None)
    assert row == {"response": "x" * 5000, "token_logprobs": [0.0] * MAX_TOKENS}
