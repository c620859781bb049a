"""One module per source of evidence; importing this package registers them all."""

from cutlayer.tee.attesters import nitro, simulated

__all__ = ["nitro", "simulated"]
