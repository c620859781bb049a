"""How much a piece of evidence is worth; printed beside every result, never raised silently."""

from enum import IntEnum

__all__ = ["Assurance"]


class Assurance(IntEnum):
    """Ordered: a policy names the least that it accepts."""

    SIMULATED = 0
    """Made by software under a test root: proves nothing to anybody."""
    MEASURED_BOOT = 1
    """A TPM's word: what was booted, not that memory is hidden from the host. Nor is a GPU's own
    worth more without a CPU's beside it: it answers any program that asks."""
    HARDWARE_TEE = 2
    """A CPU's enclave or confidential VM."""
    HARDWARE_TEE_GPU = 3
    """The same with an accelerator in confidential mode beside it."""

    @property
    def label(self) -> str:
        """As it is printed: SIMULATED in capitals wherever it shows."""
        return _LABELS[self]

    @classmethod
    def named(cls, label: str) -> "Assurance":
        """The level with this label.

        Raises:
            KeyError: there is none.
        """
        return {text.lower(): level for level, text in _LABELS.items()}[label.lower()]


_LABELS = {
    Assurance.SIMULATED: "SIMULATED",
    Assurance.MEASURED_BOOT: "measured-boot",
    Assurance.HARDWARE_TEE: "hardware-tee",
    Assurance.HARDWARE_TEE_GPU: "hardware-tee+gpu-cc",
}
