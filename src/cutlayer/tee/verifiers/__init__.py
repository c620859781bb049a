"""One module per platform; importing this package registers them all."""

from cutlayer.tee.verifiers import sev_snp, tpm

__all__ = ["sev_snp", "tpm"]
