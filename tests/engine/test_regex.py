"""Regular expressions mean what ECMA-262 says, and their short classes are ASCII."""

import re

import pytest

from dspark_server.engine.grammar import FormError, GrammarCompiler
from dspark_server.engine.json_schema import PLAIN
from dspark_server.engine.regex import conjuncts

from .forms import admits

ARABIC, KELVIN, LONG_S, NO_BREAK = "\u0663", "\u212a", "\u017f", "\u00a0"
MEANINGS = {
    r"\d": ("7", ARABIC),
    r"\D": (ARABIC, "7"),
    r"\w": ("_", "é"),
    r"\W": ("é", "_"),
    r"\s": ("\t", NO_BREAK),
    r"\S": (NO_BREAK, " "),
    r"[\d]": ("7", ARABIC),
    r"[^\d]": (ARABIC, "7"),
    r"[\D]": (ARABIC, "7"),
    r"[^\W]": ("a", "é"),
    r"[^\s\d]": (NO_BREAK, " "),
    r"(?i)\w": ("K", KELVIN),
    r"(?i)\W": (LONG_S, "s"),
    r"(?i)[\w.]": (".", KELVIN),
    r"(?i)[^\w]": (".", "K"),
    r"((?i)a)b": ("Ab", "AB"),
    r"(?i:\w)k": ("Kk", "KK"),
    r"(?x) \d # [ a digit": ("7", ARABIC),
    r"\p{Nd}": (ARABIC, "a"),
    r"\pL": ("é", "1"),
    r"[\p{L}\d]": ("é", ARABIC),
    r"\P{L}": (ARABIC, "é"),
    # ---- escapes
    r"\\d": (r"\d", r"\7"),
    r"\\\d": (r"\7", rf"\{ARABIC}"),
    r"\\\\d": (r"\\d", r"\\7"),
    r"\u0041\x42\u{43}": ("ABC", "abc"),
    r"\uD83D\uDE00": ("😀", "😁"),
    r"[\uD83D\uDE00-\uD83D\uDE02]": ("😁", "😃"),
    r"\cA\0": ("\x01\0", "cA0"),
    r"\/\-\_\ \<\>\"": ('/-_ <>"', "/-_ <>'"),
    r"\t\n\v\f\r": ("\t\n\v\f\r", "tnvfr"),
    # ---- brackets
    r"[\d-x]": ("-", "a"),
    r"[a-\d]": ("-", "b"),
    r"[+--]": (",", "."),
    r"[a&&b]": ("&", "c"),
    r"[a~~b]": ("~", "c"),
    r"[^[\]]": ("a", "["),
    r"[\]\-\\^$.]": ("^", "a"),
    r"[\b]": ("\b", "b"),
    r"[^]": ("\n", ""),
    r"[[:digit:]]": ("7", "a"),
    r"[$&(*?{|}]": ("{", "a"),
    # ---- the rest
    r".": ("é", "\r"),
    r"(?s:.)": ("\n", ""),
    r"a{x}]": ("a{x}]", "a"),
    r"(?<n>a)(?P<m>b)": ("ab", "ba"),
    r"^a$|^b$": ("b", "ab"),
    r"\d{2,3}?": ("12", f"1{ARABIC}"),
    "é ñ/#": ("é ñ/#", "éñ/#"),
}


@pytest.mark.parametrize("pattern", MEANINGS)
def test_what_a_pattern_lets_through(pattern: str, compiler: GrammarCompiler) -> None:
    fits, does_not = MEANINGS[pattern]
    form = compiler.regex(pattern)
    assert admits(form, fits)
    assert not admits(form, does_not)


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        (r"\bfoo", "word boundaries"),
        (r"a(?!b)c", "look-around"),
        (r"(?<=a)b", "look-around"),
        (r"(a)\1", "back-references"),
        (r"\k<n>", "back-references"),
        (r"\uD83D", "no character"),
        (r"\e", "unknown escape"),
        ("a\\", "backslash"),
        ("[a", "not closed"),
        ("(a", "unclosed group"),
        ("a{,3}", "repetition"),
        ("(?-u:.)", "not allowed"),
    ],
)
def test_what_cannot_be_followed_is_said(pattern: str, why: str, compiler: GrammarCompiler) -> None:
    with pytest.raises(FormError, match=why):
        compiler.regex(pattern)


def test_look_aheads_at_the_beginning_are_conditions_of_their_own() -> None:
    assert conjuncts(r"^(?=.{2}$)(?=[)a(]|\))x(y|z)$") == [r"^x(y|z)$", r"^(?:.{2}$)", r"^(?:[)a(]|\))"]
    for whole in (r"^(?=a)b|c", r"a(?=b)", r"^(?=a", "^a"):
        assert conjuncts(whole) == [whole]


def test_the_duration_without_look_arounds_is_the_same() -> None:
    """Every text of up to seven of these letters that begins like a duration."""
    (given, plain) = next(iter(PLAIN.items()))
    texts = ["P"]
    for _ in range(6):
        texts += [
            text + part for text in texts[-3000:] for part in ("1", "T", "1Y", "1M", "1D", "1H", "1,1S", "1S", "1W")
        ]
    assert sum(re.search(given, text) is not None for text in texts) > 50
    assert all(bool(re.search(given, text)) == bool(re.search(plain, text)) for text in texts)
