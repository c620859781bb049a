"""Secure aggregation of real adapter updates against their plain weighted mean.

All steps of the protocol with every member present, in memory. It measures no time.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from cutlayer.federation.secure.attempt import Attempt
from cutlayer.federation.secure.member import SecureMember
from cutlayer.federation.secure.ring import dequantise
from cutlayer.federation.secure.server import SecureRound
from cutlayer.federation.settings import SecureSettings
from cutlayer.model.adapters import AdapterState

__all__ = ["compare_sums"]


def compare_sums(updates: Mapping[str, AdapterState]) -> float:
    """Largest absolute difference of the two means; weights are 1, 2, 3 and so on."""
    vectors = {
        name: torch.cat([state[key].reshape(-1) for key in sorted(state)])
        for name, state in updates.items()
    }
    weights = {name: 1 + place for place, name in enumerate(vectors)}
    total = sum(weights.values())
    plain_N = sum(vectors[name].double() * (weights[name] / total) for name in vectors)
    secure_N = _secure_mean(vectors, weights)
    return float((secure_N - plain_N).abs().max())


def _secure_mean(vectors: Mapping[str, Tensor], weights: Mapping[str, int]) -> Tensor:
    count = len(next(iter(vectors.values())))
    policy = SecureSettings()
    attempt = Attempt(
        federation="parity", round=1, attempt=1, cohort=sorted(vectors), policy=policy
    )
    server = SecureRound(attempt, count)
    members = {name: SecureMember(name, attempt, count) for name in vectors}
    for name, member in members.items():
        server.add_keys(name, member.share_keys())
    server.close_keys()
    for name, member in members.items():
        server.add_secrets(name, member.share_secrets(server.peer_keys(name)))
    server.close_secrets()
    for name, member in members.items():
        member.take_secrets(server.peer_secrets(name))
        server.add_masked(name, member.mask(vectors[name], weights[name]))
    server.close_updates()
    for name, member in members.items():
        server.add_unmask(name, member.unmask(server.taken(name)))
    mean_N, _ = dequantise(server.total(), policy, len(members))
    return mean_N
