"""Split fine-tuning and inference of Hugging Face causal language models across organisations."""

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
