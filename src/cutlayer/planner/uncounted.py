"""What a client's settings ask for that a plan does not count, by name. It predicts nothing."""

from cutlayer.client.settings import ClientSettings, DraftKind
from cutlayer.privacy.mechanism import Withhold

__all__ = ["uncounted"]


def uncounted(client: ClientSettings) -> list[str]:
    """What a reader of a plan must add in mind.

    Args:
        client: what is planned for.
    """
    notes = []
    if client.hops:
        notes.append(
            f"the settings' {len(client.hops)} hops are planned as one trunk at the first one's "
            "link: each further hop adds its round trip and the same bytes to every call, and the "
            "server's memory is that of all hops together"
        )
    if client.checks.spot_check_every is not None:
        notes.append(
            "checks.spot_check_every keeps the trunk's weights at the client too: add the "
            "weights of the server to the client's memory, at every cut"
        )
    if client.generation.speculation.kind is DraftKind.MODEL:
        notes.append("the drafting model's memory and time are not counted")
    if client.federation is not None:
        notes.append("rounds of [federation] are not counted: neither their bytes nor their time")
    if client.privacy.withhold is Withhold.PRIVATE:
        notes.append(
            "vectors that privacy.withhold keeps here are counted as if they crossed: bytes and "
            "the server's seconds are too high, and such a run does not generate"
        )
    return notes
