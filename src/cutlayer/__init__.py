"""Split fine-tuning and inference of Hugging Face causal language models across organisations."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cutlayer.client.client import Client
    from cutlayer.client.settings import ClientSettings, SamplingSettings
    from cutlayer.errors import CutlayerError
    from cutlayer.model.checkpoint import load_parts
    from cutlayer.model.partition import Cut
    from cutlayer.model.rows import Rows, pack
    from cutlayer.server.server import TrunkServer
    from cutlayer.server.settings import ServerSettings
    from cutlayer.settings import load_settings

__all__ = [
    "Client",
    "ClientSettings",
    "Cut",
    "CutlayerError",
    "Rows",
    "SamplingSettings",
    "ServerSettings",
    "TrunkServer",
    "load_parts",
    "load_settings",
    "pack",
]

# Loaded at first use: the program must set OpenMP's waiting before torch is imported, and
# `cutlayer --help` needs no torch.
_HOMES = {
    "Client": "client.client",
    "ClientSettings": "client.settings",
    "Cut": "model.partition",
    "CutlayerError": "errors",
    "Rows": "model.rows",
    "SamplingSettings": "client.settings",
    "ServerSettings": "server.settings",
    "TrunkServer": "server.server",
    "load_parts": "model.checkpoint",
    "load_settings": "settings",
    "pack": "model.rows",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
