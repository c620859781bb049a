"""One row's tokens to text as they come, each decoded once: a reply of n tokens costs O(n).

It does not choose tokens (`sampling`) nor know a conversation (`chat`).
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

__all__ = ["RowText"]

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_MAX_WINDOW = 32
"""Tokens decoded together at most. A character has up to four; only garbage has more."""


class RowText:
    """One row's reply: shows text once no later token or stop text can change it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        self._decoder = _Decoder(tokenizer)
        self._stop = tuple(text for text in stop if text)
        self._held = ""
        self._num_shown = 0
        self.is_stopped = False
        """Whether a stop text was met: nothing more is shown."""

    @property
    def num_chars(self) -> int:
        """Characters known so far, held back ones too."""
        return self._num_shown + len(self._held)

    def add(self, token: int) -> str:
        """The text that this token makes certain; maybe none."""
        return "" if self.is_stopped else self._extend(self._decoder.add(token), is_last=False)

    def rest(self) -> str:
        """What was held back, when no more tokens come."""
        return "" if self.is_stopped else self._extend(self._decoder.rest(), is_last=True)

    def _extend(self, new: str, is_last: bool) -> str:
        self._held += new
        # A stop text never begins in what was shown: its possible beginnings are held back.
        ends = [self._held.index(stop) for stop in self._stop if stop in self._held]
        if ends:
            self.is_stopped = True
            return self._show(min(ends))
        return self._show(len(self._held) - (0 if is_last else self._num_uncertain()))

    def _show(self, num_chars: int) -> str:
        piece, self._held = self._held[:num_chars], self._held[num_chars:]
        if self.is_stopped:
            self._held = ""
        self._num_shown += len(piece)
        return piece

    def _num_uncertain(self) -> int:
        """The beginning of a stop text at the end of the reply may still become the whole."""
        starts = [
            length
            for stop in self._stop
            for length in range(1, len(stop))
            if self._held.endswith(stop[:length])
        ]
        return max(starts, default=0)


class _Decoder:
    """Decodes the newest tokens behind the few before them, which settle spaces and bytes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._num_context = 0
        self._num_taken = 0

    def add(self, token: int) -> str:
        """Text that is new and that no later token changes."""
        self._window.append(token)
        text = self._decode(self._window)
        certain = text.rstrip(_UNFINISHED)
        if len(certain) == len(text) or len(self._window) >= _MAX_WINDOW:
            new = text[self._num_taken :]
            self._advance(len(text))
            return new
        return self._take(certain)

    def rest(self) -> str:
        """The rest, complete or not."""
        return self._take(self._decode(self._window))

    def _take(self, text: str) -> str:
        new = text[self._num_taken :]
        self._num_taken = max(self._num_taken, len(text))
        return new

    def _advance(self, num_chars: int) -> None:
        """Keep the newest tokens as context, if they show text: a leading space depends on it."""
        context = self._window[self._num_context :]
        text = self._decode(context)
        is_needed = not text and len(self._window) < _MAX_WINDOW
        self._num_taken = num_chars if is_needed else len(text)
        if not is_needed:
            self._window, self._num_context = context, len(context)

    def _decode(self, tokens: Sequence[int]) -> str:
        # Cleaning up spaces would change text that was shown already.
        text = self._tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)
