"""The header of every frame kind, as typed structs; the spec is docs/wire.md.

It does not pack bytes (`frame`) nor act on a message (`client`, `server`). No header has a place
for a token, a label, a mask, a position array, a text or a loss, save those for an attested enclave
(`enclave_messages`).

Units: lengths and positions in tokens, `_s` in seconds, squared norms of the summed loss.
"""

import msgspec

from cutlayer.wire import attest_messages as attest
from cutlayer.wire import enclave_messages as enclave
from cutlayer.wire import federation_messages as federation
from cutlayer.wire import recut_messages as recut
from cutlayer.wire import replica_messages as replica
from cutlayer.wire.header import Header, Step
from cutlayer.wire.kinds import Kind

__all__ = [
    "HEADERS",
    "Backward",
    "BackwardDone",
    "CloseSession",
    "Commit",
    "Committed",
    "Decode",
    "Decoded",
    "Failed",
    "Forward",
    "ForwardDone",
    "Header",
    "Hello",
    "Kind",
    "OpenRun",
    "OpenSession",
    "PullAdapter",
    "RunOpened",
    "SessionClosed",
    "SessionOpened",
    "Step",
    "TrunkAdapter",
    "Welcome",
]


class Hello(Header, frozen=True, kw_only=True):
    """Client to server, first frame of a connection: what the client believes."""

    nonce: str
    """32 random bytes in hex, which the evidence in `Welcome` binds where the server attests."""
    spec: dict[str, str | int]
    """Flat description that both sides compare: see `wire.spec.Spec`."""
    leaves: dict[str, str]
    """Model manifest leaves that the client recomputed: name -> SHA-256 hex."""


class Welcome(Header, frozen=True, kw_only=True):
    """Server to client: the specs agree."""

    boot_id: str
    """Changes whenever the server process starts; memory of an older one is gone."""
    spec: dict[str, str | int]
    leaves: dict[str, str]
    software: str
    """Name and version of the server's software, for the logs."""
    place: str = ""
    """host:port of the replica that is to serve this client's runs and sessions; empty means that
    this server does."""
    proof: bytes = b""
    """What the server runs: see `attest_messages.Proof`; empty where it does not attest."""
    challenge: str = ""
    """A nonce for the client's own evidence, hex; empty where the server wants none."""


class Failed(Header, frozen=True, kw_only=True):
    """The call failed; `code` is an error class of `cutlayer.errors`."""

    code: str
    message: str
    retry_after_s: float | None = None
    lost_rows: list[int] = msgspec.field(default_factory=list)
    """SESSION_LOST: rows of the call whose cache is gone; empty means all rows of the session."""


class OpenRun(Header, frozen=True, kw_only=True):
    """Open or reopen a training run; the run belongs to the certificate's name."""

    run_id: str
    adapter: dict[str, str | int | float | bool | list[str] | dict[str, str | int | float]]
    """Adapter settings of the trunk, as `AdapterSettings.model_dump()`."""
    optimizer: dict[str, float]
    """AdamW: beta1, beta2, eps, weight_decay."""
    clip_norm: float | None
    wants_input_grad: bool
    """False when the head has nothing to train: no gradient is computed or sent."""
    seed: int
    saved_steps: list[int]
    """Steps that the client can go back to."""
    federation: str | None = None
    """The federation whose round this run is part of; it then starts from the round's adapter,
    is kept in memory only, and `run_id` is `federation_messages.round_run_id`."""


class RunOpened(Header, frozen=True, kw_only=True):
    """Both sides stand at `step` now: the newest that both had saved (0 = untrained)."""

    step: int


class Forward(Header, frozen=True, kw_only=True):
    """Released head output of one micro-batch; tensors: `h`."""

    run_id: str
    step: int
    """The step being computed, from 1."""
    micro: int
    """Micro-batch of the step, from 0."""
    lengths: list[int]
    commit: Step | None = None
    """Finish the step before, then run this one."""
    is_evaluation: bool = False
    """No graph is kept and no BACKWARD will come."""


class ForwardDone(Header, frozen=True, kw_only=True):
    """Tensors: `y`."""

    step: int
    micro: int


class Backward(Header, frozen=True, kw_only=True):
    """Released gradient of the summed loss at the upper cut; tensors: `grad`."""

    run_id: str
    step: int
    micro: int
    is_last: bool
    """The last micro-batch of the step: the reply carries the trunk's squared norm."""


class BackwardDone(Header, frozen=True, kw_only=True):
    """Tensors: `grad`, gradient at the lower cut, if it was wanted."""

    step: int
    micro: int
    trunk_sq_norm: float | None = None


class Commit(Header, frozen=True, kw_only=True):
    """Finish a step without another forward, and save it if asked."""

    run_id: str
    commit: Step | None
    """None when the step was finished already and only the save is wanted."""
    save: bool
    step: int
    """The step that the client has finished and wants saved."""
    pin: bool = False
    """Keep this step beside the newest ones: the best so far on validation rows."""


class Committed(Header, frozen=True, kw_only=True):
    """The server's step now."""

    step: int


class PullAdapter(Header, frozen=True, kw_only=True):
    """Ask for the trunk's adapter of one's own run."""

    run_id: str
    step: int
    """A step that the server has saved."""


class TrunkAdapter(Header, frozen=True, kw_only=True):
    """Tensors: the adapter's state, standard PEFT names with global block indices."""

    step: int


class OpenSession(Header, frozen=True, kw_only=True):
    """Open a session for generation, with or without its first rows."""

    max_lengths: list[int]
    """Token limits of rows 0, 1, ... that are opened at once; none opens a session without rows."""
    run_id: str | None
    """Whose trunk adapter to use; None is the base model."""
    step: int | None = None
    """Which saved step of that run; None is its newest."""


class SessionOpened(Header, frozen=True, kw_only=True):
    """The session's name, unguessable."""

    session_id: str
    ttl_s: float


class Decode(Header, frozen=True, kw_only=True):
    """Released vectors of some rows of a session; tensors: `h`."""

    session_id: str
    rows: list[int]
    """Which rows of the session, ascending."""
    lengths: list[int]
    positions: list[int]
    """Tokens of each row that are cached; a smaller number than the cache holds truncates it."""
    max_lengths: list[int] = msgspec.field(default_factory=list)
    """Token limits, in the order of `rows`, of rows that this call opens if they are not open;
    0 opens none. Empty: all rows are open."""


class Decoded(Header, frozen=True, kw_only=True):
    """Tensors: `y`."""


class CloseSession(Header, frozen=True, kw_only=True):
    """Give the cache back; closing what is not open is no error."""

    session_id: str
    rows: list[int] = msgspec.field(default_factory=list)
    """Rows to close, ascending; none closes the session with all of them."""


class SessionClosed(Header, frozen=True, kw_only=True):
    """The session is closed."""

    bytes_freed: int


HEADERS: dict[Kind, type[Header]] = {
    Kind.HELLO: Hello,
    Kind.WELCOME: Welcome,
    Kind.FAILED: Failed,
    Kind.OPEN_RUN: OpenRun,
    Kind.RUN_OPENED: RunOpened,
    Kind.FORWARD: Forward,
    Kind.FORWARD_DONE: ForwardDone,
    Kind.BACKWARD: Backward,
    Kind.BACKWARD_DONE: BackwardDone,
    Kind.COMMIT: Commit,
    Kind.COMMITTED: Committed,
    Kind.PULL_ADAPTER: PullAdapter,
    Kind.TRUNK_ADAPTER: TrunkAdapter,
    Kind.OPEN_SESSION: OpenSession,
    Kind.SESSION_OPENED: SessionOpened,
    Kind.DECODE: Decode,
    Kind.DECODED: Decoded,
    Kind.CLOSE_SESSION: CloseSession,
    Kind.CLOSED: SessionClosed,
    Kind.JOIN: federation.Join,
    Kind.JOINED: federation.Joined,
    Kind.ENTER_ROUND: federation.EnterRound,
    Kind.ROUND: federation.Round,
    Kind.SHARE_KEYS: federation.ShareKeys,
    Kind.PEER_KEYS: federation.PeerKeys,
    Kind.SHARE_SECRETS: federation.ShareSecrets,
    Kind.PEER_SECRETS: federation.PeerSecrets,
    Kind.SEND_UPDATE: federation.SendUpdate,
    Kind.UPDATE_TAKEN: federation.UpdateTaken,
    Kind.UNMASK: federation.Unmask,
    Kind.UNMASKED: federation.Unmasked,
    Kind.LEAVE: federation.Leave,
    Kind.LEFT: federation.Left,
    Kind.PUBLISH: federation.Publish,
    Kind.PUBLISHED: federation.Published,
    Kind.WAIT: federation.Wait,
    Kind.ADOPT: federation.Adopt,
    Kind.ADOPTED: federation.Adopted,
    Kind.DESCRIBE: replica.Describe,
    Kind.TAKE_STATS: replica.TakeStats,
    Kind.STATS: replica.Stats,
    Kind.ADAPTER_LAYOUT: replica.AdapterLayout,
    Kind.LAYOUT: replica.Layout,
    Kind.BEGIN_ROUND: replica.BeginRound,
    Kind.ROUND_BEGUN: replica.RoundBegun,
    Kind.COLLECT: replica.Collect,
    Kind.COLLECTED: replica.Collected,
    Kind.END_ROUND: replica.EndRound,
    Kind.ROUND_ENDED: replica.RoundEnded,
    Kind.CHALLENGE: attest.Challenge,
    Kind.EVIDENCE: attest.Proof,
    Kind.KEY_REQUEST: attest.KeyRequest,
    Kind.KEY: attest.Key,
    Kind.RECUT: recut.Recut,
    Kind.RECUT_DONE: recut.RecutDone,
    **enclave.HEADERS,
}
