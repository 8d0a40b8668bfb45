"""The estimated Fisher of a state as a linear operator on trees like params."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .basis import fills_up, real
from .checks import check_count, check_not_negative, check_number, check_tree
from .kronecker import into_basis, out_of_basis, pack, unpack_all, written
from .reference import DenseBlocks, refuse_large
from .types import Basis, Layer, Number, Params, State, outside, shapes_of


@dataclass(frozen=True, repr=False)
class Curvature:
    """A symmetric linear operator `Q diag(v) Q^T` on trees like params, block-diagonal in the layers.

    Q is the Kronecker-factored eigenbasis. `damped` and `power` give another such operator, so that with
    `inverse = F.damped(1e-3).power(-1)`

    - `inverse @ gradient` solves, `F.damped(1e-3).power(-0.5) @ gradient` whitens,
    - `inverse.sample(generator)` draws from N(0, (F + damping I)^-1),
    - `inverse.trace()`, `inverse.diagonal()` and the others are those of the inverse.

    A tree is a dict of tensors like params, or many of them at once, with the same axes in front of each tensor.
    """

    layers: tuple[Layer, ...]
    bases: Mapping[str, Basis]
    values: Mapping[str, Tensor]  # [b O I k] of each layer; 1 where a block of a basis is filled up
    real: Mapping[str, Tensor]  # [b O I 1] bool: false for coordinates that only fill up a block

    def __repr__(self) -> str:
        return f"Curvature(values of shapes { {name: tuple(v.shape) for name, v in self.values.items()} })"

    def damped(self, damping: Number | Mapping[str, Number]) -> Curvature:
        """`F + damping I`.

        damping: in loss^2 / parameter^2. A number, `info.damping` (`[]`, or `[layers]` of a rule), or by the names of
            the layers, as a damping rule returns it.
        """
        if isinstance(damping, Mapping):
            by = damping
        elif isinstance(damping, Tensor) and damping.shape == (len(self.values),):
            by = dict(zip(self.values, damping, strict=True))
        else:
            by = dict.fromkeys(self.values, damping)
        for name in self.values:
            if name not in by:
                raise ValueError(
                    f"damping has no number for the layer {name!r}, only for {list(by)}: give one for each"
                )
            check_not_negative(f"damping of {name!r}", by[name])
        return self._of(lambda name, v: v + by[name])

    def power(self, exponent: Number) -> Curvature:
        """`F^exponent`. Where F has an eigenvalue 0 a negative one gives infinities: take `damped` first.

        exponent: any finite number, or a 0-d tensor.
        """
        check_number("exponent", exponent)
        return self._of(lambda name, v: v**exponent)

    def __matmul__(self, tree: Mapping[str, Tensor]) -> Params:
        """The operator times a tree like params, or many, in the dtypes of the tree.

        KeyError, ValueError or TypeError for a tree that has not the names and shapes of params, or is not real.
        """
        check_tree(self.layers, tree)
        products = {}
        for layer in self.layers:
            values, basis = self.values[layer.weight], self.bases[layer.weight]
            turned = into_basis(pack(layer, tree).to(values.dtype), basis)
            products[layer.weight] = out_of_basis(turned * values, basis, layer.sizes)
        return unpack_all(self.layers, products, tree)

    def sample(self, generator: torch.Generator, count: int | None = None) -> Params:
        """A draw from the normal distribution with mean zero and this covariance, or a leading axis of `count` draws.

        generator: the only randomness, `torch.Generator().manual_seed(seed)` on the device of the state.
        """
        if count is not None:
            check_count("count", count)
        root = self.power(0.5).values
        ahead = () if count is None else (count,)
        draws = {}
        for layer in self.layers:
            v, basis = root[layer.weight], self.bases[layer.weight]
            noise = torch.randn(*ahead, *v.shape, generator=generator, dtype=v.dtype, device=v.device)
            draws[layer.weight] = out_of_basis(noise * v, basis, layer.sizes)
        return self._tree(draws)

    def diagonal(self) -> Params:
        """A tree like params."""
        found = {}
        for layer in self.layers:
            squared = Basis(*(written(Q).square() for Q in self.bases[layer.weight]))
            found[layer.weight] = out_of_basis(self.values[layer.weight], squared, layer.sizes)
        return self._tree(found)

    def eigenvalues(self) -> dict[str, Tensor]:
        """Of each layer, by the name of its weight, in rising order: as many as it has parameters."""
        found = {}
        for layer in self.layers:
            name, v = layer.weight, self.values[layer.weight]
            filled = fills_up(self.bases[name], layer)  # else no mask, which `vmap` could not take
            found[name] = (v[self.real[name].expand_as(v)] if filled else v.flatten()).sort().values
        return found

    def trace(self) -> Tensor:
        """`[]`, the sum of the eigenvalues."""
        return self._sum(lambda v: v)

    def logdet(self) -> Tensor:
        """`[]`, the sum of the logarithms of the eigenvalues: -inf where one is 0, NaN where one is negative."""
        return self._sum(torch.log)

    def frobenius_norm(self) -> Tensor:
        """`[]`, the root of the sum of the squared eigenvalues."""
        values = [torch.where(self.real[name], v, 0) for name, v in self.values.items() if v.numel()]
        largest = torch.stack([v.abs().amax() for v in values]).amax()
        unit = torch.where(largest > 0, largest, 1)  # for squares have half the range
        return self._sum(lambda v: (v / unit).square()).sqrt() * unit

    def dense(self) -> DenseBlocks:
        """The matrix of each layer, in float64, in the coordinates of `fisher_blocks`.

        ValueError for a layer whose blocks need more than 2 GiB.
        """
        matrices = {}
        for layer in self.layers:
            refuse_large(layer)
            b, o, i, k = layer.sizes
            values = self.values[layer.weight].double()
            basis = Basis(*(written(Q).double() for Q in self.bases[layer.weight]))
            units = torch.eye(o * i * k, dtype=torch.float64, device=values.device).reshape(o * i * k, 1, o, i, k)
            columns = out_of_basis(into_basis(units.expand(-1, b, -1, -1, -1), basis) * values, basis, layer.sizes)
            matrices[layer.weight] = columns.flatten(2).permute(1, 2, 0)
        return DenseBlocks({layer.weight: layer for layer in self.layers}, matrices)

    def scipy(self) -> Any:
        """A `scipy.sparse.linalg.LinearOperator` on vectors and matrices of NumPy.

        A vector holds the parameters one after another, flattened, in the order of `diagonal()`. ModuleNotFoundError
        where SciPy is not installed.
        """
        try:
            from scipy.sparse.linalg import LinearOperator
        except ModuleNotFoundError:
            raise ModuleNotFoundError("scipy() needs SciPy, which is not installed: pip install scipy") from None

        like = self.diagonal()
        sizes = [p.numel() for p in like.values()]
        joined = torch.cat([p.flatten() for p in like.values()])

        def multiply(x: Any) -> Any:  # [p] or [p r]
            if x.dtype.kind == "c":
                return multiply(x.real) + 1j * multiply(x.imag)
            rows = torch.as_tensor(x).to(joined).reshape(len(joined), -1).T
            parts = zip(like, rows.split(sizes, 1), strict=True)
            product = self @ {name: part.reshape(len(rows), *like[name].shape) for name, part in parts}
            columns = torch.cat([product[name].reshape(len(rows), like[name].numel()) for name in like], 1).T
            return columns.reshape(x.shape).cpu().numpy()

        dtype = torch.empty(0, dtype=joined.dtype).numpy().dtype
        square = (len(joined), len(joined))
        return LinearOperator(square, matvec=multiply, rmatvec=multiply, matmat=multiply, rmatmat=multiply, dtype=dtype)

    def _of(self, function: Callable[[str, Tensor], Tensor]) -> Curvature:
        """A function of the eigenvalues; those that fill up a block stay 1."""
        new = {name: torch.where(self.real[name], function(name, v), 1) for name, v in self.values.items()}
        return replace(self, values=new)

    def _sum(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Of a function of the eigenvalues."""
        parts = [torch.where(self.real[name], function(v), 0).sum() for name, v in self.values.items()]
        return torch.stack([part.to(parts[0]) for part in parts]).sum()

    def _tree(self, blocks: Mapping[str, Tensor]) -> Params:
        """`[... b o i k]` of each layer as a tree like params, in the dtypes of the statistics."""
        like = {name: blocks[layer.weight] for layer in self.layers for name in shapes_of([layer])}
        return unpack_all(self.layers, blocks, like)


def curvature(state: State) -> Curvature:
    """The Fisher as a state of `ekfac` estimates it: `Q diag(m2) Q^T` in the eigenbasis, without damping.

    George et al. 2018, https://arxiv.org/abs/1806.03884. It estimates, block by block, the mean over examples of
    `vec(G) vec(G)^T` with G the gradient of an example's loss, of the Fisher that `ekfac` was given: not of the sum,
    and with a bias joined to its weight. A moment of nothing (each batch so far was skipped) is NaN.

    Raises ValueError for a state before its first step, and for a layer with a basis of `rank(r)` or `thin`.
    """
    if not isinstance(state, State):
        raise TypeError(f"state is a {type(state).__name__}: pass what precondition returned")
    if state.step == 0 or not state.layers:
        raise ValueError(f"state has seen no batch, its step is {state.step}: pass what precondition returned")
    values, inside = {}, {}
    for layer in state.layers:
        name, basis, moment = layer.weight, state.bases[layer.weight], state.second_moments[layer.weight]
        for Q in basis:
            if outside(Q):
                raise ValueError(
                    f"the basis of {name!r} has {Q.shape[-1]} columns on a side of {Q.shape[-2]}, as rank(r) and thin "
                    "leave it: an operator needs a full basis, or one of blocks(max_dim)"
                )
        inside[name] = real(basis, layer)
        values[name] = torch.where(inside[name], torch.where(moment.weight > 0, moment.value, torch.nan), 1)
    return Curvature(state.layers, state.bases, values, inside)
