"""One module per platform; importing this package registers them all."""

from cutlayer.tee.verifiers import azure, nitro, nvidia, sev_snp, sgx, simulated, tdx, tpm

__all__ = ["azure", "nitro", "nvidia", "sev_snp", "sgx", "simulated", "tdx", "tpm"]
