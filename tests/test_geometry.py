"""Any geometry of a convolution, any leading dimensions of a linear layer, any tree of an example."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from ekfac_func import RULES, SUA, ekfac, per_example_gradients
from ekfac_func.memory import Rooms
from ekfac_func.patch_gram import patch_gram
from ekfac_func.patches import Patches
from ekfac_func.types import Params
from ekfac_func.winograd import filtered

from .oracles import close, loop

PROFILE = settings(max_examples=60, deadline=None, derandomize=True)
CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@st.composite
def geometries(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of a convolution that has at least one output pixel."""
    nd = draw(st.integers(1, 3))

    def sizes(low: int, high: int) -> Any:
        return draw(st.integers(low, high) | st.tuples(*[st.integers(low, high)] * nd))

    kernel = draw(st.tuples(*[st.integers(1, 3)] * nd))
    dilation, groups = sizes(1, 2), draw(st.integers(1, 3))
    padding = draw(st.sampled_from(["same", "valid"])) if draw(st.booleans()) else sizes(0, 2)
    stride = 1 if padding == "same" else sizes(1, 3)
    each = (dilation,) * nd if isinstance(dilation, int) else dilation
    least = [d * (k - 1) + 1 for d, k in zip(each, kernel, strict=True)]
    spatial = [draw(st.integers(size, size + 3)) for size in least]
    return {
        "conv": CONVS[nd],
        "weight": (groups * draw(st.integers(1, 2)), draw(st.integers(1, 2)), *kernel),
        "spatial": spatial,
        "options": {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups},
        "bias": draw(st.booleans()),
        "unbatched": draw(st.booleans()),
        "keywords": draw(st.booleans()),
    }


def patches_of(geometry: dict[str, Any], m: int, n: int) -> Patches:
    torch.manual_seed(0)
    options, (_, c, *kernel), nd = geometry["options"], geometry["weight"], len(geometry["spatial"])
    stride, dilation = ((v,) * nd if isinstance(v, int) else v for v in (options["stride"], options["dilation"]))
    x = torch.randn(n, m, options["groups"], *geometry["spatial"], c)
    return Patches(x, tuple(kernel), stride, dilation)


@given(geometries(), st.integers(1, 2), st.integers(1, 3))
@PROFILE
def test_moments_of_patches(geometry: dict[str, Any], m: int, n: int) -> None:
    """Of pieces of the image that offsets of the kernel share as of patches written out, summed either way."""
    patches = replace(patches_of(geometry, m, n), last=0.5 if geometry["bias"] else None)
    written = patches.write()[..., 0].transpose(0, 1).flatten(1, 2)
    with pytest.MonkeyPatch.context() as patch:
        for channels in (1, 4):
            patch.setattr("ekfac_func.patch_gram.CHANNELS", channels)
            close(patch_gram(patches), written.mT @ written)


@given(geometries(), st.integers(1, 2), st.integers(1, 3), st.booleans())
@PROFILE
def test_gradients_without_patches(geometry: dict[str, Any], m: int, n: int, apart: bool) -> None:
    """By a convolution with a group for each example as from patches written out, with a bias or offsets apart."""
    patches = replace(patches_of(geometry, m, n), apart=apart)
    patches = replace(patches, last=1.0 if geometry["bias"] and not apart else None)
    g = torch.randn(*patches.shape[:3], 2)
    expected = torch.einsum("nbso,nbsik->nboik", g, patches.write())
    close(patches.gradients(g), expected)
    close(patches.gradient(g), expected.sum(0))


@given(st.tuples(*[st.integers(1, 5)] * 3), *[st.integers(1, 3)] * 2, st.integers(1, 9), st.booleans())
@PROFILE
def test_projections_without_patches(sizes: tuple[int, int, int], n: int, m: int, columns: int, bias: bool) -> None:
    """Of kernels of 3 x 3 by minimal filtering as of patches written out, some columns at a time."""
    down, across, c = sizes
    x = torch.randn(n, m, 1, down + 2, across + 2, c)
    patches = Patches(x, (3, 3), (1, 1), (1, 1), 0.5 if bias else None)
    Q = torch.randn(patches.shape[3], columns)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ekfac_func.winograd.COLUMNS", 4)
        close(filtered(patches, Q, Rooms())[..., 0], patches.write()[..., 0] @ Q)


@given(geometries(), st.booleans())
@PROFILE
def test_convolutions(geometry: dict[str, Any], sua: bool) -> None:
    torch.manual_seed(0)
    weight, options, conv = geometry["weight"], geometry["options"], geometry["conv"]
    params = {"w": torch.randn(weight)}
    if geometry["bias"]:
        params["b"] = torch.randn(weight[0])

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        x = x if geometry["unbatched"] else x[None]
        if geometry["keywords"]:
            y = conv(x, params["w"], bias=params.get("b"), **options)
        else:
            y = conv(x, params["w"], params.get("b"), *options.values())
        return y.cos().sum()

    batch = torch.randn(3, weight[1] * options["groups"], *geometry["spatial"])
    losses, expected = loop(loss_fn, params, batch)
    found = per_example_gradients(loss_fn, params, batch, rules={**RULES, **SUA} if sua else RULES)
    assert found.captured.layers["w"].rule is not None
    close(found.losses, losses)
    for name in params:
        close(found.dense(name), expected[name])


@given(st.lists(st.integers(1, 3), max_size=3), st.integers(1, 4), st.integers(1, 4), st.booleans(), st.integers(1, 4))
@PROFILE
def test_linear_layers(leading: list[int], inputs: int, outputs: int, bias: bool, n: int) -> None:
    torch.manual_seed(0)
    params = {"w": torch.randn(outputs, inputs)} | ({"b": torch.randn(outputs)} if bias else {})

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        return F.linear(x, params["w"], params.get("b")).sin().sum()

    batch = torch.randn(n, *leading, inputs)
    _, expected = loop(loss_fn, params, batch)
    found = per_example_gradients(loss_fn, params, batch)
    step = ekfac(loss_fn, damping=1e9)
    natural, _, _ = step.precondition(params, batch, step.init(params, batch))
    for name in params:
        close(found.dense(name), expected[name])
        close(natural[name] * 1e9, expected[name].mean(0), 1e-6)
    close(found.norms(), torch.cat([g.reshape(n, -1) for g in expected.values()], dim=1).norm(dim=1))


TREES = st.recursive(
    st.just("leaf"),
    lambda t: (
        st.lists(t, min_size=1, max_size=3) | st.tuples(t, t) | st.dictionaries(st.sampled_from("abc"), t, min_size=1)
    ),
    max_leaves=6,
)


@given(TREES, st.integers(1, 3))
@PROFILE
def test_trees(tree: Any, n: int) -> None:
    torch.manual_seed(0)
    batch = pytree.tree_map(lambda _: torch.randn(n, 4), tree)

    def loss_fn(params: Params, example: Any) -> Tensor:
        leaves = pytree.tree_leaves(example)
        assert pytree.tree_structure(example) == pytree.tree_structure(tree)
        return torch.stack([F.linear(leaf, params["w"]).cos().sum() for leaf in leaves]).sum()

    params = {"w": torch.randn(2, 4)}
    close(per_example_gradients(loss_fn, params, batch).dense("w"), loop(loss_fn, params, batch)[1]["w"])
