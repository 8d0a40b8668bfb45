"""Optional GPU kernels, each behind a custom operator with a reference in plain PyTorch."""

from .projected import projected_sums, reference, takes

__all__ = ["projected_sums", "reference", "takes"]
