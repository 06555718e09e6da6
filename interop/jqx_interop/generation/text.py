# SPDX-License-Identifier: Apache-2.0
"""Tokens become text while they come: only characters that later tokens cannot change."""

from typing import Any

UNFINISHED = "\ufffd"
"""What a decoder writes for bytes that are no character, or not yet one."""

LONGEST = 3
"""Bytes of a character that may be there before its last one: as many UNFINISHED at most."""


class Detokenizer:
    """The text of a growing list of token ids, without special tokens."""

    def __init__(self, tokenizer: Any):
        """`tokenizer`: a `tokenizers.Tokenizer`."""
        self._tokenizer = tokenizer
        # Some decoders treat the first token of a text in a way of its own, so the tokens before
        # the new ones are decoded with them: all that is in the window.
        self._window: list[int] = []
        self._new = 0  # where in the window the tokens after the last whole character begin
        self._told = 0  # characters of the window's text that are out

    def add(self, token: int) -> str:
        """What is certain now and was not before."""
        self._window.append(token)
        text = self._text()
        end = len(text.rstrip(UNFINISHED))
        stable = max(end, len(text) - LONGEST)
        out = text[self._told : stable]
        self._told = max(self._told, stable)
        if end == len(text):
            self._window = self._window[self._new :]
            self._new, self._told = len(self._window), len(self._text())
        return out

    def rest(self) -> str:
        """What was held back, when no more tokens come."""
        text = self._text()
        out = text[self._told :]
        self._told = len(text)
        return out

    def _text(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=True)


class Stops:
    """A growing text, up to the first of several texts that end it."""

    def __init__(self, stops: tuple[str, ...]):
        """`stops`: texts, none of them empty."""
        self._stops = stops
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """What is certain now: what cannot be the beginning of a stop. Nothing after one is
        found.
        """
        if self.found:
            return ""
        self._held += text
        at = [i for stop in self._stops if (i := self._held.find(stop)) >= 0]
        self.found = bool(at)
        keep = min(at) if at else len(self._held) - self._beginning()
        out, self._held = self._held[:keep], self._held[keep:]
        return out

    def rest(self) -> str:
        """What was held back, when no more text comes."""
        out, self._held = "" if self.found else self._held, ""
        return out

    def _beginning(self) -> int:
        """Characters at the end that may be the beginning of a stop."""
        longest = max(map(len, self._stops), default=0) - 1
        for n in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-n:]) for stop in self._stops):
                return n
        return 0
