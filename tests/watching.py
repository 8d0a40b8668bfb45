"""Dispatch modes that look at every operator while they are on."""

from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Largest(TorchDispatchMode):
    """Notes the largest tensor that an operator makes, by entries and by bytes; a view is none."""

    entries = nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if not func.is_view:
            for leaf in pytree.tree_leaves(made):
                if isinstance(leaf, Tensor):
                    self.entries, self.nbytes = max(self.entries, leaf.numel()), max(self.nbytes, leaf.nbytes)
        return made


class NoHostRead(TorchDispatchMode):
    """Every operator through which the host could read a value of the device raises."""

    READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal", "masked_select", "_linalg_eigh", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(f"aten.{read}" in str(func) for read in self.READS), f"{func} reads back to the host"
        return func(*args, **(kwargs or {}))
