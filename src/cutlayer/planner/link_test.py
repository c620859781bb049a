"""The link to a running server, measured by calls that cost it nothing. It opens no run or session.

What is sent is random: no row, and nothing of a model.
"""

import statistics
import time
from contextlib import suppress

import torch

from cutlayer.client.attested import attestation_of
from cutlayer.client.hops import hop_views
from cutlayer.client.link import Link
from cutlayer.client.own_model import opener, own_model
from cutlayer.client.settings import ClientSettings
from cutlayer.errors import SessionLost, TransportError
from cutlayer.model.folder import ModelFolder
from cutlayer.planner.measurements import LinkSpeed
from cutlayer.wire.codec import encode
from cutlayer.wire.frame import Frame, frame_bytes
from cutlayer.wire.messages import CloseSession, Decode, Kind

__all__ = ["measure_link"]

_PATIENCE_S, _DEADLINE_S = 5.0, 60.0
_SMALL_CALLS, _LARGE_CALLS = 9, 3
_NOBODY = "plan"
"""A session that no server has: it answers without computing."""
_FIRST_BYTES, _MOST_BYTES = 1 << 18, 1 << 22
_LEAST_S = 0.02
"""A transfer that is shorter beside the round trip says little of the rate."""


def measure_link(settings: ClientSettings, folder: ModelFolder) -> LinkSpeed:
    """Round trip and rate to a client's server; the way down is taken as the way up.

    Args:
        settings: of the client; their cut has to be one that the server serves.
        folder: the model's.

    Raises:
        CutlayerError: whatever would stop training at its first call.
    """
    # A first hop may hold its own blocks alone.
    settings = hop_views(settings)[0]
    connection = settings.connection.model_copy(update={"connect_timeout_s": _PATIENCE_S})
    patient = settings.model_copy(update={"connection": connection})
    own = own_model(settings, folder, {})
    link = Link(opener(patient, attestation_of(settings)), own, reconnect_s=0.0)
    try:
        link.hello()
        rtt_s = statistics.median(_timed(link, _small()) for _ in range(_SMALL_CALLS))
        width = own.spec.hidden_size
        return LinkSpeed(rtt_s=rtt_s, mbit_per_s=_rate(link, width, rtt_s))
    except TransportError as error:
        raise TransportError(
            f"the link cannot be measured: {error}; start the server, or give --rtt-ms and "
            "--mbit-per-s to plan without it"
        ) from error
    finally:
        link.close()


def _rate(link: Link, width: int, rtt_s: float) -> float | None:
    size = _FIRST_BYTES
    while True:
        frame = _large(size, width)
        seconds = [_timed(link, frame) for _ in range(_LARGE_CALLS)]
        # The first fills buffers and, over a distance, opens the congestion window.
        extra_s = statistics.median(seconds[1:]) - rtt_s
        if extra_s > _LEAST_S or size >= _MOST_BYTES:
            return None if extra_s <= 0 else 8 * frame_bytes(frame) / extra_s / 1e6
        size *= 4


def _small() -> Frame:
    return Frame(kind=Kind.CLOSE_SESSION, header=CloseSession(session_id=_NOBODY))


def _large(num_bytes: int, width: int) -> Frame:
    count = max(1, num_bytes // (4 * width))
    header = Decode(session_id=_NOBODY, rows=[0], lengths=[count], positions=[0])
    h_ND = torch.rand(count, width)
    return Frame(kind=Kind.DECODE, header=header, tensors={"h": encode(h_ND, "raw")})


def _timed(link: Link, frame: Frame) -> float:
    """Seconds until the server has said that it knows no such session."""
    began_s = time.perf_counter()
    with suppress(SessionLost):
        link.call_once(frame, _DEADLINE_S).result()
    return time.perf_counter() - began_s
