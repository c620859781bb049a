"""Put a part's frozen linear layers on an accelerator, masked; all else stays where it is.

It does not multiply or mask (`linear`). Inside stay the embedding, norms, attention with its
softmax and caches, activations, adapters with their gradients, and biases. Adapters may be on the
part already or come later; those that need the weights (sparse) find none and say so.
"""

from dataclasses import dataclass

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cutlayer.errors import ModelError
from cutlayer.model.partition import PartModule
from cutlayer.model.sharded_linear import Shard
from cutlayer.tee.masked.linear import MaskedLinear, MaskedPlace
from cutlayer.tee.masked.quantise import quantise_weight
from cutlayer.tee.masked.settings import MaskedSettings

__all__ = ["MaskedLayers", "mask_part"]

_LINEAR = (nn.Linear, Conv1D)
_ADAPTER = frozenset({"lora_A", "lora_B"})


@dataclass(frozen=True, kw_only=True)
class MaskedLayers:
    """What was put elsewhere."""

    names: tuple[str, ...]
    """Of the layers in the unsplit model."""
    num_weights: int
    """That are no longer in this process."""


def mask_part(part: PartModule, place: MaskedPlace, settings: MaskedSettings) -> MaskedLayers:
    """Replace every frozen linear layer of a part, the LM head and what is under LoRA included.

    Args:
        part: Head, Trunk or Tail on the CPU.
        place: who multiplies.
        settings: how many bits the weights keep.

    Raises:
        ModelError: the part is on another device, shared out among processes, or has experts,
            whose choice of tokens would be seen.
        ConfigError, TransportError, ProtocolError: the workers are not as they must be.
    """
    _check(part)
    names, num_weights = [], 0
    for path in [name for name, module in part.named_modules() if _is_frozen(name, module)]:
        layer = part.get_submodule(path)
        name = f"{part.part}.{part.global_name(path).replace('.base_layer', '')}"
        masked = _masked(layer, name, place, settings)
        num_weights += masked.weight.numel()
        names.append(name)
        part.set_submodule(path, masked)
    return MaskedLayers(names=tuple(names), num_weights=num_weights)


def _masked(
    layer: nn.Module, name: str, place: MaskedPlace, settings: MaskedSettings
) -> MaskedLinear:
    weight, bias_O = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    if not weight.is_floating_point():
        raise ModelError(f"{name} is quantised ({weight.dtype}); mask a part with full weights")
    assert bias_O is None or isinstance(bias_O, Tensor)
    weight_OI = weight.mT if isinstance(layer, Conv1D) else weight
    if "forward" in vars(layer):
        raise ModelError(f"{name} has an adapter that needs its weights; mask the part before it")
    integers = quantise_weight(weight_OI, settings.weight_bits)
    return MaskedLinear(name, integers, place, bias_O).train(layer.training)


def _is_frozen(path: str, module: nn.Module) -> bool:
    if not isinstance(module, _LINEAR) or isinstance(module, MaskedLinear):
        return False
    # LoRA's own layer holds the base layer, which is found by itself.
    return not isinstance(module, LoraLayer) and not _ADAPTER & set(path.split("."))


def _check(part: PartModule) -> None:
    if any(isinstance(module, Shard) for module in part.modules()):
        raise ModelError("a trunk that torchrun shares out cannot be masked; remove one of them")
    kind = part.config.model_type
    for name, parameter in part.named_parameters():
        if parameter.device.type not in ("cpu", "meta"):
            raise ModelError(
                f"masked layers work inside, on the CPU; {name} is on {parameter.device}: set "
                'model.device = "cpu"'
            )
        if parameter.ndim > 2 or "experts" in name.split("."):
            raise ModelError(
                f"{kind} chooses among experts ({name}): an accelerator would see which tokens "
                "go together; masked parts are for models without experts"
            )
