"""What drafters of this owner's streams use beside the text: the draft adapter, the small model.

It opens, learns from what passes by, and saves; it does not guess (`drafting`).

Shapes: N = vectors, D = hidden size.
"""

from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from cutlayer.client.draft_adapter import (
    Distiller,
    DraftAdapter,
    load_draft_adapter,
    save_draft_adapter,
)
from cutlayer.client.draft_model_file import SmallModel, load_small_model
from cutlayer.client.draft_protocol import NextTokenModel
from cutlayer.client.run_state import RunState
from cutlayer.client.settings import DraftKind, SpeculationSettings
from cutlayer.errors import ConfigError

__all__ = ["DraftParts"]


class DraftParts:
    """Empty unless the settings ask for a kind that needs some."""

    def __init__(
        self,
        settings: SpeculationSettings,
        state: RunState,
        config: PreTrainedConfig,
        tokenizer: Callable[[], PreTrainedTokenizerBase],
    ) -> None:
        """
        Args:
            settings: which kind of drafter.
            state: the run's folder, which keeps the adapter.
            config: of the model that verifies.
            tokenizer: of the same model, asked only where the kind is "model".

        Raises:
            ConfigError: the small model is of another vocabulary, or cannot be loaded.
            StorageError: the saved adapter is damaged or of another model.
        """
        self.model: Callable[[], NextTokenModel] | None = None
        """A new row of the small model."""
        self._state = state
        self._distiller: Distiller | None = None
        if settings.kind is DraftKind.SELF:
            saved = load_draft_adapter(state.folder, state.vault, config.hidden_size)
            self._distiller = Distiller(saved or DraftAdapter(config.hidden_size))
        elif settings.kind is DraftKind.MODEL:
            self.model = _small_model(settings, config, tokenizer()).new_row

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


def _small_model(
    settings: SpeculationSettings, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> SmallModel:
    if settings.model is None:
        raise ConfigError(
            'generation.speculation.kind = "model" needs a small model: name its folder, GGUF '
            "file or hub id in generation.speculation.model"
        )
    return load_small_model(settings.model, tokenizer, config.vocab_size)
