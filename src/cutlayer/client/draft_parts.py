"""What drafters of this owner's streams use beside the text: the draft adapter, the small model.

It opens, learns from what passes by, and saves; it does not guess (`drafting`).

Shapes: N = vectors, D = hidden size.
"""

from collections.abc import Callable

from torch import Tensor

from cutlayer.client.draft_adapter import (
    Distiller,
    DraftAdapter,
    load_draft_adapter,
    save_draft_adapter,
)
from cutlayer.client.draft_protocol import NextTokenModel
from cutlayer.client.run_state import RunState
from cutlayer.client.settings import DraftKind, SpeculationSettings

__all__ = ["DraftParts"]


class DraftParts:
    """Empty unless the settings ask for a kind that needs some."""

    def __init__(
        self,
        settings: SpeculationSettings,
        state: RunState,
        hidden_size: int,
        model: Callable[[], NextTokenModel] | None = None,
    ) -> None:
        """
        Args:
            settings: which kind of drafter.
            state: the run's folder, which keeps the adapter.
            hidden_size: D.
            model: a new row of the small model, for the kind "model".

        Raises:
            StorageError: the saved adapter is damaged or of another model.
        """
        self.model = model
        self._state = state
        self._distiller: Distiller | None = None
        if settings.kind is DraftKind.SELF:
            saved = load_draft_adapter(state.folder, state.vault, hidden_size)
            self._distiller = Distiller(saved or DraftAdapter(hidden_size))

    @property
    def learns(self) -> bool:
        """Whether pairs are wanted."""
        return self._distiller is not None

    def observe(self, h_ND: Tensor, y_ND: Tensor) -> None:
        """Learn from what the trunk was given and gave back, both [N, D]."""
        if self._distiller is not None:
            self._distiller.observe(h_ND, y_ND)

    def skip(self, h_ND: Tensor) -> Tensor:
        """What stands for the trunk where nothing is sent, [N, D]."""
        return h_ND if self._distiller is None else self._distiller.adapter(h_ND)

    def save(self) -> None:
        """Keep what was learnt."""
        if self._distiller is not None and self._distiller.num_steps:
            save_draft_adapter(self._distiller.adapter, self._state.folder, self._state.vault)
