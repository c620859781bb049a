"""One module per platform; importing this package registers them all."""

from cutlayer.tee.verifiers import sev_snp

__all__ = ["sev_snp"]
