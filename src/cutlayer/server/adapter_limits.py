"""What adapter one client may train on the trunk. It does not put any on it (`run_table`)."""

from cutlayer.errors import ConfigError
from cutlayer.model.adapters import AdapterSettings
from cutlayer.server.settings import LimitSettings

__all__ = ["check_adapter"]

# Each is compared with the name of every layer, while other clients wait.
_MAX_TARGETS = 1024


def check_adapter(settings: AdapterSettings, limits: LimitSettings) -> None:
    """Refuse adapters that cost more than the operator allows.

    Raises:
        ConfigError: names the setting, and this server's limit.
    """
    if others := sorted(set(settings.kinds) - set(limits.adapter_kinds)):
        raise ConfigError(
            f"adapter.kinds has {', '.join(others)}; this server takes "
            f"{', '.join(limits.adapter_kinds)} (limits.adapter_kinds)"
        )
    for name, value, limit in _sizes(settings, limits):
        if value > limit:
            raise ConfigError(
                f"{name}={value:g} exceeds {limit:g}, this server's limit; choose a lower one"
            )
    if len(settings.targets) > _MAX_TARGETS:
        raise ConfigError(
            f"adapter.targets has {len(settings.targets)} names, this server takes "
            f"{_MAX_TARGETS}; name layers by their last part"
        )


def _sizes(settings: AdapterSettings, limits: LimitSettings) -> list[tuple[str, float, float]]:
    sparse, prefix = settings.sparse, settings.prefix
    sizes: dict[str, list[tuple[str, float, float]]] = {
        "lora": [("adapter.rank", settings.rank, limits.max_adapter_rank)],
        "prefix": [
            (
                "adapter.prefix.num_virtual_tokens",
                prefix.num_virtual_tokens,
                limits.max_virtual_tokens,
            )
        ],
        "sparse": [
            ("adapter.sparse.qkv_ratio", sparse.qkv_ratio, limits.max_sparse_ratio),
            ("adapter.sparse.dense_ratio", sparse.dense_ratio, limits.max_sparse_ratio),
        ],
    }
    return [size for kind in settings.kinds for size in sizes[kind]]
