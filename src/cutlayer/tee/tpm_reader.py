"""Big-endian TPM structures, field by field; too short or too long is malformed evidence.

It knows no structure (`tpm_attest`, `tpm_keys`).
"""

from cutlayer.tee.refusal import Refusal, refused

__all__ = ["TpmReader", "sized"]


class TpmReader:
    """A cursor over untrusted bytes."""

    def __init__(self, data: bytes, what: str) -> None:
        self._data = data
        self._what = what
        self._at = 0

    def take(self, num_bytes: int) -> bytes:
        """The next bytes.

        Raises:
            AttestationError: there are fewer.
        """
        end = self._at + num_bytes
        if end > len(self._data):
            raise refused(
                Refusal.MALFORMED, f"{self._what} of {len(self._data)} bytes ends within a field"
            )
        found = self._data[self._at : end]
        self._at = end
        return found

    def u8(self) -> int:
        """One byte."""
        return self.take(1)[0]

    def u16(self) -> int:
        """Two bytes, big-endian."""
        return int.from_bytes(self.take(2), "big")

    def u32(self) -> int:
        """Four bytes, big-endian."""
        return int.from_bytes(self.take(4), "big")

    def u64(self) -> int:
        """Eight bytes, big-endian."""
        return int.from_bytes(self.take(8), "big")

    def sized(self) -> bytes:
        """A TPM2B: two bytes of length, then so many."""
        return self.take(self.u16())

    def finish(self) -> None:
        """Refuse what follows the last field.

        Raises:
            AttestationError: something does.
        """
        if self._at != len(self._data):
            raise refused(
                Refusal.MALFORMED, f"{len(self._data) - self._at} bytes follow the {self._what}"
            )


def sized(data: bytes) -> bytes:
    """`data` as a TPM2B."""
    return len(data).to_bytes(2, "big") + data
