"""One module per source of evidence; importing this package registers them all."""

from cutlayer.tee.attesters import azure, configfs_tsm, dstack, gramine, nitro, simulated, tpm

__all__ = ["azure", "configfs_tsm", "dstack", "gramine", "nitro", "simulated", "tpm"]
