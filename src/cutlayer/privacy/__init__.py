"""What may leave the data owner: noise, its accounting, and the one gate."""

# The registry of mechanisms is complete as soon as anything here is imported.
from cutlayer.privacy import clipped_gaussian, matrix_gaussian, metric_dp

__all__ = ["clipped_gaussian", "matrix_gaussian", "metric_dp"]
