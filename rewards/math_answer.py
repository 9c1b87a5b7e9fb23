"""Answers to mathematical problems: from text to numbers, formulas, words, relations and groups of them.

What is not understood as a whole is refused (ValueError): a part that is left out makes a wrong answer right. The
structure (lists, brackets, relations, matrices, units) and plain numbers are read here, exactly; Math-Verify's LaTeX
grammar (https://github.com/huggingface/latex2sympy2_extended) reads formulas, and only such as it reads whole.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

LONGEST = 2000
"""Characters of an answer. Longer ones are refused: nested ones would take the time-out."""
MOST_DIGITS = 400
"""Of an exponent's value: 1e400 is a number, 1e401 is refused."""

CHARACTERS = str.maketrans(
    {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # full-width
    | dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-")
    | dict.fromkeys("\u00a0\u2007\u2009\u202f\u3000", " ")
    | dict.fromkeys("\u2061\u2062\u200b\ufeff", "")
    | {
        "×": r"\times ",
        "·": r"\cdot ",
        "⋅": r"\cdot ",
        "÷": "/",
        "⁄": "/",
        "°": r"^\circ ",
        "π": r"\pi ",
        "∞": r"\infty ",
    }
    | {"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "∪": r"\cup ", "∈": r"\in ", "θ": r"\theta "}
    | {power: f"^{digit}" for digit, power in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}
    | {"½": r" \frac{1}{2}", "⅓": r" \frac{1}{3}", "⅔": r" \frac{2}{3}", "¼": r" \frac{1}{4}", "¾": r" \frac{3}{4}"}
)
"""Characters for which LaTeX or the keyboard has another spelling."""
SPELLINGS = [
    (r"\\!\s*|\\(?:displaystyle|textstyle|bigl?|bigr|Bigl?|Bigr|limits)(?![a-zA-Z])", ""),
    (r"\\m?(?:left|right)(?![a-zA-Z])\s*\.?", ""),
    (r"\\(?:dfrac|tfrac|cfrac)(?![a-zA-Z])", r"\\frac"),
    (r"\\frac\s*(\d|\\pi)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"\\frac\s*(\{[^{}]*\})\s*(\w)", r"\\frac\1{\2}"),
    (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
    (r"\\log\s*_\s*(\d)", r"\\log_{\1}"),
    (r"\\(?:textnormal|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|operatorname)(?![a-zA-Z])", r"\\text"),
    (r"(?:,\s*)?\\text\s*\{\s*,?\s*(?:and|or)\s*\}", ", "),
    (r"(?<![a-zA-Z\\]),?\s*\b(?:and|or)\b(?![a-zA-Z}])", ", "),
    (r"\\(?:leq|leqslant)(?![a-zA-Z])", r"\\le"),
    (r"\\(?:geq|geqslant)(?![a-zA-Z])", r"\\ge"),
    (r"\\(?:neq)(?![a-zA-Z])", r"\\ne"),
    (r"(?<=\d)\s*(?:\{,\}|\\,|\\:|\\;|\\ |~)\s*(?=\d{3}(?!\d))", ","),
    (r"(?<!\\)\\(?:[,:; ]|q?quad(?![a-zA-Z]))|~|\s", " "),
    (r"(?<=\d),(?=\d{3}(?!\d)) ", ","),
]
"""What means the same, in the order of replacement."""

DELIMITERS = [("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**")]
ENVIRONMENT = re.compile(
    r"\\begin\{(equation|align|aligned|gather|displaymath|math)(\*?)\}(.*)\\end\{\1\2\}", re.DOTALL
)
MATRIX = re.compile(r"\\begin\{([pbvBV]?matrix)\}((?:(?!\\begin).)*)\\end\{\1\}", re.DOTALL)

_WHOLE = r"\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+"
_FRACTION = r"(?P<over>\d+) ?/ ?(?P<under>\d+)|\\frac ?\{ ?(?P<over_>[-\d,]+) ?\} ?\{ ?(?P<under_>[-\d,]+) ?\}"
NUMBER = re.compile(
    rf"(?P<sign>[-+]?) ?(?:(?:(?P<mixed>\d+)(?: |(?=\\frac)))?(?:{_FRACTION})"
    rf"|(?P<whole>{_WHOLE})?(?:\.(?P<decimals>\d*)(?:\\(?:overline|bar|dot) ?\{{?(?P<repeats>\d+)\}}?)?)?"
    r"(?:[eE](?P<e>[-+]?\d+)| ?(?:\\times|\\cdot|\*|x) ?10 ?\^ ?(?:\{ ?(?P<ten>[-+]?\d+) ?\}|(?P<ten_>\d)))?)"
)
BASE = re.compile(r"-?\w+ ?_ ?(?:\d+|\{ ?\d+ ?\})")
PLUS_MINUS = re.compile(r"\\pm(?![a-zA-Z])")
RATIO = re.compile(r"\d+(?: ?: ?\d+)+")

_UNIT_NAMES = (
    "m cm mm km dm ft in yd mi g kg mg lb lbs oz s h hr hrs ms min mins sec secs l ml cl mph kph kmh km/h m/s "
    "ft/s cm/s am pm sq cu hz khz pa n j w kw v a mol kj k c f usd eur "
)
UNIT_NAMES = frozenset(_UNIT_NAMES.split())
"""Units of less than three letters, or with a slash; every longer word behind a number counts as one."""
SAME_UNIT = {"$": "dollar", "usd": "dollar", r"^\circ": "degree", r"^{\circ}": "degree", "\\%": "%", "percent": "%"}
UNIT = re.compile(
    r"(?P<core>.*[\d})!a-z$]) ?(?P<unit>\\?%|\^ ?\{? ?\\circ ?\}?"
    r"|\\text ?\{[^{}]*\} ?(?:\^ ?\{?\d\}?)?| (?P<words>[a-zA-Z][a-zA-Z ./^0-9]*))",
    re.DOTALL,
)
NO_UNIT = re.compile(
    r"\b(?:or|and|not|no|to|than|more|less|fewer|least|most|about|plus|minus|times|over|wrong|is|if|mod)\b|[,;]|(?<!\^)(?<!\^\{)\d"
    r"(?!\}?$)",
    re.IGNORECASE,
)
"""Words that make another value of a number, and digits that are no power of a unit."""
ANGLE = re.compile(r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)(?![a-z])")
_FUNCTIONS = "sin cos tan cot sec csc log ln exp arcsin arccos arctan sinh cosh tanh sqrt pi "
FUNCTIONS = frozenset(_FUNCTIONS.split())

_KNOWN = (
    "frac sqrt pi cdot times div sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp binom "
    "infty pm alpha beta gamma delta epsilon theta lambda mu nu rho sigma tau phi omega Delta Omega lfloor rfloor "
    "lceil rceil vert lvert rvert circ "
)
KNOWN = frozenset(_KNOWN.split())
"""Commands that a formula may hold: the grammar reads each of them, and drops none."""
UNREAD = re.compile(r"[^\w\s+\-*/^(){}\[\]|!.@]|(?<![a-zA-Z@])_|\d\s+\d|[a-zA-Z]{4,}|[^\x00-\x7f]")
"""Signs that the grammar drops or misreads: subscripts of numbers, quotes, two numbers side by side, words; "@" stands
for a command."""
RELATION = re.compile(r"\\(?:le|ge|ne|equiv)(?![a-zA-Z])|[<>=]")
NAME = re.compile(
    r"\\?[a-zA-Z]+'?(?: ?_ ?(?:\w|\{\w+\}))?(?: ?\([a-z](?:, ?[a-z])*\))?|\\text ?\{[^{}]*\}|\|[a-zA-Z]+\|"
)


@dataclass(frozen=True)
class Scalar:
    """An exact number, or a formula of sympy, with its unit ("" for none)."""

    value: Any
    unit: str = ""


@dataclass(frozen=True)
class Words:
    """Text without case, spaces and parentheses: a choice, a name, a ratio, a number in another base."""

    text: str


@dataclass(frozen=True)
class Relation:
    """`sides` joined by `signs`; `named` when the first side only names the value, as in x = 5."""

    signs: tuple[str, ...]
    sides: tuple["Answer", ...]
    named: bool


@dataclass(frozen=True)
class Group:
    """Several answers. `brackets` are "()", "[)" and so on; "" for a list and a set, "cup" for a union, "matrix"."""

    brackets: str
    items: tuple["Answer", ...]

    @property
    def ordered(self) -> bool:
        return self.brackets not in ("", "cup")


Answer = Scalar | Words | Relation | Group


@lru_cache(maxsize=4096)
def read(text: str) -> Answer:
    """The answer that `text` writes, as a whole. Raises ValueError: it is too long, or a part of it has no meaning."""
    if len(text) > LONGEST:
        raise ValueError(f"it has {len(text)} characters, more than {LONGEST}")
    cleaned = text.translate(CHARACTERS)
    for pattern, replacement in SPELLINGS:
        cleaned = re.sub(pattern, replacement, cleaned)
    return _read(" ".join(cleaned.split()))


def _read(text: str) -> Answer:
    text = _bare(text)
    if not text:
        raise ValueError("it is empty")
    if number := as_number(text):
        return Scalar(*number)
    if BASE.fullmatch(text) or RATIO.fullmatch(text):
        return _words(text)
    if len(parts := _split(text, r"\\cup(?![a-zA-Z])")) > 1:
        return Group("cup", tuple(map(_read, parts)))
    # In a list with spaces behind its commas, the other commas separate thousands.
    if len(parts := _split(text, r"[,;] |;" if re.search(r"[,;] ", text) else r"[,;]")) > 1:
        return Group("", tuple(_flat(map(_read, parts))))
    if matrix := MATRIX.fullmatch(text):
        return Group("matrix", tuple(Group("()", tuple(map(_read, row.split("&")))) for row in _rows(matrix[2])))
    if len(sides := _split(text, RELATION.pattern)) > 1:
        signs = tuple(RELATION.findall(text))
        named = signs[0] == "=" and bool(NAME.fullmatch(sides[0].strip()))
        return Relation(signs, tuple(_side(side) for side in sides), named)
    if len(PLUS_MINUS.findall(text)) == 1 and not text.startswith(("(", "[")):
        return Group("", (_read(PLUS_MINUS.sub("+", text).lstrip("+")), _read(PLUS_MINUS.sub("-", text))))
    if (group := _group(text)) is not None:
        return group
    if (unit := UNIT.fullmatch(text)) and _is_unit(unit):
        core = _read(unit["core"])
        if isinstance(core, Scalar) and not core.unit:
            return Scalar(core.value, _unit(unit["unit"]))
    if (words := _as_words(text)) is not None:
        return words
    return Scalar(_formula(text))


def as_number(text: str) -> tuple[Fraction, str] | None:
    """The exact value of a plain number and its currency; None for everything else."""
    currency = re.match(r"(-?) ?(\\?\$|€|£|¥|Rs\.?(?= ?\d))", text)
    if currency:
        text = currency[1] + text[currency.end() :].lstrip()
    found = NUMBER.fullmatch(text)
    if not found or not re.search(r"\d", text):
        return None
    part = {name: (value or "").replace(",", "").replace(" ", "") for name, value in found.groupdict().items()}
    if over := part["over"] or part["over_"]:
        under = part["under"] or part["under_"]
        if not re.fullmatch(r"-?\d+", over) or not re.fullmatch(r"-?\d*[1-9]\d*", under):
            return None
        if part["mixed"] and "-" in over + under:
            return None
        value = int(part["mixed"] or "0") + Fraction(int(over), int(under))
    else:
        exponent = int(part["e"] or part["ten"] or part["ten_"] or "0")
        if not (part["whole"] or part["decimals"] or part["repeats"]) or abs(exponent) > MOST_DIGITS:
            return None
        decimals, repeats = part["decimals"], part["repeats"]
        value = Fraction(int(part["whole"] + decimals or "0"), 10 ** len(decimals))
        if repeats:
            value += Fraction(int(repeats), (10 ** len(repeats) - 1) * 10 ** len(decimals))
        value *= Fraction(10) ** exponent
    return (-value if part["sign"] == "-" else value), _unit(currency[2]) if currency else ""


def _bare(text: str) -> str:
    """`text` without what stands around an answer and is no part of it."""
    before = None
    while text != before:
        before = text = text.strip().rstrip(".,;: ")
        for left, right in DELIMITERS:
            if len(text) >= len(left + right) and text.startswith(left) and text.endswith(right):
                inner = text[len(left) : -len(right)]
                text = text if re.search(rf"(?<!\\){re.escape(left)}", inner) else inner
        if environment := ENVIRONMENT.fullmatch(text):
            text = environment[3]
        if (box := re.match(r"\\(?:boxed|fbox|text) ?(?=\{)|(?=\{)", text)) and _closing(text, box.end()) == len(
            text
        ) - 1:
            text = text[box.end() + 1 : -1]
        text = re.sub(r"^(?:\\approx(?![a-zA-Z])|(?:[a-zA-Z] ?)\\in(?![a-zA-Z]))", "", text)
        if text.startswith("\\{") and text.endswith("\\}") and "\\{" not in text[2:]:
            return text
    return text


def _group(text: str) -> Answer | None:
    """The items in the brackets around `text`; None when it has none, or they hold one formula."""
    left, right = (r"\{", r"\}") if text.startswith(r"\{") else (text[0], text[-1])
    if left not in ("(", "[", r"\{") or right not in (")", "]", r"\}") or not text.endswith(right):
        return None
    inner = text[len(left) : -len(right)]
    parts = _split(inner, r"[,;]")
    if left == r"\{":
        return Group("", tuple(_flat(map(_read, parts))))
    if len(parts) == 1:
        is_choice = re.fullmatch(r"(?:\\text ?\{ ?)?[A-Za-z](?: ?\})?", inner.strip())
        return _words(inner) if is_choice and left == "(" else None
    return Group(left + right, tuple(map(_read, parts)))


def _split(text: str, pattern: str) -> list[str]:
    """`text` between the matches of `pattern` outside of all brackets. Half-open intervals count as brackets."""
    parts, start, depth = [], 0, 0
    for match in re.finditer(
        rf"(?P<cut>{pattern})|(?P<open>\\begin\{{\w+\*?\}}|[(\[{{])|\\end\{{\w+\*?\}}|[)\]}}]", text
    ):
        if match["cut"] is None:
            depth += 1 if match["open"] else -1
        elif depth == 0:
            parts.append(text[start : match.start()])
            start = match.end()
    return [*parts, text[start:]]


def _flat(answers: Iterator[Answer]) -> Iterator[Answer]:
    """The items of lists within a list, one by one."""
    for answer in answers:
        yield from answer.items if isinstance(answer, Group) and answer.brackets == "" else (answer,)


def _rows(body: str) -> Sequence[str]:
    return [row for row in re.split(r"\\\\", body) if row.strip()]


def _closing(text: str, start: int) -> int:
    """Where the brace that opens at `start` closes; -1 when it does not."""
    depth = 0
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    return -1


def _side(text: str) -> Answer:
    """A side of a relation; a name needs no meaning of its own."""
    return _words(text) if NAME.fullmatch(text.strip()) else _read(text)


def _is_unit(found: re.Match[str]) -> bool:
    if NO_UNIT.search(found["unit"]):
        return False
    words = (found["words"] or "").lower().split()
    if words and re.search(r"(?<!\\pi)(?<=[a-zA-Z])$", found["core"].rstrip()):
        return False  # letters behind letters are factors
    if "circ" in found["unit"] and ANGLE.search(found["core"]):
        return False  # the unit of the angle, not of the value
    return all(
        word in UNIT_NAMES or (len(word) > 2 and word.isalpha() and word not in FUNCTIONS)
        for word in (re.sub(r"(?:\^\{?\d\}?|\d)?\.?$", "", word) for word in words)
    )


def _unit(text: str) -> str:
    """A unit without spelling: 10 Meters. -> meter."""
    plain = re.sub(r"\\text|[\s{}.]", "", text).lower().replace(r"\$", "$")
    plain = SAME_UNIT.get(plain, plain)
    return plain[:-1] if len(plain) > 3 and plain.endswith("s") else plain


def _as_words(text: str) -> Words | None:
    """Letters alone, or a text with a word that no formula has."""
    unwrapped = re.sub(r"\\text ?\{([^{}]*)\}", r"\1", text)
    plain = unwrapped.strip().removeprefix("(").removesuffix(")")
    if re.fullmatch(r"[a-zA-Z .'-]*[a-zA-Z][a-zA-Z .'-]*", plain) and plain.strip() not in ("e", "i"):
        return _words(text)
    has_word = any(word not in FUNCTIONS for word in re.findall(r"(?<![\\a-zA-Z])[a-zA-Z]{4,}", plain))
    is_text = has_word or unwrapped != text
    return _words(text) if is_text and re.fullmatch(r"[\w\s.,:'_{}-]+", plain) else None


def _words(text: str) -> Words:
    return Words(re.sub(r"\\text|[\s(){}.]", "", text).casefold())


def _formula(text: str) -> Any:
    """`text` as an expression of sympy with exact numbers. Raises ValueError."""
    commands = set(re.findall(r"\\([a-zA-Z]+|.)", text)) - KNOWN
    if commands or UNREAD.search(re.sub(r"\\[a-zA-Z]+", "@", text)):
        raise ValueError(f"{text!r} is no formula that can be read whole")
    return _parsed(text)


def _parsed(text: str) -> Any:
    import sympy  # two seconds, which data of plain numbers need not wait for
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, NormalizationConfig, latex2sympy, normalize_latex

    spelling = NormalizationConfig(boxed="none", malformed_operators=True)
    try:
        latex = normalize_latex(text, spelling)
        parsed = latex2sympy(
            latex,
            is_real=True,
            convert_degrees=True,
            normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )
    except Exception as error:  # the grammar raises plain Exception
        raise ValueError(f"{text!r} is no formula") from error
    if not isinstance(parsed, sympy.Expr) or parsed.has(sympy.zoo, sympy.nan):
        raise ValueError(f"{text!r} has no value")
    exact = {number: sympy.Rational(str(number)) for number in parsed.atoms(sympy.Float)}
    return parsed.xreplace({**exact, sympy.Symbol("i", real=True): sympy.I})
