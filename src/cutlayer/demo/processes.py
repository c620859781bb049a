"""The demo's two sides as processes: those of a simulation, one of each."""

from cutlayer.simulation.processes import ServerProcess, serving, train_in_process

__all__ = ["ServerProcess", "serving", "train_in_process"]
