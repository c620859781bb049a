"""The bytes of one token: what log-probabilities are labelled with.

A token may be half a character, so its text alone does not tell it. It decodes no replies
(`client.row_text`).
"""

import re

from transformers import PreTrainedTokenizerBase

__all__ = ["TokenBytes"]

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


class TokenBytes:
    """Knows the two ways in which tokenizers spell bytes: GPT-2's letters and SentencePiece's."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        is_byte_level = "ByteLevel" in repr(getattr(backend, "decoder", None))
        self._letters = _byte_letters() if is_byte_level else {}
        self._special = frozenset(tokenizer.all_special_ids)

    def of(self, token: int) -> bytes:
        """The token's bytes; a special token's are its name."""
        name = str(self._tokenizer.convert_ids_to_tokens(token))
        if token in self._special:
            return name.encode()
        if self._letters and all(letter in self._letters for letter in name):
            return bytes(self._letters[letter] for letter in name)
        if match := _BYTE.fullmatch(name):
            return bytes.fromhex(match[1])
        return name.replace(_SPACE, " ").encode()

    def text(self, token: int) -> str:
        """The token as text; bytes that are none are written as \\xNN behind `bytes:`."""
        content = self.of(token)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def _byte_letters() -> dict[str, int]:
    """GPT-2's printable letter of each byte (openai/gpt-2, `bytes_to_unicode`), turned round."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + place): byte for place, byte in enumerate(others)}
