"""Warnings about certificates that end soon, given when a command starts. It renews nothing."""

from cutlayer.cli.output import Output
from cutlayer.identity.certificates import expiry_warning, load_certificates
from cutlayer.wire.endpoints import ConnectionSettings, ListenSettings

__all__ = ["warn_of_expiry"]


def warn_of_expiry(endpoint: ConnectionSettings | ListenSettings, out: Output) -> None:
    """Print a warning for each own certificate with less than 30 days left.

    Raises:
        StorageError: a certificate file is missing or is none.
    """
    if endpoint.tls is None:
        return
    files = {"the certificate": endpoint.tls.certificate, "the authority": endpoint.tls.authority}
    for what, path in files.items():
        warning = expiry_warning(load_certificates(path)[0], f"{what} {path}")
        if warning is not None:
            out.warn(warning)
