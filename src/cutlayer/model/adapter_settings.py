"""What is trained: the settings of an adapter and of each of its kinds.

It makes no weights (`adapters`).
"""

from typing import Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from cutlayer.model.partition import Part
from cutlayer.settings import Settings

__all__ = ["AdapterSettings", "PrefixSettings", "SparseSettings"]


class PrefixSettings(Settings):
    """Trainable keys and values before every row: P-tuning v2 (Liu et al., arXiv 2110.07602)."""

    num_virtual_tokens: int = Field(default=16, ge=1)
    """Key and value vectors per block; they take as many positions of the model's context."""


class SparseSettings(Settings):
    """Some of the model's own weights, whole heads and rows: SPF (Huang et al., 2401.09796)."""

    qkv_ratio: float = Field(default=0.25, ge=0, le=1)
    """Share of each block's key-value heads, with their query heads, that learns; 0 is none."""
    dense_ratio: float = Field(default=0.25, ge=0, le=1)
    """Share of the rows of every other linear layer that learns; 0 is none."""
    choose: Literal["largest", "smallest"] = "largest"
    """Which heads and rows: those with the largest or the smallest L1 norm of public weights."""

    @model_validator(mode="after")
    def _trains_something(self) -> Self:
        if self.qkv_ratio == 0 and self.dense_ratio == 0:
            raise ValueError("qkv_ratio and dense_ratio are both 0, so nothing would learn")
        return self


class AdapterSettings(Settings):
    """What is trained."""

    kinds: list[Literal["lora", "prefix", "sparse"]] = Field(default=["lora"], min_length=1)
    """Any of "lora" (Hu et al., arXiv 2106.09685), "prefix" and "sparse", each once."""
    rank: int = Field(default=8, ge=1)
    """LoRA: inner dimension of the two factors."""
    alpha: float = Field(default=16.0, gt=0)
    """LoRA: the update is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """LoRA: share of the adapter's inputs that is dropped in training."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """LoRA and sparse: all linear layers of the blocks, or those whose name ends with one of
    these."""
    parts: list[Part] = Field(default=[Part.HEAD, Part.TRUNK, Part.TAIL])
    """Which parts are trained; the others stay frozen."""
    train_a: bool = True
    """LoRA: whether factor A learns too; with A frozen the mean of factors B is the mean of
    updates."""
    seed: int = 0
    """Seed of the initial weights, which do not depend on the cut."""
    prefix: PrefixSettings = PrefixSettings()
    """Used where `kinds` has "prefix"."""
    sparse: SparseSettings = SparseSettings()
    """Used where `kinds` has "sparse"."""

    @property
    def num_positions(self) -> int:
        """Positions of the model's context that the adapter takes from every row."""
        return self.prefix.num_virtual_tokens if "prefix" in self.kinds else 0

    @model_validator(mode="before")
    @classmethod
    def _accept_one_kind(cls, table: object) -> object:
        """Settings and saved runs of earlier releases say `kind = "lora"`."""
        if not isinstance(table, dict) or "kind" not in table:
            return table
        if "kinds" in table:
            raise ValueError("set kinds alone; kind is its name in earlier releases")
        rest = {key: value for key, value in table.items() if key != "kind"}
        return {**rest, "kinds": [table["kind"]]}

    @model_validator(mode="after")
    def _is_canonical(self) -> Self:
        if len(set(self.kinds)) != len(self.kinds):
            raise ValueError(f"kinds {list(self.kinds)} has one twice; an adapter has each once")
        # Two sides that mean the same must compare as equal, whatever they leave unused.
        unused: dict[str, Settings] = {"prefix": PrefixSettings(), "sparse": SparseSettings()}
        plain = {name: value for name, value in unused.items() if name not in self.kinds}
        vars(self).update(plain, kinds=sorted(self.kinds))
        return self

    @model_serializer(mode="wrap")
    def _as_earlier_releases(self, dump: SerializerFunctionWrapHandler) -> dict[str, object]:
        """LoRA alone is written as ever: digests, saved steps and older servers know no more."""
        table: dict[str, object] = dump(self)
        for name in ("prefix", "sparse"):
            if name not in self.kinds:
                table.pop(name, None)
        if self.kinds == ["lora"] and table.pop("kinds", None) is not None:
            table = {"kind": "lora", **table}
        return table
