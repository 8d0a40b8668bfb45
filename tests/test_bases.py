"""How much of a basis is kept, and what the samples of its factors are, by choice."""

import fnmatch
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from ekfac_func import (
    DIAGONAL,
    FULL,
    RULES,
    SUA,
    Blocks,
    Call,
    Factored,
    averaged_intra_batch,
    blocks,
    ekfac,
    expand,
    kfac,
    reduce,
    transport,
)
from ekfac_func.discovery import Options, plan
from ekfac_func.types import Params

from .cases import N, make
from .oracles import blocks as dense_blocks
from .oracles import close, close_trees, loop, side
from .watching import Largest

CHOICES = {  # those of full bases are in test_estimators.py
    "diagonal": {"*": DIAGONAL},
    "diagonal inputs": {"*": Blocks(inputs=1)},
    "diagonal outputs": {"*": Blocks(outputs=1)},
    "blocks": {"*": blocks(2)},
    "uneven blocks": {"*": blocks(3)},
    "one by name": {"[0aep]*": blocks(2), "*": FULL},
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", ["mlp", "conv groups", "tied padded", "slices", "not views", "layer norm", "experts"])
def test_the_moment_is_exact_in_any_basis(name: str, choice: str) -> None:
    case = make(name)
    batch = case.batch(N)
    step = ekfac(case.loss_fn, damping=1e-2, bases=CHOICES[choice])
    natural, state, _ = step.precondition(case.params, batch, step.init(case.params, batch))
    gradients = loop(case.loss_fn, case.params, batch)[1]
    for layer in plan(case.loss_fn, case.params, batch, Options(RULES)).layers:
        _, o, i, _ = layer.sizes
        basis = state.bases[layer.weight]
        Q_A, Q_B = side(basis.Q_A, i), side(basis.Q_B, o)
        G = dense_blocks(gradients, layer)
        moment = torch.einsum("boO,nboik,biI->nbOIk", Q_B, G, Q_A).square().mean(0)
        close(state.second_moments[layer.weight].value, moment)
        projected = torch.einsum("boO,boik,biI->bOIk", Q_B, G.mean(0), Q_A)
        rescaled = torch.einsum("boO,bOIk,biI->boik", Q_B, projected / (moment + 1e-2), Q_A)
        close(dense_blocks({k: v[None] for k, v in natural.items()}, layer)[0], rescaled)
        chosen = next((v for p, v in CHOICES[choice].items() if fnmatch.fnmatch(layer.weight, p)), FULL)
        for C, dim, largest in ((state.factors[layer.weight].A, i, chosen.inputs), (basis.Q_B, o, chosen.outputs)):
            if largest is not None and dim > largest:
                assert C.dim() == 4
                assert C.shape[-1] <= largest


def test_blocks_of_a_factor_are_its_diagonal_blocks() -> None:
    case = make("mlp")
    batch = case.batch(N)
    factors = {}
    for largest in (None, 2):
        step = ekfac(case.loss_fn, damping=1e-2, bases={"*": Blocks(largest, largest)})
        factors[largest] = step.precondition(case.params, batch, step.init(case.params, batch))[1].factors["0.weight"]
    for whole, parts in zip(factors[None][:2], factors[2][:2], strict=True):
        for m in range(parts.shape[1]):
            part = whole[0, 2 * m : 2 * m + 2, 2 * m : 2 * m + 2]
            close(parts[0, m, : len(part), : len(part)], part)


def test_what_a_refresh_carries_on_in_blocks() -> None:
    """Transport keeps the sum of the moment; compiled equals eager; a state of another choice is refused."""
    case = make("mlp")
    batches = [case.batch(40) for _ in range(2)]
    step = ekfac(case.loss_fn, damping=1e-2, second_moment=averaged_intra_batch(0.5), bases={"*": blocks(2)})
    _, state, _ = step.precondition(case.params, batches[0], step.init(case.params, batches[0]))
    natural, new, _ = step.precondition(case.params, batches[1], state)
    moved = transport(state.second_moments["0.weight"], state.bases["0.weight"], new.bases["0.weight"], torch.ones)
    close(moved.value.sum(), state.second_moments["0.weight"].value.sum())
    compiled = torch.compile(step.precondition, fullgraph=True, backend="eager")
    close_trees(compiled(case.params, batches[1], state)[0], natural, 1e-8)
    whole = ekfac(case.loss_fn, damping=1e-2)
    with pytest.raises(ValueError, match=r"second moment of shape .* for the layer '0.weight'.*bases"):
        whole.precondition(case.params, batches[1], state)


def test_a_choice_that_is_none_is_refused() -> None:
    case = make("mlp")
    with pytest.raises(ValueError, match="max_dim=0"):
        blocks(0)
    for bases in ({"*": 3}, {"*": "full"}, {"*": Blocks(0, 1)}):
        with pytest.raises((TypeError, ValueError), match=r"bases\['\*'\]"):
            ekfac(case.loss_fn, damping=1.0, bases=bases)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"bases.*'nothing\*'.*fits no"):
        ekfac(case.loss_fn, damping=1.0, bases={"nothing*": FULL}).init(case.params, case.batch(2))


def samples(params: Params, x: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and output gradients `[n s .]` of a linear layer on positions, from the loss below."""
    y = torch.einsum("nsi,oi->nso", x, params["w"]).requires_grad_()
    (g,) = torch.autograd.grad(y.cos().sum(), y)
    return x, g


@pytest.mark.parametrize("sharing", [expand, reduce])
def test_weight_sharing(sharing: Any) -> None:
    params, x = {"w": torch.randn(3, 4)}, torch.randn(N, 5, 4)

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        return F.linear(x, params["w"]).cos().sum()

    a, g = samples(params, x)
    if sharing is reduce:
        A, B, positions = a.mean(1).T @ a.mean(1) / N, g.sum(1).T @ g.sum(1) / N, 1
    else:
        A, B, positions = torch.einsum("nsi,nsj->ij", a, a) / N / 5, torch.einsum("nso,nsp->op", g, g) / N / 5, 5
    step = ekfac(loss_fn, damping=1e-2, weight_sharing=sharing)
    _, state, _ = step.precondition(params, x, step.init(params, x))
    close(state.factors["w"].A[0], A)
    close(state.factors["w"].B[0], B)
    G = torch.einsum("oO,nso,nsi,iI->nOI", state.bases["w"].Q_B[0], g, a, state.bases["w"].Q_A[0])
    close(state.second_moments["w"].value[0, :, :, 0], G.square().mean(0))
    approximate = ekfac(loss_fn, damping=1e-2, weight_sharing=sharing, second_moment=kfac)
    _, state, _ = approximate.precondition(params, x, approximate.init(params, x))
    product = positions * torch.outer(torch.linalg.eigvalsh(B), torch.linalg.eigvalsh(A))
    close(state.second_moments["w"].value[0, :, :, 0], product)


@pytest.mark.parametrize("sharing", [expand, reduce])
def test_weight_sharing_with_sua(sharing: Any) -> None:
    """A is of the pixels of the layer's input, one sample a pixel or their mean, and stands at every offset."""
    params, x = {"w": torch.randn(3, 2, 2, 2)}, torch.randn(N, 2, 4, 4)

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        return F.conv2d(x[None], params["w"]).cos().sum()

    y = F.conv2d(x, params["w"]).requires_grad_()
    g = torch.autograd.grad(y.cos().sum(), y)[0].flatten(2)  # [n o s]
    pixels = x.flatten(2)  # [n c p]
    if sharing is reduce:
        pixels, g = pixels.mean(2, keepdim=True), g.sum(2, keepdim=True)
    A = torch.einsum("ncp,ndp->cd", pixels, pixels) / N / pixels.shape[2]
    B = torch.einsum("nos,nqs->oq", g, g) / N / g.shape[2]
    step = ekfac(loss_fn, damping=1e-2, weight_sharing=sharing, second_moment=kfac, rules={**RULES, **SUA})
    _, state, _ = step.precondition(params, x, step.init(params, x))
    close(state.factors["w"].A[0], A)
    close(state.factors["w"].B[0], B)
    product = g.shape[2] * torch.outer(torch.linalg.eigvalsh(B), torch.linalg.eigvalsh(A))
    close(state.second_moments["w"].value[0], product[..., None].expand(3, 2, 4))


def patches(x: Tensor, groups: int = 1, dilation: int = 1, last: float = 1.0) -> Tensor:
    """What a kernel of 2 x 2 sees of an image that is padded already, `[b s i]`, and a one for the bias."""
    a = F.unfold(x[None], 2, dilation)[0].unflatten(0, (groups, -1)).mT
    return torch.cat([a, torch.full((*a.shape[:2], 1), last)], 2)


def conv(x: Tensor, params: Params, **options: Any) -> Tensor:
    return F.conv2d(x[None], params["w"], params["b"], **options)


def around(x: Tensor) -> Tensor:
    return F.pad(x[None], (1, 1, 1, 1), mode="circular")[0]


CALLED: dict[str, Callable[[Params, Tensor], list[tuple[Tensor, Tensor]]]] = {  # inputs [b s i] and output of each call
    "groups": lambda p, x: [(patches(x, 2), conv(x, p, groups=2))],
    "dilation": lambda p, x: [(patches(x, dilation=2), conv(x, p, dilation=2))],
    "same": lambda p, x: [(patches(F.pad(x, (0, 1, 0, 1))), conv(x, p, padding="same"))],
    "circular": lambda p, x: [(patches(around(x)), conv(around(x), p))],
    "twice": lambda p, x: [(patches(x), conv(x, p)), (patches(x.cos()), conv(x.cos(), p))],
    "once without its bias": lambda p, x: [
        (patches(x), conv(x, p)),
        (patches(x.cos(), last=0.0), conv(x.cos(), {**p, "b": None})),  # type: ignore[dict-item]
    ],
}


@pytest.mark.parametrize("kind", CALLED)
def test_samples_of_each_kind_of_call(kind: str) -> None:
    """Groups apart, padding and dilation those of the call, each call of a layer; their number is that of K-FAC."""
    params, x = {"w": torch.randn(4, 1 if kind == "groups" else 2, 2, 2), "b": torch.randn(4)}, torch.randn(N, 2, 4, 4)

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        return torch.stack([y.cos().sum() for _, y in CALLED[kind](params, x)]).sum()

    step = ekfac(loss_fn, damping=1e-2, second_moment=kfac)
    _, state, _ = step.precondition(params, x, step.init(params, x))
    samples, slopes = [], []
    for example in x:
        calls = CALLED[kind]({name: p.clone().requires_grad_() for name, p in params.items()}, example)
        inputs, outputs = zip(*calls, strict=True)
        gs = torch.autograd.grad(torch.stack([y.cos().sum() for y in outputs]).sum(), outputs)
        samples.append(torch.cat(inputs, 1))
        slopes.append(torch.cat([g[0].flatten(1).unflatten(0, (len(samples[0]), -1)).mT for g in gs], 1))
    a, g = torch.stack(samples), torch.stack(slopes)  # [n b s i], [n b s o]
    A, B = (torch.einsum("nbsd,nbse->bde", t, t) / N / t.shape[2] for t in (a, g))
    close(state.factors["w"].A, A)
    close(state.factors["w"].B, B)
    product = a.shape[2] * torch.einsum("bO,bI->bOI", torch.linalg.eigvalsh(B), torch.linalg.eigvalsh(A))
    close(state.second_moments["w"].value[..., 0], product)


def test_the_inputs_of_every_call_are_samples_where_one_has_its_own() -> None:
    """A kernel of one pixel, in SUA's table with the pixels as samples, that is a linear layer too."""
    params = {"w": torch.randn(3, 2, 1, 1)}
    batch = torch.randn(N, 2, 4, 4), torch.randn(N, 5, 2)

    def loss_fn(params: Params, example: Any) -> Tensor:
        x, z = example
        of_pixels, of_rows = F.conv2d(x[None], params["w"]), F.linear(z, params["w"].flatten(1))
        return of_pixels.cos().sum() + of_rows.cos().sum()

    step = ekfac(loss_fn, damping=1e-2, rules={**RULES, **SUA})
    _, state, _ = step.precondition(params, batch, step.init(params, batch))
    samples = torch.cat([batch[0].flatten(2).mT, batch[1]], 1)  # [n s i]
    close(state.factors["w"].A[0], torch.einsum("nsi,nsj->ij", samples, samples) / samples[..., 0].numel())


@torch.overrides.wrap_torch_function(lambda x, weight: (x, weight))
def stacked(x: Tensor, weight: Tensor) -> Tensor:  # [s i], [b o i]
    return torch.einsum("si,boi->bso", x, weight)


def test_own_samples_of_some_blocks() -> None:
    """A rule of the user's own that gives samples of the factor beside the inputs, of a slice of the blocks."""

    def read(x: Tensor, weight: Tensor) -> Call:
        def term(x: Tensor, g: Tensor) -> Factored:
            a = x[:, None].expand(-1, g.shape[1], -1, -1)
            return Factored(a[..., None], g, x=a)

        return Call(weight, "boi", x, term)

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        return stacked(x, params["w"][1:3]).cos().sum()

    params, x = {"w": torch.randn(4, 3, 5)}, torch.randn(N, 2, 5)
    step = ekfac(loss_fn, damping=1e-2, rules={stacked: read})
    _, state, _ = step.precondition(params, x, step.init(params, x))
    A = torch.einsum("nsi,nsj->ij", x, x) / N / 2
    close(state.factors["w"].A, torch.stack([A * 0, A, A, A * 0]))


def test_the_factors_of_a_table_count_ids_and_leave_padding_out() -> None:
    params, ids = {"t": torch.randn(6, 3)}, torch.tensor([[1, 1, 2], [0, 4, 4]])

    def loss_fn(params: Params, ids: Tensor) -> Tensor:
        return F.embedding(ids, params["t"], padding_idx=0).cos().sum()

    step = ekfac(loss_fn, damping=1e-2)
    _, state, _ = step.precondition(params, ids, step.init(params, ids))
    g = -params["t"][ids].sin() * (ids != 0)[..., None]
    close(state.factors["t"].A[0], torch.einsum("nsi,nsj->ij", g, g) / 5)
    close(state.factors["t"].B.flatten(), torch.bincount(ids[ids != 0], minlength=6) / 5)


def test_a_large_vocabulary_in_little_memory() -> None:
    """50,000 ids at d = 256: no factor of the vocabulary, no gradient of a batch in full."""
    params = {"t": torch.zeros(50_000, 256, dtype=torch.float32)}

    def loss_fn(params: Params, ids: Tensor) -> Tensor:
        return F.embedding(ids, params["t"]).cos().sum() + F.embedding(ids, params["t"]).sum()

    ids = torch.randint(0, 50_000, (8, 64))
    step = ekfac(loss_fn, damping=1e-2)
    state = step.init(params, ids)
    with Largest() as largest:
        _, state, _ = step.precondition(params, ids, state)
    assert largest.entries == 50_000 * 256
    assert sum(t.nbytes for t in pytree.tree_leaves(state) if isinstance(t, Tensor)) < 60e6


def test_a_tied_table_counts_each_use_by_its_share() -> None:
    """The eigenvalue product of a table that is a head too sums to the sum of what it is of each use alone."""
    params, ids = {"t": torch.randn(7, 4)}, torch.randint(0, 7, (N, 5))

    def looked_up(params: Params, ids: Tensor) -> Tensor:
        return F.embedding(ids, params["t"]).cos().sum()

    def as_head(params: Params, ids: Tensor) -> Tensor:
        return F.linear(torch.arange(4.0) * ids[:, None], params["t"]).sin().sum()

    def both(params: Params, ids: Tensor) -> Tensor:
        return looked_up(params, ids) + as_head(params, ids)

    totals = []
    for loss_fn in (looked_up, as_head, both):
        step = ekfac(loss_fn, damping=1e-2, second_moment=kfac)
        _, state, _ = step.precondition(params, ids, step.init(params, ids))
        totals.append(state.second_moments["t"].value.sum())
    close(totals[2], totals[0] + totals[1])
    assert state.bases["t"].Q_B.shape == (1, 7, 1, 1)
