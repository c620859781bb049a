"""Puts a member of a federation together: joins, counts the steps, makes the gate.

It does not train (`member`) nor load models (`client`).
"""

import hashlib

import msgspec
from transformers import PreTrainedTokenizerBase

from cutlayer.client.federation_link import FederationLink
from cutlayer.client.handing_in import Credentials
from cutlayer.client.link import Connect, Link, OwnModel
from cutlayer.client.member import Learner, Member, steps_per_round
from cutlayer.client.membership import Membership, join, joined_states
from cutlayer.client.round_share import Adapters
from cutlayer.client.run_state import RunState
from cutlayer.client.schedule import batch_plan
from cutlayer.client.settings import ClientSettings
from cutlayer.client.train import TrainingData
from cutlayer.data.load import Dataset
from cutlayer.errors import ConfigError, SpecMismatch
from cutlayer.federation.cuts import read_cut
from cutlayer.federation.secure.hidden import GroupKey
from cutlayer.identity.signing import CertificateVerifier, KitSigner
from cutlayer.model.adapters import AdapterSettings
from cutlayer.model.agreement import hash_leaves
from cutlayer.privacy.update_gate import UpdateGate
from cutlayer.wire.federation_messages import Leave

__all__ = ["fingerprint", "leave", "make_member", "open_calls", "vocabulary_digest"]


def open_calls(connect: Connect, own: OwnModel) -> FederationLink:
    """A link of its own to the coordinator: its calls may wait long."""
    return FederationLink(Link(connect, own, follows=False))


def fingerprint(
    settings: ClientSettings, own: OwnModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, str]:
    """What all members must have in common; the coordinator names the entries that differ."""
    spec = own.spec
    return {
        "model": f"{spec.model_type}, {spec.n_block} blocks, hidden size {spec.hidden_size}",
        "weights": hash_leaves(own.manifest.leaves),
        "cut": f"{spec.lower}:{spec.upper}",
        "dtype": spec.dtype,
        "tokenizer": vocabulary_digest(tokenizer),
        **{f"adapter.{key}": value for key, value in _adapter_entries(settings.adapter).items()},
    }


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256, hex, of every token and its id."""
    entries = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(msgspec.json.encode(entries)).hexdigest()


def make_member(
    settings: ClientSettings,
    calls: FederationLink,
    state: RunState,
    about: dict[str, str],
    rows: Dataset,
    learner: Learner,
) -> Member:
    """Join, and get ready for the first round.

    Args:
        settings: of this owner; `federation` and `train` are there.
        calls: to the coordinator.
        state: the run's folder.
        about: see `fingerprint`.
        rows: the owner's rows.
        learner: what trains.

    Raises:
        ConfigError: settings and rules do not fit together.
        StorageError: the coordinator was restored from an older backup.
    """
    mine, train = settings.federation, settings.train
    assert mine is not None
    assert train is not None
    states = joined_states(learner.parts.adapter_states())
    adapters = Adapters(
        layout={key: list(x.shape) for key, x in sorted(states.items())},
        cut=read_cut("this owner", about["cut"]),
    )
    joined = join(calls, mine.name, about, adapters)
    key = None if mine.group_key_file is None else GroupKey.read(mine.group_key_file)
    membership = Membership(mine, joined, state, key, adapters)
    _check_adapter(settings.adapter, membership.policy.round_adapter())
    num_steps = membership.policy.rounds * steps_per_round(membership.policy)
    data = TrainingData(
        train=rows.train,
        validation=rows.validation,
        plan=batch_plan(rows, train.model_copy(update={"steps": num_steps})),
    )
    gate = UpdateGate(state.privacy.ledger, mine.share_plain_updates, mine.publish_losses)
    credentials = _credentials(settings, membership.name, key)
    return Member(calls, membership, learner, data, gate, credentials, state)


def leave(settings: ClientSettings, calls: FederationLink) -> None:
    """Leave the federation; the link is closed.

    Raises:
        ConfigError: the settings name none.
    """
    try:
        if settings.federation is None:
            raise ConfigError("the settings have no [federation] section; there is none to leave")
        calls.leave(Leave(federation=settings.federation.name))
    finally:
        calls.close()


def _credentials(settings: ClientSettings, name: str, key: GroupKey | None) -> Credentials:
    tls, mine = settings.connection.tls, settings.federation
    assert mine is not None
    return Credentials(
        name=name,
        signer=None if tls is None else KitSigner(tls.certificate, tls.key),
        verifier=None if tls is None else CertificateVerifier(tls.authority, mine.revoked),
        group_key=key,
    )


def _check_adapter(mine: AdapterSettings, wanted: AdapterSettings) -> None:
    """Refuse before the first round what the trunk would refuse in it."""
    own, theirs = _adapter_entries(mine), _adapter_entries(wanted)
    wrong = [
        f"adapter.{key}={theirs[key]} (here {own[key]})" for key in own if own[key] != theirs[key]
    ]
    if wrong:
        raise SpecMismatch(f"the federation trains with {', '.join(wrong)}; set the same")


def _adapter_entries(adapter: AdapterSettings) -> dict[str, str]:
    return {key: str(value) for key, value in adapter.model_dump(mode="json").items()}
