"""Converts GBNF, the notation of llama.cpp and of vLLM's xgrammar, to the Lark that llguidance reads."""

import re

from llguidance.gbnf_to_lark import gbnf_to_lark

_RULE = re.compile(r"^[ \t]*[\w-]+[ \t]*::=", re.MULTILINE)
# Strings, classes and comments, in which only code points are rewritten; and line ends before another alternative.
_PARTS = re.compile(
    r'(?P<kept>"(?:\\.|[^"\\\n])*"|\[(?:\\.|[^\]\\\n])*\]|#[^\n]*)|\s*\n(?:[ \t]*(?:#[^\n]*)?\n)*[ \t]*(?=\|)'
)
_CODE = re.compile(r"(\\\\)|\\(-)|\\u([0-9A-Fa-f]{4})|\\U([0-9A-Fa-f]{8})|\\x([0-9A-Fa-f]{2})")


def is_gbnf(grammar: str) -> bool:
    """Whether a grammar has rules of GBNF (`name ::= ...`); Lark's have one colon."""
    return _RULE.search(grammar) is not None


def to_lark(grammar: str) -> str:
    """Convert GBNF to Lark. Raises ValueError with the place of the mistake."""
    try:
        return gbnf_to_lark(_PARTS.sub(_plain, grammar))
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None
    except Exception as error:  # the converter raises no narrower one
        raise ValueError(str(error)) from None


def _plain(part: re.Match[str]) -> str:
    r"""Rewrite a part that the converter misreads: code points with leading zeros, `\-`, a rule over several lines."""
    return " " if part["kept"] is None else _CODE.sub(_character, part["kept"])


def _character(code: re.Match[str]) -> str:
    if code[1]:
        return code[1]
    value = ord(code[2]) if code[2] else int(code[3] or code[4] or code[5], 16)
    if value > 0x10FFFF or 0xD800 <= value < 0xE000:
        raise ValueError(f"{code[0]} is no character")
    character = chr(value)
    if character in '"\\[]':
        return f"\\{character}"
    if character in "^-":
        return f"\\x{value:02X}"
    return character if value > 0x7F or character.isprintable() else f"\\x{value:02X}"
