"""Torch functions that hide layers from the rules, or that `vmap` cannot run well, written out in simpler calls.

An expansion takes `call(function, *args)`, which hands a call back to the tap, and the arguments of the function that
it stands for. It returns NotImplemented for arguments that it does not cover: then the function itself is called.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .indexing import getitem, setitem

Expansion = Callable[..., Any]


def multi_head_attention(
    call: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    """`F.multi_head_attention_forward`: its projections by `F.linear`."""
    if static_k is not None or static_v is not None or (is_causal and attn_mask is None):
        return NotImplemented
    batched = query.dim() == 3
    same_kv, same_qk = key is value, query is key
    if not batched:  # [l e] to [l 1 e]
        query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    e, m, heads = query.shape[-1], query.shape[1], num_heads

    if in_proj_weight is not None and not use_separate_proj_weight and same_kv and same_qk:
        q, k, v = call(F.linear, query, in_proj_weight, in_proj_bias).chunk(3, dim=-1)
    else:
        if use_separate_proj_weight:
            matrices = [q_proj_weight, k_proj_weight, v_proj_weight]
        else:
            matrices = [call(torch.narrow, in_proj_weight, 0, j * e, e) for j in range(3)]
        biases = [None if in_proj_bias is None else call(torch.narrow, in_proj_bias, 0, j * e, e) for j in range(3)]
        q, k, v = (call(F.linear, x, w, b) for x, w, b in zip((query, key, value), matrices, biases, strict=True))

    if bias_k is not None and bias_v is not None:
        k, v = (torch.cat([t, bias.expand(1, m, e)]) for t, bias in ((k, bias_k), (v, bias_v)))
    if add_zero_attn:
        k, v = (F.pad(t, [0, 0, 0, 0, 0, 1]) for t in (k, v))
    mask = _added_up(attn_mask, key_padding_mask, q, heads, len(k) - len(key))
    q, k, v = (t.reshape(*t.shape[:2], heads, e // heads).permute(1, 2, 0, 3) for t in (q, k, v))  # [m heads l d]
    dropout = dropout_p if training else 0.0
    if need_weights:
        weights = _softmax_scores(q, k, mask, None)
        weights = F.dropout(weights, dropout) if dropout else weights
        out = weights @ v
    else:
        out = call(F.scaled_dot_product_attention, q, k, v, mask, dropout)
    out = call(F.linear, out.permute(2, 0, 1, 3).reshape(-1, m, e), out_proj_weight, out_proj_bias)
    out = out if batched else out.squeeze(1)
    if not need_weights:
        return out, None
    weights = weights.mean(1) if average_attn_weights else weights
    return out, weights if batched else weights.squeeze(0)


def _added_up(mask: Tensor | None, padding: Tensor | None, like: Tensor, heads: int, extra: int) -> Tensor | None:
    """What two masks add to the scores `[m heads l t]`; every query may see the last keys, as many as extra."""
    mask, padding = _additive(mask, like), _additive(padding, like)
    if mask is not None and mask.dim() == 3:  # [(m heads) l t]
        mask = mask.unflatten(0, (-1, heads))
    if mask is not None:
        mask = F.pad(mask, [0, extra])
    if padding is not None:
        padding = F.pad(padding, [0, extra])[:, None, None]
    return padding if mask is None else mask if padding is None else mask + padding


def scaled_dot_product_attention(
    call: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """`F.scaled_dot_product_attention` in full: `vmap` would run the fused kernels one example at a time.

    As there, a query that may see no key at all gives zero.
    """
    if is_causal and attn_mask is not None:
        return NotImplemented
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = _additive(~attn_mask, query)
    if attn_mask is None:
        weights = _softmax_scores(query, key, None, scale)
    else:
        blind = (attn_mask == -torch.inf).all(-1, keepdim=True)
        weights = _softmax_scores(query, key, torch.where(blind, 0, attn_mask), scale)
        weights = torch.where(blind, 0, weights)
    return (F.dropout(weights, dropout_p) if dropout_p else weights) @ value


def embedding_bag(
    call: Callable[..., Any],
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    """`F.embedding_bag` by sum or mean: `F.embedding`, then a product with the weight of each id in each bag."""
    if max_norm is not None or scale_grad_by_freq or mode == "max" or input.is_floating_point():
        return NotImplemented
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return NotImplemented
    share = torch.ones_like(input, dtype=weight.dtype)
    if padding_idx is not None:
        share = torch.where(input == padding_idx % len(weight), 0, share)
    rows = call(F.embedding, input, weight, padding_idx)
    if offsets is not None:
        starts = offsets[:-1] if include_last_offset else offsets
        bag = (starts[None] <= torch.arange(len(input), device=input.device)[:, None]).sum(1) - 1  # [s]
        member = bag[None] == torch.arange(len(starts), device=input.device)[:, None]  # [m s]
        share = torch.where(member, share, 0)
    if mode == "mean":
        share = share / share.sum(-1, keepdim=True).clamp(min=1)
    share = share if per_sample_weights is None else share * per_sample_weights
    return torch.einsum("ms,msi->mi" if offsets is None else "ms,si->mi", share, rows)


def blocks_at(stack: Tensor, ids: Tensor) -> Tensor:
    """`stack[ids]`; ids past its end, of rows that belong to no block, take the last one."""
    return stack[ids.clamp(max=len(stack) - 1)]


def grouped_mm(
    call: Callable[..., Any],
    mat_a: Tensor,
    mat_b: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Any:
    """`F.grouped_mm` of rows and a stack of matrices, as experts have: the matrix of each row picked, and one `bmm`.

    Rows from `offs[-1]` on belong to no matrix: they give zero, where the kernel leaves them unwritten.
    """
    if mat_a.dim() != 2 or mat_b.dim() != 3 or offs is None or bias is not None:
        return NotImplemented
    ids = (offs[None] <= torch.arange(len(mat_a), device=offs.device)[:, None]).sum(1)
    stack = call(blocks_at, mat_b, ids)
    rows = call(torch.bmm, mat_a[:, None], stack)[:, 0]
    rows = torch.where((ids < len(mat_b))[:, None], rows, 0)
    return rows if out_dtype is None else rows.to(out_dtype)


def requires_grad_(call: Callable[..., Any], input: Tensor, requires_grad: bool = True) -> Tensor:
    """As an assignment, for `torch.func` refuses the method; of a leaf alone, for all else has a gradient anyway.

    In a graph, where nothing can ask for that gradient, it does nothing.
    """
    if not torch.compiler.is_dynamo_compiling() and (input.is_leaf or not requires_grad):
        input.requires_grad = requires_grad
    return input


def gaussian_nll_loss(
    call: Callable[..., Any],
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Any:
    """`F.gaussian_nll_loss`, which looks at the variances: a negative one, which it refuses, makes NaN here."""
    if not isinstance(var, Tensor) or reduction not in ("none", "mean", "sum"):
        return NotImplemented
    if var.shape == input.shape[:-1] and var.dim() < input.dim():
        var = var.unsqueeze(-1)
    elif var.dim() != input.dim() or var.shape not in (input.shape, (*input.shape[:-1], 1)):
        return NotImplemented
    raised = torch.where(var < 0, torch.nan, var + (var.clamp(min=eps) - var).detach())
    losses = (raised.log() + (input - target).square() / raised) / 2
    if full:
        losses = losses + math.log(2 * math.pi) / 2
    return reduced(losses, reduction)


def reduced(losses: Tensor, reduction: str) -> Tensor:
    """Losses as the argument `reduction` of torch's says: "none", "sum" or "mean"."""
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.mean()


Cell = Callable[..., tuple[Tensor, ...]]


def _lstm_cell(call: Any, i: Tensor, h: Tensor, state: tuple[Tensor, ...], w_hr: Tensor | None) -> tuple[Tensor, ...]:
    take, forget, new, out = (i + h).chunk(4, -1)
    c = forget.sigmoid() * state[1] + take.sigmoid() * new.tanh()
    y = out.sigmoid() * c.tanh()
    return (y if w_hr is None else call(F.linear, y, w_hr)), c


def _gru_cell(call: Any, i: Tensor, h: Tensor, state: tuple[Tensor, ...], w_hr: None) -> tuple[Tensor, ...]:
    (i_reset, i_update, i_new), (h_reset, h_update, h_new) = i.chunk(3, -1), h.chunk(3, -1)
    update = (i_update + h_update).sigmoid()
    new = (i_new + (i_reset + h_reset).sigmoid() * h_new).tanh()
    return ((1 - update) * new + update * state[0],)


def _plain_cell(function: Callable[[Tensor], Tensor]) -> Cell:
    return lambda call, i, h, state, w_hr: (function(i + h),)


def one_step(cell: Cell) -> Expansion:
    """`torch.lstm_cell`, `gru_cell`, `rnn_tanh_cell` and `rnn_relu_cell`."""

    def stepped(
        call: Callable[..., Any],
        input: Tensor,
        hx: Any,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Any:
        state = tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
        if any(h.shape[:-1] != input.shape[:-1] for h in state):
            return NotImplemented
        new = cell(call, call(F.linear, input, w_ih, b_ih), call(F.linear, state[0], w_hh, b_hh), state, None)
        return new if len(new) > 1 else new[0]

    return stepped


def _one_way(
    call: Callable[..., Any],
    cell: Cell,
    x: Tensor,
    state: tuple[Tensor, ...],
    weights: Any,
    has_biases: bool,
    backwards: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One layer of a recurrent net in one direction: from inputs `[t m i]` to outputs `[t m h]`, and the last state."""
    w_ih, w_hh, *rest = weights
    b_ih, b_hh = rest[:2] if has_biases else (None, None)
    w_hr = rest[-1] if len(rest) % 2 else None
    inputs, outputs = call(F.linear, x, w_ih, b_ih), []
    for i in inputs.flip(0) if backwards else inputs:
        state = cell(call, i, call(F.linear, state[0], w_hh, b_hh), state, w_hr)
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if backwards else outputs), state


def recurrent(cell: Cell) -> Expansion:
    """`torch.lstm`, `gru`, `rnn_tanh` and `rnn_relu` step by step: `vmap` has no rule for them."""

    def unrolled(
        call: Callable[..., Any],
        input: Tensor,
        hx: Any,
        weights: Any,
        has_biases: Any,
        num_layers: int,
        dropout: float,
        training: bool,
        bidirectional: bool,
        batch_first: bool | None = None,
    ) -> Any:
        if batch_first is None or not isinstance(has_biases, bool):
            raise ValueError(
                "the loss hands a packed sequence to a recurrent net, which torch.func cannot differentiate: one "
                "example needs no packing, pass the sequence as it is and mask what is padding"
            )
        states = tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)  # each [(layers directions) m h]
        if any(h.shape[1] != input.shape[0 if batch_first else 1] for h in states):
            return NotImplemented
        directions = 2 if bidirectional else 1
        each = len(weights) // (num_layers * directions)
        x = input.transpose(0, 1) if batch_first else input  # [t m i]
        last = []
        for layer in range(num_layers):
            if layer > 0 and dropout and training:
                x = F.dropout(x, dropout)
            sides = []
            for at in range(layer * directions, (layer + 1) * directions):
                own, backwards = weights[at * each : (at + 1) * each], at % directions == 1
                outputs, state = _one_way(call, cell, x, tuple(h[at] for h in states), own, has_biases, backwards)
                sides.append(outputs)
                last.append(state)
            x = torch.cat(sides, -1)
        return x.transpose(0, 1) if batch_first else x, *(torch.stack(h) for h in zip(*last, strict=True))

    return unrolled


def _softmax_scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.mT
    return (scores if mask is None else scores + mask).softmax(-1).to(q.dtype)  # of a float32 mask in half precision


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """What is added to the scores for a mask; a boolean one is true where nothing may be seen."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.where(mask, -torch.inf, torch.zeros((), dtype=like.dtype, device=like.device))


_ALWAYS: dict[Any, Expansion] = {
    F.multi_head_attention_forward: multi_head_attention,
    F.embedding_bag: embedding_bag,
    F.grouped_mm: grouped_mm,
    torch._grouped_mm: grouped_mm,
    torch.lstm_cell: one_step(_lstm_cell),
    torch.gru_cell: one_step(_gru_cell),
    torch.rnn_tanh_cell: one_step(_plain_cell(torch.tanh)),
    torch.rnn_relu_cell: one_step(_plain_cell(torch.relu)),
    "transformers.grouped_mm_fallback": grouped_mm,  # the operator in its place in models that are traced
    Tensor.requires_grad_: requires_grad_,
}
"""What hides layers from the rules or no transform takes, with `vmap` and without."""
COPIES: dict[Any, Expansion] = {Tensor.__getitem__: getitem}
"""Copies of what is a view without `vmap`: a loss may change neither the copy nor its source in place."""
FOR_VMAP: dict[Any, Expansion] = {
    F.scaled_dot_product_attention: scaled_dot_product_attention,
    F.gaussian_nll_loss: gaussian_nll_loss,
    Tensor.__setitem__: setitem,
    torch.lstm: recurrent(_lstm_cell),
    torch.gru: recurrent(_gru_cell),
    torch.rnn_tanh: recurrent(_plain_cell(torch.tanh)),
    torch.rnn_relu: recurrent(_plain_cell(torch.relu)),
}
"""What `vmap` does not know, or runs one example at a time."""


def expanded(func: Any, args: Any, kwargs: Any, handle: Callable[[Any, Any, Any], Any], as_written: bool) -> Any:
    """The output of a function by its expansion, whose calls are handed to handle; NotImplemented if it has none.

    as_written: without those that `vmap` needs.
    """
    key = str(func) if isinstance(func, torch._ops.OpOverloadPacket) else func
    if as_written and key is F.embedding_bag and kwargs.get("offsets", args[2] if len(args) > 2 else None) is not None:
        return NotImplemented  # for the offsets, not the places of the ids, make the examples
    expansion = _ALWAYS.get(key) or (None if as_written else FOR_VMAP.get(key) or COPIES.get(key))
    if expansion is None:
        return NotImplemented
    return expansion(lambda f, *a: handle(f, a, {}), *args, **kwargs)
