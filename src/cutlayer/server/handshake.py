"""The server's side of a handshake: whether a client's model, cut and format are the server's.

It does not keep who was greeted nor audit it (`connection`, `front_connection`).
"""

from dataclasses import dataclass, replace

from cutlayer.errors import SpecMismatch
from cutlayer.federation.cuts import Greeting
from cutlayer.model.agreement import agree
from cutlayer.model.cut import Cut
from cutlayer.model.manifest import Manifest
from cutlayer.wire.codec import get_codec
from cutlayer.wire.messages import Hello, Welcome
from cutlayer.wire.spec import Spec, compare

__all__ = ["Agreement", "ServedModel", "agree_on"]


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """What the server believes and tells in the handshake."""

    spec: Spec
    manifest: Manifest
    """What the server recomputed of its own blocks, and what its manifest file says."""
    digest: str | None
    """Pinned model digest."""
    boot_id: str
    software: str
    has_one_cut: bool = False
    """Whether clients must cut just where the trunk begins and ends, not within it."""
    weight_bytes: int | None = None
    """Memory of the blocks' weights in this process; None where others have them."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What a client and the server have in common."""

    theirs: Spec
    """As the client sent it."""
    cut: Cut
    """Where the client's rows enter and leave the trunk."""
    root: str
    """Digest over all leaves that both sides know together."""
    welcome: Welcome
    """The answer; the client's runs are to be here."""

    def greeting(self, model: ServedModel) -> Greeting:
        """What a federation's coordinator has to know of it."""
        served = Cut(model.spec.lower, model.spec.upper)
        return Greeting(cut=self.cut, served=served, root=self.root)


def agree_on(model: ServedModel, hello: Hello) -> Agreement:
    """Compare a client with what is served.

    Args:
        model: what is served.
        hello: what the client believes, and its codecs.

    Raises:
        SpecMismatch: says what differs.
        ConfigError: a codec is not known.
    """
    theirs = Spec.from_table(hello.spec)
    for codec in (theirs.codec_up, theirs.codec_down):
        get_codec(codec)
    own = replace(model.spec, codec_up=theirs.codec_up, codec_down=theirs.codec_down)
    if _is_served(own, theirs):
        if model.has_one_cut:
            _check_one_cut(own, theirs)
        own = replace(own, lower=theirs.lower, upper=theirs.upper)
    compare(own, theirs)
    whole = agree(model.manifest, hello.leaves, model.digest)
    welcome = Welcome(
        boot_id=model.boot_id,
        spec=own.to_table(),
        leaves=dict(model.manifest.leaves),
        software=model.software,
    )
    cut = Cut(own.lower, own.upper)
    return Agreement(theirs=theirs, cut=cut, root=whole.root(), welcome=welcome)


def _check_one_cut(own: Spec, theirs: Spec) -> None:
    if (own.lower, own.upper) != (theirs.lower, theirs.upper):
        raise SpecMismatch(
            f"this server runs blocks {own.lower} to {own.upper} as one, not those from "
            f"{theirs.lower} to {theirs.upper} alone; set model.lower={own.lower} and "
            f"model.upper={own.upper}"
        )


def _is_served(own: Spec, theirs: Spec) -> bool:
    """Whether this trunk has all blocks between the client's two cuts."""
    return own.lower <= theirs.lower < theirs.upper <= own.upper
