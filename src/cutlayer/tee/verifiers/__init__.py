"""One module per platform; importing this package registers them all."""

from cutlayer.tee.verifiers import nitro, sev_snp, sgx, simulated, tdx

__all__ = ["nitro", "sev_snp", "sgx", "simulated", "tdx"]
