"""What a basis of some rank loses against the full one, on scikit-learn's digits: `python -m benchmarks.rank`.

A small MLP, trained for a while in the full basis. Then, by rank, on one batch: the distance of `F + damping` from that
of the full basis, over the norm of that; the cosine of the steps; and the training loss of runs of their own from the
start, in the same batches.
"""

from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call

from ekfac_func import FULL, Basis, averaged_intra_batch, ekfac, rank
from ekfac_func.basis import Choice
from ekfac_func.types import Params

HIDDEN, BATCH, STEPS, LOOKS = 128, 128, 120, (20, 60, 120)
DAMPING, RATE = 0.1, 0.1
RANKS = (1, 4, 16, 32, 64, 128)
OPTIONS: dict[str, Any] = {
    "damping": DAMPING,
    "basis_every": 5,
    "factor_decay": 0.8,
    "second_moment": averaged_intra_batch(0.9),
}


def distance(basis: Basis, moment: Tensor, full: Basis, of_full: Tensor) -> tuple[Tensor, Tensor]:
    """`||F - F_full||^2` and `||F_full + damping||^2` of a layer, from the full one's coordinates."""
    R_A, R_B = (Q_full[0].T @ Q[0] for Q, Q_full in zip(basis, full, strict=True))
    shares, ranks = [], []  # q^T P_j q of each full eigenvector and each projector of a side, and the projector's rank
    for R in (R_A, R_B):
        dim, (share, count) = len(R), (R.square(), torch.ones(R.shape[1]))
        if R.shape[1] < dim:
            share[:, -1] = 1 - share[:, :-1].sum(1)
            count[-1] = dim - R.shape[1] + 1
        shares.append(share)
        ranks.append(count)
    m, f = moment[0, :, :, 0], of_full[0, :, :, 0]
    inner = (f * (shares[1] @ m @ shares[0].T)).sum()
    norm = (m.square() * ranks[1][:, None] * ranks[0]).sum()
    return norm - 2 * inner + f.square().sum(), (f + DAMPING).square().sum()


def train(choice: Choice, loss_fn: Any, params: Params, batches: list[Any]) -> tuple[list[float], Any, Params]:
    """Mean losses of the last ten steps at each look, the last state, and its parameters."""
    step = ekfac(loss_fn, bases={"*": choice}, **OPTIONS)
    state, losses = step.init(params, batches[0]), []
    for batch in batches:
        natural, state, info = step.precondition(params, batch, state)
        params = {name: p - RATE * natural[name] for name, p in params.items()}
        losses.append(info.loss.item())
    return [sum(losses[at - 10 : at]) / 10 for at in LOOKS if at <= len(losses)], state, params


def main() -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    digits = load_digits()
    x, y = torch.tensor(digits.data) / 16, torch.tensor(digits.target)
    net = nn.Sequential(nn.Linear(64, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 10))
    start = {name: p.detach() for name, p in net.named_parameters()}

    def loss_fn(params: Params, example: Any) -> Tensor:
        return F.cross_entropy(functional_call(net, params, (example[0][None],)), example[1][None])

    batches = [(x[at], y[at]) for at in (torch.randint(0, len(x), (BATCH,)) for _ in range(STEPS))]
    losses, _, _ = train(FULL, loss_fn, start, batches)
    params = train(FULL, loss_fn, start, batches[: LOOKS[0]])[2]
    full_step = ekfac(loss_fn, bases={"*": FULL}, **OPTIONS)
    looked = batches[LOOKS[0] : LOOKS[0] + 10]
    print(f"{'rank':>6}  {'F + damping':>11}  {'cosine':>7}  " + "  ".join(f"loss {at:>4}" for at in LOOKS))
    for r in RANKS:
        step = ekfac(loss_fn, bases={"*": rank(r)}, **OPTIONS)
        of_rank, of_full = step.init(params, batches[0]), full_step.init(params, batches[0])
        for batch in looked:  # the same parameters and batches for both
            found, of_rank, _ = step.precondition(params, batch, of_rank)
            wanted, of_full, _ = full_step.precondition(params, batch, of_full)
        parts = [
            distance(
                of_rank.bases[w], of_rank.second_moments[w].value, of_full.bases[w], of_full.second_moments[w].value
            )
            for w in of_full.bases
        ]
        error = (sum(a for a, _ in parts) / sum(b for _, b in parts)) ** 0.5
        v, u = (torch.cat([tree[name].flatten() for name in params]) for tree in (found, wanted))
        cosine = torch.dot(v, u) / v.norm() / u.norm()
        curve = train(rank(r), loss_fn, start, batches)[0]
        print(f"{r:>6}  {error:>11.4f}  {cosine:>7.4f}  " + "  ".join(f"{loss:>9.4f}" for loss in curve))
    print(f"{'full':>6}  {0:>11.4f}  {1:>7.4f}  " + "  ".join(f"{loss:>9.4f}" for loss in losses))


if __name__ == "__main__":
    main()
