"""Whether two sides would work together: the port, and the handshake that all work begins with.

It sends no tensor and opens no run.
"""

import socket

from cutlayer.client.attested import attestation_of
from cutlayer.client.link import Link
from cutlayer.client.own_model import opener, own_model
from cutlayer.client.settings import ClientSettings
from cutlayer.errors import ConfigError, ModelError
from cutlayer.model.folder import HubFolder, ModelFolder
from cutlayer.server.tee_settings import ServerTeeSettings
from cutlayer.tee.challenge import Prover
from cutlayer.tee.exhibit import Side
from cutlayer.tee.policy import read_policy
from cutlayer.wire.endpoints import ListenSettings, check_security

__all__ = ["check_evidence", "check_listening", "check_reachable"]

_PATIENCE_S = 5.0
_REPORT_BYTES = 32


def check_reachable(settings: ClientSettings, folder: ModelFolder) -> str:
    """Connect, prove both identities, compare specs and model hashes; what the server is.

    Raises:
        CutlayerError: whatever would stop training at its first call.
    """
    connection = settings.connection.model_copy(update={"connect_timeout_s": _PATIENCE_S})
    own = own_model(settings, folder, {})
    attestation = attestation_of(settings)
    patient = settings.model_copy(update={"connection": connection})
    link = Link(opener(patient, attestation), own, reconnect_s=0.0)
    try:
        welcome = link.hello()
    except ModelError:
        if not isinstance(folder, HubFolder):
            raise
        # Nothing of it was downloaded, so there is no hash of the own parts to add to theirs.
        return f"{connection.address} answers; model hashes are compared when parts are loaded"
    finally:
        link.close()
    proved = "" if attestation is None else f"; {attestation.line}"
    return (
        f"{connection.address} answers ({welcome.software}); model, cut and formats match{proved}"
    )


def check_evidence(settings: ServerTeeSettings) -> str:
    """Whether this machine can attest, and the policy for clients can be read.

    Raises:
        ConfigError: it cannot; says what is missing.
    """
    evidence = Prover(settings.attester, Side.SERVER).attest(bytes(_REPORT_BYTES))
    if settings.client_policy is None:
        return f"{evidence.platform} evidence; clients are asked for none"
    policy = read_policy(settings.client_policy)
    policy.read_roots()
    return f"{evidence.platform} evidence; clients must satisfy policy {policy.name}"


def check_listening(settings: ListenSettings) -> str:
    """Whether a server could listen there now.

    Raises:
        ConfigError: insecure settings, or the address is taken or not this machine's.
    """
    check_security(settings)
    host, _, port = settings.address.rpartition(":")
    host = host.strip("[]")
    try:
        family = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, int(port)))
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {settings.address}: {error.strerror}; is a server running there "
            "already, or is the address another machine's?"
        ) from error
    return f"{settings.address} is free"
