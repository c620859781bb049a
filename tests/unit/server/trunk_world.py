"""A trunk host to call by hand, as the runner thread would; it does not listen.

Shapes: N = tokens of all rows of a call, D = hidden size.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cutlayer.model.adapters import AdapterSettings, AdapterState, layout_of
from cutlayer.model.checkpoint import load_part
from cutlayer.model.folder import resolve_model
from cutlayer.model.partition import Cut, Part, Trunk
from cutlayer.server.host import TrunkHost
from cutlayer.server.settings import LimitSettings
from cutlayer.storage.files import private_folder
from cutlayer.storage.vault import NoVault
from cutlayer.wire.messages import Backward, Forward, OpenRun, Step
from tests.tiny_models import tiny_model

SETTINGS = AdapterSettings(rank=3, alpha=6.0)


def tiny_trunk(tmp_path: Path, family: str = "llama", **changes: object) -> Trunk:
    """Blocks 1 to 3 of a tiny model."""
    folder = resolve_model(str(tiny_model(family, tmp_path, **changes)[0]), None)
    trunk = load_part(folder, Cut(1, 3), Part.TRUNK, "float32", "cpu")
    assert isinstance(trunk, Trunk)
    return trunk


def tiny_host(tmp_path: Path, trunk: Trunk | None = None, **limits: object) -> TrunkHost:
    """A host over `tiny_trunk` with a state folder of its own."""
    folder = private_folder(tmp_path / "state")
    settings = LimitSettings.model_validate(limits)
    return TrunkHost(trunk or tiny_trunk(tmp_path), settings, folder, NoVault())


def opening(
    run_id: str = "run", settings: AdapterSettings = SETTINGS, federation: str | None = None
) -> OpenRun:
    """What a client says when it opens a run."""
    return OpenRun(
        run_id=run_id,
        adapter=settings.model_dump(mode="json"),
        optimizer={"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0},
        clip_norm=None,
        wants_input_grad=True,
        seed=1,
        saved_steps=[0],
        federation=federation,
    )


def forward_call(
    lengths: Sequence[int], run_id: str = "run", step: int = 1, micro: int = 0
) -> Forward:
    """FORWARD of one micro-batch."""
    return Forward(run_id=run_id, step=step, micro=micro, lengths=list(lengths))


def backward_call(
    run_id: str = "run", step: int = 1, micro: int = 0, is_last: bool = True
) -> Backward:
    """BACKWARD of one micro-batch."""
    return Backward(run_id=run_id, step=step, micro=micro, is_last=is_last)


def finished(step: int, num_tokens: int, lr: float = 0.1) -> Step:
    """What a client says of a finished step."""
    return Step(step=step, client_sq_norm=0.0, num_tokens=num_tokens, lr=lr)


def random_ND(num_tokens: int, seed: int) -> Tensor:
    """Hidden states or gradients."""
    return torch.randn(num_tokens, 32, generator=torch.Generator().manual_seed(seed))


def random_state(trunk: Trunk, seed: int, settings: AdapterSettings = SETTINGS) -> AdapterState:
    """Adapter weights of which none is zero."""
    generator = torch.Generator().manual_seed(seed)
    shapes = layout_of(trunk, settings)
    return {k: torch.randn(*shape, generator=generator) * 0.2 for k, shape in shapes.items()}
