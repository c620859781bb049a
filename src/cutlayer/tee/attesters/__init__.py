"""One module per source of evidence; importing this package registers them all."""

from cutlayer.tee.attesters import configfs_tsm, dstack, gramine, nitro, simulated, tpm

__all__ = ["configfs_tsm", "dstack", "gramine", "nitro", "simulated", "tpm"]
