"""``JsonScanner``: follows one JSON value through text that comes in pieces. Knows nothing of tools or tokens."""

from __future__ import annotations

import re

MAX_DEPTH = 128  # arrays and objects in one another
MAX_ATOM = 1024  # characters of a number

_SPACE = re.compile(r"[ \t\n\r]*")
_RUN = re.compile(r'[^"\\]*')
_CONTROL = re.compile(r"[\x00-\x1f]")
_ATOM = re.compile(r"[-+.0-9A-Za-z]*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")


class JsonScanner:
    """Reads one JSON value (RFC 8259) from its first character to its last, in linear time and bounded memory.

    What it passes on is always the beginning of valid JSON: numbers and literals are held back until they are whole,
    and raw control characters in strings, which models write, are passed on as escapes. After ``is_done`` or
    ``is_broken`` it takes no more; a number at the outermost level is done when something follows it.
    """

    def __init__(self) -> None:
        self.is_done = False
        self.is_broken = False
        self.pending = ""  # of a number or literal that is not whole yet
        self._closers: list[str] = []
        self._state = "value"
        self._is_key = False  # of the string that is being read
        self._num_hex = 0  # digits that a \u escape still needs

    def feed(self, text: str, start: int = 0) -> tuple[int, str]:
        """Read on in ``text`` from ``start``; returns where it stopped and what it passes on.

        If the value breaks, that is the place of the character that cannot stand there, and ``pending`` comes before
        it.
        """
        passed: list[str] = []
        place = start
        while place < len(text) and not self.is_done and not self.is_broken:
            if self._state == "string":
                place = self._read_run(text, place, passed)
            elif self._state == "atom":
                place = self._read_atom(text, place, passed)
            elif self._state in ("escape", "hex"):
                place = self._read_escape(text, place, passed)
            else:
                end = self._skip_space(text, place)
                if end == len(text):
                    passed.append(text[place:])
                    place = end
                else:
                    passed.append(text[place:end])
                    place = self._read_structure(text, end, passed)
        return place, "".join(passed)

    @staticmethod
    def _skip_space(text: str, place: int) -> int:
        match = _SPACE.match(text, place)
        assert match is not None
        return match.end()

    def _read_run(self, text: str, place: int, passed: list[str]) -> int:
        match = _RUN.match(text, place)
        assert match is not None
        passed.append(_CONTROL.sub(lambda control: f"\\u{ord(control[0]):04x}", match[0]))
        place = match.end()
        if place < len(text):
            passed.append(text[place])
            if text[place] == "\\":
                self._state = "escape"
            elif self._is_key:
                self._state = "colon"
            else:
                self._end_value()
            place += 1
        return place

    def _read_escape(self, text: str, place: int, passed: list[str]) -> int:
        char = text[place]
        if self._state == "escape":
            if char == "u":
                self._state, self._num_hex = "hex", 4
            elif char in '"\\/bfnrt':
                self._state = "string"
            else:
                self.is_broken = True
                return place
        elif char in "0123456789abcdefABCDEF":
            self._num_hex -= 1
            self._state = "hex" if self._num_hex else "string"
        else:
            self.is_broken = True
            return place
        passed.append(char)
        return place + 1

    def _read_atom(self, text: str, place: int, passed: list[str]) -> int:
        match = _ATOM.match(text, place)
        assert match is not None
        self.pending += match[0]
        if len(self.pending) > MAX_ATOM:
            self.is_broken = True
        elif match.end() < len(text):
            if self.pending in ("true", "false", "null") or _NUMBER.fullmatch(self.pending):
                passed.append(self.pending)
                self.pending = ""
                self._end_value()
            else:
                self.is_broken = True
        return match.end()

    def _read_structure(self, text: str, place: int, passed: list[str]) -> int:
        char, state = text[place], self._state
        if char == '"' and state in ("value", "value_or_end", "key", "key_or_end"):
            self._is_key = state.startswith("key")
            self._state = "string"
        elif char in "{[" and state in ("value", "value_or_end") and len(self._closers) < MAX_DEPTH:
            self._closers.append("}" if char == "{" else "]")
            self._state = "key_or_end" if char == "{" else "value_or_end"
        elif char == ":" and state == "colon":
            self._state = "value"
        elif char == "," and state == "next":
            self._state = "key" if self._closers[-1] == "}" else "value"
        elif state in ("next", "key_or_end", "value_or_end") and char == self._closers[-1]:
            self._closers.pop()
            self._end_value()
        elif state in ("value", "value_or_end") and (char == "-" or (char.isascii() and char.isalnum())):
            self._state = "atom"
            return place
        else:
            self.is_broken = True
            return place
        passed.append(char)
        return place + 1

    def _end_value(self) -> None:
        self._state = "next"
        self.is_done = not self._closers
