"""Settings of a federation on one machine: one file for the server, the owners and their rows.

They are those of server and client, said once. It does nothing.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from pydantic import Field, field_validator, model_validator

from cutlayer.client.settings import ModelSettings, TrainSettings
from cutlayer.data.domains import DOMAINS
from cutlayer.data.partition import PartitionSettings
from cutlayer.data.settings import DataSettings
from cutlayer.federation.settings import FederationSettings
from cutlayer.model.adapters import AdapterSettings
from cutlayer.privacy.mechanism import PrivacySettings
from cutlayer.settings import Settings

__all__ = [
    "DomainSettings",
    "LinkSettings",
    "OwnerFiles",
    "PlanSettings",
    "SimulationSettings",
]


_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,38}[a-z0-9])?")
"""What a certificate may be issued to, and a folder be called."""


class PlanSettings(Settings):
    """How the federation is simulated."""

    owners: int | None = Field(default=None, ge=1)
    """How many; needed where rows are shared out, else it follows from the rows."""
    partition: PartitionSettings = PartitionSettings()
    """How the rows of `data` are shared out."""
    processes: bool = False
    """False: server and owners are threads of this process; true: processes with mutual TLS."""
    alone: bool = True
    """Also let every owner train by itself, for as many steps."""
    max_heldout: int | None = Field(default=None, ge=1)
    """Held-out rows to score per owner; None scores all of them."""
    seed: int = Field(default=0, ge=0)
    """Of rows, adapter, order and cohorts."""


class DomainSettings(Settings):
    """Rows of the asset `sentiment`: four owners that come from four places."""

    names: list[str] = Field(default_factory=lambda: list(DOMAINS), min_length=1)
    """Owners, of movies, amazon, tweets and nyt."""
    train_rows: int = Field(default=12, ge=2)
    """Private rows of each owner."""
    heldout_rows: int = Field(default=200, ge=2)
    """Rows of each owner that nobody trains on."""


class OwnerFiles(Settings):
    """Files of one owner."""

    train: Path
    """Rows to train on."""
    heldout: Path | None = None
    """Rows to score; None keeps `data.validation_fraction` of the training rows."""


class LinkSettings(Settings):
    """What travels between owners and server."""

    codec: str = "bf16"
    """Codec of released tensors in both directions: raw, bf16, fp8, int8."""


class SimulationSettings(Settings):
    """A whole federation. Rows come from one of `domains`, `owner`, or `data.train` shared out."""

    simulation: PlanSettings = PlanSettings()
    """How it is simulated."""
    model: ModelSettings
    """Model and cut of both sides; the path may be `asset:NAME`."""
    privacy: PrivacySettings
    """Noise on what leaves an owner."""
    federation: FederationSettings
    """Rounds, strategy and secure aggregation; min_members and quorum default to all owners."""
    adapter: AdapterSettings | None = None
    """What is trained; another place for `federation.adapter`."""
    train: TrainSettings
    """How owners train; how long is said by federation.rounds and federation.local_steps."""
    connection: LinkSettings = LinkSettings()
    """What travels."""
    domains: DomainSettings | None = None
    """Rows of four natural owners, fetched; their templates come with them."""
    owner: dict[str, OwnerFiles] = Field(default_factory=dict)
    """Files of each owner, by name."""
    data: DataSettings | None = None
    """Templates and, without `owner`, the rows that are shared out."""

    @model_validator(mode="before")
    @classmethod
    def _fill_what_follows(cls, table: Mapping[str, object]) -> Mapping[str, object]:
        """The adapter's other place, and `data.train` where owners have files of their own."""
        filled = dict(table)
        federation = _section(filled, "federation")
        if "adapter" in filled:
            if "adapter" in federation:
                raise ValueError("set adapter or federation.adapter, not both")
            filled["federation"] = {**federation, "adapter": filled["adapter"]}
        data, owners = _section(filled, "data"), list(_section(filled, "owner").values())
        if data and owners and isinstance(owners[0], Mapping) and "train" in owners[0]:
            filled["data"] = {"train": owners[0]["train"], **data}
        return filled

    @field_validator("owner")
    @classmethod
    def _has_plain_names(cls, owner: dict[str, OwnerFiles]) -> dict[str, OwnerFiles]:
        for name in owner:
            if not _NAME.fullmatch(name):
                raise ValueError(
                    f"owner {name!r}: a name has up to 40 of a-z, 0-9, dot, underscore and hyphen, "
                    "and begins and ends with a letter or digit"
                )
        return owner

    @model_validator(mode="after")
    def _has_rounds_alone(self) -> Self:
        if self.train.steps is not None or self.train.epochs is not None:
            raise ValueError(
                "federation.rounds and federation.local_steps say how long owners train, together "
                "and alone; remove train.steps and train.epochs"
            )
        return self

    @model_validator(mode="after")
    def _has_one_source_of_rows(self) -> Self:
        if self.domains is not None:
            if self.data is not None or self.owner:
                raise ValueError("domains brings its own rows; remove data and owner, or domains")
        elif self.data is None:
            raise ValueError("say where rows come from: set domains or data")
        elif not self.owner and self.simulation.owners is None and not self._is_natural:
            raise ValueError("simulation.owners is required: how many share the rows of data.train")
        return self

    @property
    def _is_natural(self) -> bool:
        return self.simulation.partition.kind == "natural"


def _section(table: Mapping[str, object], name: str) -> dict[str, object]:
    """A section of the file as it stands; empty where it is something else, which fails later."""
    section = table.get(name)
    return dict(section) if isinstance(section, Mapping) else {}
