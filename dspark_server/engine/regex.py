r"""Translates regular expressions of ECMA-262, which JSON schemas use too, to Rust's syntax, which llguidance reads.

`\d`, `\w` and `\s` are ASCII, as in vLLM; `\p{...}` names Unicode classes. Brackets have no set operations and no
nested brackets, except POSIX names (`[[:alpha:]]`). Inline flags (`(?i)`, `(?s:...)`, `(?x)`) are Rust's. Only parts
that the two syntaxes read differently are rewritten; llguidance reports mistakes.
"""

import re
import string
from collections.abc import Iterator
from dataclasses import dataclass

CLASSES = {"d": "0-9", "w": "0-9A-Za-z_", "s": r"\t\n\x0B\f\r\x20"}
LINE_ENDS = r"\n\r\x{2028}\x{2029}"  # `.` matches all but these
ANY, NONE = r"(?s:.)", r"[^\x00-\x{10FFFF}]"
CONTROLS = {"t": 0x09, "n": 0x0A, "v": 0x0B, "f": 0x0C, "r": 0x0D}
ASCII_WORD = frozenset(string.ascii_letters + string.digits + "_")

_GROUP = re.compile(r"\(\?(?P<on>[a-zA-Z]*)(?:-(?P<off>[a-zA-Z]*))?(?P<end>[:)])")
_CODE = re.compile(r"x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|[xuU]\{([0-9A-Fa-f]{1,8})\}|U([0-9A-Fa-f]{8})")
_LOW_SURROGATE = re.compile(r"\\u([Dd][C-Fc-f][0-9A-Fa-f]{2})")
_PROPERTY = re.compile(r"[pP](?:\{[^}]*\}|[A-Za-z])")
_QUANTIFIER = re.compile(r"\{(?:\d+(?:,\d*)?\}|,)")  # `{,n}` is text in ECMA-262 and a count in Python: left to fail
_POSIX = re.compile(r"\[:\^?[a-z]+:\]")
_SPECIAL = re.compile(r"\\.|\[\^?(?:\\.|[^\]\\])*\]|[()|]", re.DOTALL)
_COMMENT = re.compile(r"#[^\n]*")


def to_rust(pattern: str) -> str:
    """The same language in Rust's syntax. Raises ValueError for parts that are not regular or that llguidance lacks."""
    return _Translation(pattern).run()


def conjuncts(pattern: str) -> list[str]:
    """Patterns to search for that together are equivalent to `pattern`, without the look-aheads at its beginning."""
    found = []
    while pattern.startswith("^(?="):
        ends = [at for at, depth in _depths(pattern) if pattern[at] == ")" and depth == 0]
        if not ends or any(pattern[at] == "|" and depth == 0 for at, depth in _depths(pattern)):
            break
        found.append(f"^(?:{pattern[4 : ends[0]]})")
        pattern = f"^{pattern[ends[0] + 1 :]}"
    return [pattern, *found]


def _depths(pattern: str) -> Iterator[tuple[int, int]]:
    """Positions of escapes, classes, parentheses and `|`, with the number of groups open after each."""
    depth = 0
    for part in _SPECIAL.finditer(pattern):
        depth += {"(": 1, ")": -1}.get(part[0], 0)
        yield part.start(), depth


@dataclass(frozen=True)
class _Set:
    """A character class, in Rust's syntax."""

    text: str


class _Translation:
    """One pass from left to right. `flags` are the current ones, `outer` those to restore after each open group."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.at = 0
        self.flags: frozenset[str] = frozenset()
        self.outer: list[frozenset[str]] = []

    def run(self) -> str:
        parts = []
        while self.at < len(self.pattern):
            parts.append(self._next())
        return "".join(parts)

    def _next(self) -> str:
        character = self.pattern[self.at]
        if character == "\\":
            return self._escape()
        if character == "[":
            return self._brackets()
        if character == "(":
            return self._open()
        if character == "{":
            count = self._take(_QUANTIFIER)
            return count[0] if count else self._literal()
        if "x" in self.flags and (character.isspace() or character == "#"):
            self.at = match.end() if (match := _COMMENT.match(self.pattern, self.at)) else self.at + 1
            return ""
        if character in "]}":
            return self._literal()
        self.at += 1
        if character == ")" and self.outer:
            self.flags = self.outer.pop()
        if character == "." and "s" not in self.flags:
            return f"[^{LINE_ENDS}]"
        return character if character in "()|*+?^$." else _exactly(ord(character))

    def _literal(self) -> str:
        self.at += 1
        return _exactly(ord(self.pattern[self.at - 1]))

    def _open(self) -> str:
        """The beginning of a group, or flags for the rest of one."""
        if self.pattern.startswith(("(?=", "(?!", "(?<=", "(?<!"), self.at):
            raise ValueError(f"look-around is not supported: {self.pattern[self.at : self.at + 20]!r}")
        group = self._take(_GROUP)
        if group is None:
            self.outer.append(self.flags)
            name = self._take(re.compile(r"\((?:\?P?<[^>]*>)?"))
            assert name is not None
            return name[0]
        flags = (self.flags | set(group["on"])) - set(group["off"] or "")
        if group["end"] == ":":
            self.outer.append(self.flags)
        self.flags = flags
        if group[0] == "(?:":
            return group[0]
        # This translation removes the spaces and comments that `x` ignores.
        on, off = group["on"].replace("x", ""), (group["off"] or "").replace("x", "")
        return f"(?{on}{'-' if off else ''}{off}{group['end']}" if on or off or group["end"] == ":" else ""

    def _escape(self) -> str:
        """An escape outside brackets."""
        if self.pattern.startswith(("\\A", "\\z"), self.at):
            self.at += 2
            return self.pattern[self.at - 2 : self.at]
        if self.pattern.startswith(("\\b", "\\B"), self.at):
            raise ValueError("word boundaries (\\b, \\B) are not supported; say which characters may stand there")
        meant = self._escaped()
        if isinstance(meant, int):
            return _exactly(meant)
        if not meant.text.startswith("["):
            return meant.text
        # Case folding would add the two letters beyond ASCII that fold to k and s.
        return f"(?-i:{meant.text})" if "i" in self.flags else meant.text

    def _escaped(self) -> int | _Set:
        """The character or class that the escape at this position denotes, in brackets and outside."""
        self.at += 1
        letter = self.pattern[self.at : self.at + 1]
        if not letter:
            raise ValueError("the pattern ends in a backslash")
        if code := self._take(_CODE):
            return self._code_point(int(next(digits for digits in code.groups() if digits), 16))
        if unicode := self._take(_PROPERTY):
            return _Set(f"\\{unicode[0]}")
        self.at += 1
        if letter in "dwsDWS":
            return _Set(f"[{'^' if letter.isupper() else ''}{CLASSES[letter.lower()]}]")
        if letter == "c" and self.pattern[self.at : self.at + 1] in ASCII_WORD - set("_0123456789"):
            self.at += 1
            return ord(self.pattern[self.at - 1]) % 32
        if letter == "0" and not self.pattern[self.at : self.at + 1].isdigit():
            return 0
        if letter in "123456789k":
            raise ValueError(f"back-references are not supported: '\\{letter}'")
        if letter in CONTROLS:
            return CONTROLS[letter]
        if letter in ASCII_WORD - {"_"}:
            raise ValueError(f"unknown escape '\\{letter}'")
        return ord(letter)

    def _code_point(self, value: int) -> int:
        if 0xD800 <= value < 0xDC00 and (low := self._take(_LOW_SURROGATE)):
            value = 0x10000 + ((value - 0xD800) << 10) + (int(low[1], 16) - 0xDC00)
        if value > 0x10FFFF or 0xD800 <= value < 0xE000:
            raise ValueError(f"U+{value:X} is no character")
        return value

    def _brackets(self) -> str:
        self.at += 1
        negated = self.pattern.startswith("^", self.at)
        self.at += negated
        sets, rest = [], []
        while not self.pattern.startswith("]", self.at):
            if self.at >= len(self.pattern):
                raise ValueError("a '[' is not closed")
            item = self._item()
            if isinstance(item, _Set):
                sets.append(item.text)
                continue
            last = self._range_end() if self.pattern.startswith("-", self.at) else None
            rest.append(_exactly(item) if last is None else f"{_exactly(item)}-{_exactly(last)}")
        self.at += 1
        if not sets and not rest:
            return ANY if negated else NONE
        if "i" in self.flags and sets and not negated:  # see `_escape`
            apart = f"(?-i:[{''.join(sets)}])"
            return f"(?:{apart}|[{''.join(rest)}])" if rest else apart
        return f"[{'^' * negated}{''.join(sets + rest)}]"

    def _item(self) -> int | _Set:
        """The next character or class inside brackets."""
        if self.pattern.startswith("\\b", self.at):
            self.at += 2
            return 0x08
        if self.pattern.startswith("\\", self.at):
            return self._escaped()
        if posix := self._take(_POSIX):
            return _Set(posix[0])
        self.at += 1
        return ord(self.pattern[self.at - 1])

    def _range_end(self) -> int | None:
        """The last character of a range; None if the hyphen here is a literal, beside a class or a bracket."""
        start = self.at
        self.at += 1
        if self.at < len(self.pattern) and self.pattern[self.at] != "]":
            end = self._item()
            if isinstance(end, int):
                return end
        self.at = start
        return None

    def _take(self, what: re.Pattern[str]) -> re.Match[str] | None:
        match = what.match(self.pattern, self.at)
        if match:
            self.at = match.end()
        return match


def _exactly(code: int) -> str:
    """A character as a literal, in brackets and outside, with any flags."""
    character = chr(code)
    return character if character.isalnum() else f"\\x{{{code:X}}}"
