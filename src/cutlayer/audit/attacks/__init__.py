"""One file an attack; importing this package registers them all (`cutlayer.audit.registry`)."""

from cutlayer.audit.attacks import (
    adapter_inversion,
    bisr_b,
    bisr_bf,
    canary_extraction,
    kv_reuse,
    label_inference,
    language_prior,
    learned_inverter,
    nearest_embedding,
    noise_aware_inverter,
    published_decoder,
    repeat_averaging,
    smashed_data_matching,
    tag,
    vocabulary_matching,
)

__all__ = [
    "adapter_inversion",
    "bisr_b",
    "bisr_bf",
    "canary_extraction",
    "kv_reuse",
    "label_inference",
    "language_prior",
    "learned_inverter",
    "nearest_embedding",
    "noise_aware_inverter",
    "published_decoder",
    "repeat_averaging",
    "smashed_data_matching",
    "tag",
    "vocabulary_matching",
]
