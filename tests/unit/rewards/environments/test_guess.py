"""The game says higher or lower, and ends."""

from __future__ import annotations

from rewards.environments.guess import Guess


def test_a_game() -> None:
    game = Guess(guesses=4)
    game.reset({"answer": "42"})
    assert game.step("Perhaps 10, no, 50") == ("lower", 0.0, False)
    assert game.step("7") == ("higher", 0.0, False)
    assert game.step("hm") == ("no number", 0.0, False)
    assert game.step("42!") == (None, 1.0, True)


def test_the_number_may_be_hidden() -> None:
    game = Guess(below=10, opening="Which digit?")
    assert game.reset({"answer": "42"}) == "Which digit?"
    assert game.step("3") == ("lower", 0.0, False)
    assert game.step("2") == (None, 1.0, True)


def test_the_last_guess_ends_the_game() -> None:
    game = Guess(guesses=2, higher="+")
    game.reset({"answer": "9"})
    assert game.step("1" * 10_000) == ("lower", 0.0, False)
    assert game.step("8") == (None, 0.0, True)
