"""What a channel over another channel answers as that one does. Calls are each wrapper's own."""

from cutlayer.wire.channel import Channel

__all__ = ["WrappedChannel"]


class WrappedChannel:
    """All of `wire.channel.Channel` but `call`."""

    def __init__(self, inner: Channel) -> None:
        """
        Args:
            inner: sends and receives.
        """
        self._inner = inner

    @property
    def bytes_sent(self) -> int:
        """Bytes of all frames that the inner channel sent."""
        return self._inner.bytes_sent

    @property
    def bytes_received(self) -> int:
        """Bytes of all frames that the inner channel received."""
        return self._inner.bytes_received

    def close(self) -> None:
        """Close the inner channel."""
        self._inner.close()
