"""matchGlob, in time proportional to the lengths of glob and name: whatever a client asks for, others are
served meanwhile.

https://cloud.google.com/storage/docs/json_api/v1/objects/list#list-objects-and-prefixes-using-glob
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from ..front.http_server import HttpError

MAX_CHARACTERS = 1024  # as long as a name may be
_TOKEN = re.compile(r"\\.|\*\*/|\*\*|\[[!^]?\]?[^\]]*\]|.", re.DOTALL)

Test = Callable[[str], bool]


class Glob:
    """A glob: `*` and `?` stop at '/', `**` does not, and `**/` stands for any folders or none; [a-z], [!a-z]
    and {a,b} are choices; a backslash escapes.

    It is a graph of states. Each has an edge that takes a character, or free ones to other states.

    Raises HttpError 400 if the glob makes no sense.
    """

    def __init__(self, glob: str):
        if len(glob) > MAX_CHARACTERS:
            raise HttpError(400, f"A matchGlob has at most {MAX_CHARACTERS} characters.", "invalidParameter")
        self._tests: list[Test | None] = []
        self._next: list[list[int]] = []
        tokens = _TOKEN.findall(glob)
        _, self._end = self._alternatives(tokens, 0, self._state(), depth=0)

    def matches(self, name: str) -> bool:
        """Whether the whole name matches."""
        states = self._reachable([0])
        for character in name:
            states = self._reachable(
                target
                for state in states
                if (test := self._tests[state]) and test(character)
                for target in self._next[state]
            )
            if not states:
                return False
        return self._end in states

    def _state(self) -> int:
        self._tests.append(None)
        self._next.append([])
        return len(self._tests) - 1

    def _reachable(self, states: Iterable[int]) -> set[int]:
        found: set[int] = set()
        pending = list(states)
        while pending:
            state = pending.pop()
            if state not in found:
                found.add(state)
                if self._tests[state] is None:
                    pending += self._next[state]
        return found

    def _alternatives(self, tokens: list[str], at: int, start: int, depth: int) -> tuple[int, int]:
        """Builds the choices between commas, up to a closing brace; at depth 0 there is but one."""
        end, first = self._state(), True
        while first or (depth and tokens[at - 1] == ","):
            first, here = False, self._state()
            self._next[start].append(here)
            while at < len(tokens) and not (depth and tokens[at] in (",", "}")):
                at, here = self._token(tokens, at, here, depth)
            self._next[here].append(end)
            if depth and at == len(tokens):
                raise HttpError(400, "Invalid matchGlob: a '{' is not closed.", "invalidParameter")
            at += 1 if depth else 0
        return at, end

    def _token(self, tokens: list[str], at: int, here: int, depth: int) -> tuple[int, int]:
        token = tokens[at]
        if token == "{":
            if depth > 20:
                raise HttpError(400, "Invalid matchGlob: its braces are too deep.", "invalidParameter")
            return self._alternatives(tokens, at + 1, here, depth + 1)
        begins = at == 0 or tokens[at - 1].endswith("/") or (depth and tokens[at - 1] in ("{", ","))
        if token == "**/" and not begins:
            here = self._repeat(here, lambda _: True)  # after other characters, it is `**` and then a slash
            return at + 1, self._take(here, lambda c: c == "/")
        if token == "**/":
            folders = self._take(self._repeat(here, lambda _: True), lambda c: c == "/")
            after = self._state()
            self._next[here].append(after)
            self._next[folders].append(after)
            return at + 1, after
        if token == "**":
            return at + 1, self._repeat(here, lambda _: True)
        if token == "*":
            return at + 1, self._repeat(here, lambda c: c != "/")
        return at + 1, self._take(here, _test(token))

    def _take(self, here: int, test: Test) -> int:
        taker, after = self._state(), self._state()
        self._next[here].append(taker)
        self._tests[taker], self._next[taker] = test, [after]
        return after

    def _repeat(self, here: int, test: Test) -> int:
        loop, taker = self._state(), self._state()
        self._next[here].append(loop)
        self._next[loop].append(taker)
        self._tests[taker], self._next[taker] = test, [loop]
        return loop


def _test(token: str) -> Test:
    if token == "?":
        return lambda c: c != "/"
    if len(token) == 1 or token[0] == "\\":
        return lambda c: c == token[-1]
    negated = token[1] in "!^"
    inside = token[2 if negated else 1 : -1].replace("\\", r"\\").replace("[", r"\[").replace("^", r"\^")
    try:
        allowed = re.compile(f"[{inside}]")
    except re.error as error:
        raise HttpError(400, f"Invalid matchGlob: {token} ({error}).", "invalidParameter") from None
    return lambda c: c != "/" and bool(allowed.match(c)) != negated
