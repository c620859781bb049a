"""Settings of a hierarchical server: how many replicas, on which engine, with what.

It starts nothing (`launchers`, `front`).
"""

from enum import StrEnum

from pydantic import Field

from cutlayer.settings import Settings

__all__ = ["ReplicaEngine", "ReplicaSettings"]


class ReplicaEngine(StrEnum):
    """What replicas run on."""

    PROCESS = "process"
    """Processes of this machine."""
    RAY = "ray"
    """Ray actors, on every host that Ray has; needs `pip install cutlayer[ray]`."""


class ReplicaSettings(Settings):
    """Copies of the trunk behind one address."""

    count: int = Field(default=0, ge=0, le=256)
    """How many; 0 is an ordinary server, which computes by itself."""
    engine: ReplicaEngine = ReplicaEngine.PROCESS
    """What they run on: process or ray."""
    threads: int | None = Field(default=None, ge=1)
    """Compute threads of each; None shares this machine's cores out evenly."""
    host: str | None = None
    """Name under which clients reach the replicas; it must be in the server's certificate. None
    takes the host of `listen.address`, or of the Ray node."""
    first_port: int | None = Field(default=None, ge=1, le=65000)
    """Replica i listens on this port plus i; None takes any free one at each start."""
    start_timeout_s: float = Field(default=300.0, gt=0)
    """How long a replica may take to load its blocks."""
    restart_delay_s: float = Field(default=1.0, ge=0)
    """Pause before a dead replica is started again; doubles, up to a minute, if it dies again."""
    stall_s: float = Field(default=60.0, gt=0)
    """A replica that has not answered for this long is killed and started again."""
    ray_address: str | None = None
    """Ray cluster to join; None starts one on this machine."""
    ray_cpus: float = Field(default=1.0, ge=0)
    """CPUs that Ray keeps for each replica."""
    ray_gpus: float = Field(default=0.0, ge=0)
    """GPUs that Ray keeps for each replica."""
