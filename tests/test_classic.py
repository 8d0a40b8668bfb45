"""Parity with the hook-based EKFAC: its formulas, written again as loops over examples."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ekfac_func import RULES, SUA, SecondMoment, ekfac, intra_batch, kfac, running_average
from ekfac_func.types import Params

from .oracles import close


@dataclass
class Classic:
    """A net of Linear and Conv2d layers, preconditioned layer by layer in loops over the examples."""

    net: nn.Sequential
    damping: float
    moment: str  # "intra", "running" or "kfac"
    alpha: float
    every: int
    sua: bool
    step: int = 0
    layers: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def natural(self, params: Params, x: Tensor, y: Tensor) -> Params:
        n, result = len(x), {}
        seen: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
        for k in range(n):
            for name, record in self.example(params, x[k : k + 1], y[k : k + 1]).items():
                seen.setdefault(name, []).append(record)
        for name, records in seen.items():
            inputs = torch.cat([record[0] for record in records])
            outputs = torch.cat([record[1] for record in records])
            gradients = [record[2] for record in records]  # each [o, i, k]
            positions = len(outputs) // n
            if self.step % self.every == 0:
                A, B = inputs.T @ inputs / len(inputs), outputs.T @ outputs / len(outputs)
                (a, Q_A), (b, Q_B) = torch.linalg.eigh(A), torch.linalg.eigh(B)
                m2 = (b[:, None] * a[None] * positions)[..., None].repeat(1, 1, gradients[0].shape[2])
                self.layers[name] = {"Q_A": Q_A, "Q_B": Q_B, "m2": m2}
            layer = self.layers[name]
            rotated = [self.rotate(layer["Q_B"].T, G, layer["Q_A"]) for G in gradients]
            mean = torch.stack(rotated).mean(0)
            if self.moment == "intra":
                layer["m2"] = torch.stack([G**2 for G in rotated]).mean(0)
            elif self.moment == "running":
                layer["m2"] = self.alpha * layer["m2"] + (1 - self.alpha) * n * mean**2
            natural = self.rotate(layer["Q_B"], mean / (layer["m2"] + self.damping), layer["Q_A"].T)
            weight = params[f"{name}.weight"]
            if f"{name}.bias" in params:
                result[f"{name}.bias"] = natural[:, -1, 0]
                natural = natural[:, :-1]
            result[f"{name}.weight"] = natural.reshape(weight.shape)
        self.step += 1
        return result

    @staticmethod
    def rotate(left: Tensor, G: Tensor, right: Tensor) -> Tensor:
        return torch.stack([left @ G[..., k] @ right for k in range(G.shape[2])], dim=-1)

    def example(self, params: Params, x: Tensor, y: Tensor) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Per layer: the samples of A, the samples of B, and the gradient `[o, i, k]` by `torch.autograd.grad`."""
        leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}
        for name, module in self.net.named_children():
            inputs[name] = x
            if isinstance(module, nn.Linear):
                x = F.linear(x, leaves[f"{name}.weight"], leaves.get(f"{name}.bias"))
            elif isinstance(module, nn.Conv2d):
                w, b = leaves[f"{name}.weight"], leaves.get(f"{name}.bias")
                x = F.conv2d(x, w, b, module.stride, module.padding, module.dilation)
            else:
                x = module(x)
            outputs[name] = x
        names = [name for name in inputs if f"{name}.weight" in params]
        loss = F.cross_entropy(x, y)
        by_output = torch.autograd.grad(loss, [outputs[name] for name in names], retain_graph=True)
        by_leaf = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        records = {}
        for name, g in zip(names, by_output, strict=True):
            module, a, G = self.net.get_submodule(name), inputs[name].detach(), by_leaf[f"{name}.weight"]
            if isinstance(module, nn.Conv2d):
                g = g[0].flatten(1).T
                if self.sua:
                    a, G = a[0].flatten(1).T, G.flatten(2)
                else:
                    padding = (1, 1) if module.padding == (1, 1) else (0, 0)
                    a = F.unfold(a, module.kernel_size, module.dilation, padding, module.stride)[0].T
                    G = G.flatten(1)[..., None]
            else:
                G = G[..., None]
            if f"{name}.bias" in params:
                a = torch.cat([a, torch.ones(len(a), 1)], dim=1)
                G = torch.cat([G, by_leaf[f"{name}.bias"][:, None, None]], dim=1)
            records[name] = (a, g, G)
        return records


def net(bias: bool) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=bias),
        nn.Tanh(),
        nn.Conv2d(3, 4, 2, dilation=2, bias=bias),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(4, 6, bias=bias),
        nn.Tanh(),
        nn.Linear(6, 3, bias=bias),
    )


ESTIMATORS: dict[str, SecondMoment] = {"intra": intra_batch, "running": running_average(0.8), "kfac": kfac}


# with a bias the classic code has two conventions under SUA; here it is a block of its own, as the test below says
@pytest.mark.parametrize(("sua", "bias"), [(False, True), (False, False), (True, False)], ids=["bias", "", "sua"])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("moment", ESTIMATORS)
def test_natural_gradients_over_stale_bases(sua: bool, every: int, moment: str, bias: bool) -> None:
    module = net(bias)
    params = {name: p.detach().clone() for name, p in module.named_parameters()}

    def loss_fn(params: Params, example: Any) -> Tensor:
        return F.cross_entropy(functional_call(module, params, (example[0][None],)), example[1][None])

    batches = [(torch.randn(64, 2, 6, 6), torch.randint(0, 3, (64,))) for _ in range(7)]
    rules = {**RULES, **SUA} if sua else RULES
    step = ekfac(loss_fn, damping=1e-3, second_moment=ESTIMATORS[moment], basis_every=every, rules=rules)
    state = step.init(params, batches[0])
    classic = Classic(module, 1e-3, moment, 0.8, every, sua)
    for batch in batches:
        natural, state, info = step.precondition(params, batch, state)
        expected = classic.natural(params, *batch)
        assert not info.skipped
        # a softmax's output gradients sum to zero: the last layer's B has one null direction, which is no gradient's
        for name in params:
            close(natural[name], expected[name], 1e-8)
        params = {name: p - 0.05 * natural[name] for name, p in params.items()}


def test_bias_of_a_sua_convolution_is_preconditioned_by_element() -> None:
    module = net(True)
    params = {name: p.detach().clone() for name, p in module.named_parameters()}

    def loss_fn(params: Params, example: Any) -> Tensor:
        return F.cross_entropy(functional_call(module, params, (example[0][None],)), example[1][None])

    batch = torch.randn(8, 2, 6, 6), torch.randint(0, 3, (8,))
    step = ekfac(loss_fn, damping=1e-3, rules={**RULES, **SUA})
    natural, _, _ = step.precondition(params, batch, step.init(params, batch))
    g = torch.func.vmap(torch.func.grad(loss_fn), (None, 0))(params, batch)["0.bias"]
    close(natural["0.bias"], g.mean(0) / (g.square().mean(0) + 1e-3))
