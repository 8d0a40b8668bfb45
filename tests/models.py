"""One table of models that nobody here wrote, small and randomly initialised. A new architecture adds a row."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.func import functional_call

from ekfac_func.types import LossFn, Params

from .cases import Case

N = 3  # examples of a batch
TOKENS = 24  # size of a vocabulary
LENGTH = 5  # tokens of a sequence


def case(
    net: nn.Module, loss: Callable[[Any, Any], Tensor], batch: Callable[[int], Any], bare: tuple[str, ...] = ()
) -> Case:
    """A case of a module: `loss(call, example)` calls it as its user would, without parameters.

    Every parameter of two axes or more must be read by a rule, but for those whose name ends in one of `bare`.
    """
    net = net.double()
    params = {name: p.detach().clone() for name, p in net.named_parameters()}
    ruled = {name for name, p in params.items() if p.dim() > 1 and not name.endswith(bare)}

    def loss_fn(params: Params, example: Any) -> Tensor:
        return loss(lambda *args, **kwargs: functional_call(net, params, args, kwargs), example)

    return Case(loss_fn, params, batch, frozenset(ruled))


def sentences(n: int) -> dict[str, Tensor]:
    """Token ids, padded at the end, the mask of what counts, and labels that leave the padding out."""
    ids = torch.randint(3, TOKENS, (n, LENGTH))
    mask = (torch.arange(LENGTH) < LENGTH - torch.arange(n)[:, None] % 3).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.where(mask > 0, ids, -100)}


def classified(n: int) -> dict[str, Tensor]:
    return {**sentences(n), "labels": torch.randint(0, 3, (n,))}


def translated(n: int) -> dict[str, Tensor]:
    return {**sentences(n), "labels": sentences(n)["labels"]}


def images(n: int, channels: int, size: int) -> Any:
    return torch.randn(n, channels, size, size), torch.randint(0, 3, (n,))


def own_loss(call: Any, example: dict[str, Tensor]) -> Tensor:
    """The loss of a model of `transformers`, on a batch of one."""
    return call(**{key: value[None] for key, value in example.items()}).loss


def next_token_loss(call: Any, example: dict[str, Tensor]) -> Tensor:
    """The loss of a causal language model, from its logits: its own loss rounds them to float32."""
    logits = call(input_ids=example["input_ids"][None], attention_mask=example["attention_mask"][None], use_cache=False)
    return F.cross_entropy(logits.logits[0, :-1], example["labels"][1:], ignore_index=-100)


def prepared_loss(call: Any, example: dict[str, Tensor]) -> Tensor:
    """`own_loss` of a model that reads both ways, the mask prepared for its attention: no value of it is read."""
    return own_loss(call, {**example, "attention_mask": additive(example["attention_mask"])[None, None]})


def additive(mask: Tensor) -> Tensor:
    """Zero where the mask is 1, and what no softmax sees where it is 0."""
    zero = torch.zeros(mask.shape)
    return zero.masked_fill(mask == 0, torch.finfo(zero.dtype).min)


def cross_entropy(call: Any, example: Any) -> Tensor:
    x, y = example
    return F.cross_entropy(call(x[None]), y[None])


def gpt2(attention: str = "eager") -> Case:
    """Linear layers as `addmm`, a tied head."""
    config = transformers.GPT2Config(
        vocab_size=TOKENS,
        n_positions=8,
        n_embd=8,
        n_layer=2,
        n_head=2,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation=attention,
    )
    return case(transformers.GPT2LMHeadModel(config).eval(), next_token_loss, sentences)


def llama(attention: str = "eager") -> Case:
    """RMSNorm, rotary positions, grouped-query attention, SwiGLU.

    With its default attention, "sdpa", the model asks whether a mask of padding masks anything: a value of the batch.
    """
    config = transformers.LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        attn_implementation=attention,
    )
    return case(transformers.LlamaForCausalLM(config).eval(), next_token_loss, sentences)


def bert(loss: Callable[[Any, Any], Tensor] = prepared_loss) -> Case:
    """Classification; a plain mask of padding makes the model read its values, whatever the attention."""
    config = transformers.BertConfig(
        vocab_size=TOKENS,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        num_labels=3,
    )
    return case(transformers.BertForSequenceClassification(config).eval(), loss, classified)


def vit() -> Case:
    config = transformers.ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=3,
    )

    def loss(call: Any, example: Any) -> Tensor:
        x, y = example
        return call(pixel_values=x[None], labels=y[None]).loss

    return case(
        transformers.ViTForImageClassification(config).eval(),
        loss,
        lambda n: images(n, 3, 8),
        ("cls_token", "position_embeddings"),
    )


def t5() -> Case:
    """Encoder and decoder, relative positions, one tied table of tokens."""
    config = transformers.T5Config(
        vocab_size=TOKENS,
        d_model=8,
        d_kv=4,
        d_ff=12,
        num_layers=2,
        num_heads=2,
        relative_attention_num_buckets=8,
        decoder_start_token_id=0,
        use_cache=False,
        attn_implementation="eager",
    )
    return case(transformers.T5ForConditionalGeneration(config).eval(), prepared_loss, translated)


def mixtral(experts: str | None = None) -> Case:
    """A mixture of experts with stacked weights: as shipped by `F.grouped_mm` of the tokens, sorted by expert.

    The implementation "batched_mm" gathers the weights of each token for one `bmm`; "eager" loops over the experts
    that a token met: a branch on values.
    """
    config = transformers.MixtralConfig(
        vocab_size=TOKENS,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=16,
        attn_implementation="eager",
        experts_implementation=experts,
    )
    bare = ("",) if experts == "eager" else ()
    return case(transformers.MixtralForCausalLM(config).eval(), next_token_loss, sentences, bare)


def mamba() -> Case:
    config = transformers.MambaConfig(
        vocab_size=TOKENS, hidden_size=8, state_size=4, num_hidden_layers=2, time_step_rank=3, conv_kernel=3
    )
    return case(transformers.MambaForCausalLM(config).eval(), next_token_loss, sentences, ("A_log",))


class Translator(nn.Module):
    """`nn.Transformer` between two tables of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(TOKENS, 8, padding_idx=0), nn.Embedding(TOKENS, 8, padding_idx=0)
        self.transformer = nn.Transformer(8, 2, 2, 2, 12, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, TOKENS)

    def forward(self, source: Tensor, target: Tensor, padding: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        hidden = self.transformer(
            self.source(source),
            self.target(target),
            tgt_mask=causal,
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
            tgt_is_causal=True,
        )
        return self.head(hidden)


def transformer(training: bool = True) -> Case:
    """`nn.Transformer` without dropout; in eval() its encoder alone would take a fused path."""

    def loss(call: Any, example: dict[str, Tensor]) -> Tensor:
        ids, labels = example["input_ids"][None], example["labels"][None]
        padding = additive(example["attention_mask"])[None]
        logits = call(ids, ids.roll(1, dims=1), padding)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)

    return case(Translator().train(training), loss, translated)


class Recurrent(nn.Module):
    """A language model of an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.lstm = nn.Embedding(TOKENS, 8), nn.LSTM(8, 8, 2, batch_first=True)
        self.head = nn.Linear(8, TOKENS)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.table(ids))[0])


def lstm() -> Case:
    """A recurrent net, for whose function vmap has no rule."""

    def loss(call: Any, example: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(call(example["input_ids"][None])[0, :-1], example["labels"][1:], ignore_index=-100)

    return case(Recurrent(), loss, sentences)


def norm(channels: int) -> nn.Module:
    """A BatchNorm that has seen something."""
    layer = nn.BatchNorm2d(channels)
    layer.running_mean = torch.randn(channels)
    layer.running_var = 0.5 + torch.rand(channels)
    return layer


class Residual(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), norm(c_out), nn.ReLU(inplace=True))
        self.second = nn.Sequential(nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False), norm(c_out))
        self.skip = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), norm(c_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + self.skip(x))


def residual_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        norm(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        Residual(4, 4, 1),
        Residual(4, 8, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def resnet() -> Case:
    return case(residual_net().eval(), cross_entropy, lambda n: images(n, 3, 8))


class UNet(nn.Module):
    """Down by pooling and by stride, up by a transposed convolution and by interpolation, with skips."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = self.block(2, 4), self.block(4, 8)
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1, output_padding=1)
        self.last, self.wide = self.block(16, 4), nn.ConvTranspose2d(4, 4, 4, stride=2, padding=1, bias=False)
        self.head = nn.Conv2d(8, 3, 1)

    @staticmethod
    def block(c_in: int, c_out: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1), nn.GroupNorm(2, c_out), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.second(F.avg_pool2d(x, 2))
        z = self.last(torch.cat([y, self.up(self.down(y))], dim=1))
        return self.head(torch.cat([x, self.wide(z) + F.interpolate(z, scale_factor=2.0, mode="nearest")], dim=1))


def unet() -> Case:
    """A segmentation, some pixels without a label."""

    def loss(call: Any, example: Any) -> Tensor:
        x, y = example
        return F.cross_entropy(call(x[None]), y[None], ignore_index=255)

    def batch(n: int) -> Any:
        labels = torch.randint(0, 3, (n, 8, 8))
        return torch.randn(n, 2, 8, 8), labels.masked_fill(torch.rand(n, 8, 8) < 0.1, 255)

    return case(UNet(), loss, batch)


class Inverted(nn.Module):
    """An inverted residual block of MobileNet: expand, depthwise, squeeze and excite, project."""

    def __init__(self, c: int, wide: int) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(c, wide, 1, bias=False), norm(wide), nn.ReLU6(inplace=True))
        self.depthwise = nn.Sequential(
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False), norm(wide), nn.Hardswish()
        )
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(wide, 4, 1), nn.ReLU(), nn.Conv2d(4, wide, 1), nn.Hardsigmoid()
        )
        self.project = nn.Sequential(nn.Conv2d(wide, c, 1, bias=False), norm(c))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.expand(x))
        return x + self.project(y * self.gate(y))


def mobilenet() -> Case:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False),
        norm(4),
        nn.Hardswish(),
        Inverted(4, 8),
        Inverted(4, 8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(4, 3),
    )
    return case(net.eval(), cross_entropy, lambda n: images(n, 3, 8))


class GraphNet(nn.Module):
    """Graph convolutions in plain matmuls: a normalised adjacency, features, a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.randn(shape) / 2) for shape in ((4, 8), (8, 3)))
        self.bias = nn.Parameter(torch.randn(8) / 2)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        degree = edges.sum(-1).rsqrt()
        spread = degree[:, None] * edges * degree
        hidden = torch.relu(spread @ nodes @ self.first + self.bias)
        return spread @ torch.matmul(hidden, self.second)


def graph() -> Case:
    def loss(call: Any, example: Any) -> Tensor:
        nodes, edges, labels = example
        return F.cross_entropy(call(nodes, edges), labels, ignore_index=-1)

    def batch(n: int) -> Any:
        edges = (torch.rand(n, 6, 6) < 0.4).to(torch.get_default_dtype())
        edges = ((edges + edges.mT + torch.eye(6)) > 0).to(edges.dtype)
        return torch.randn(n, 6, 4), edges, torch.randint(-1, 3, (n, 6))

    return case(GraphNet(), loss, batch)


def pure() -> Case:
    """A mixer of tokens and channels, written as a pure function of a dict of matrices."""
    shapes = {"in": (4, 8), "tokens": (LENGTH, LENGTH), "channels": (8, 8), "out": (3, 8), "scale": (8,), "shift": (8,)}
    params = {name: torch.randn(shape) / 2 for name, shape in shapes.items()}

    def loss_fn(params: Params, example: Any) -> Tensor:
        x, y = example
        h = torch.tanh(x @ params["in"])
        h = h + torch.einsum("st,ti->si", params["tokens"], h)
        h = F.layer_norm(h, (8,), params["scale"], params["shift"])
        h = h + F.gelu(torch.mm(h, params["channels"].T))
        return F.cross_entropy(h.mean(0) @ params["out"].t(), y)

    def batch(n: int) -> Any:
        return torch.randn(n, LENGTH, 4), torch.randint(0, 3, (n,))

    return Case(loss_fn, params, batch, frozenset({"in", "tokens", "channels", "out", "scale", "shift"}))


MODELS: dict[str, Callable[[], Case]] = {
    "gpt2": gpt2,
    "gpt2 as shipped": lambda: gpt2("sdpa"),
    "llama": llama,
    "llama as shipped": lambda: llama("sdpa"),
    "bert": bert,
    "bert as shipped": lambda: bert(own_loss),
    "vit": vit,
    "t5": t5,
    "mixtral": mixtral,
    "mixtral by bmm": lambda: mixtral("batched_mm"),
    "mixtral in a loop": lambda: mixtral("eager"),
    "mamba": mamba,
    "transformer": transformer,
    "transformer eval": lambda: transformer(training=False),
    "lstm": lstm,
    "resnet": resnet,
    "unet": unet,
    "mobilenet": mobilenet,
    "graph": graph,
    "pure": pure,
}
UNCOMPILED = {"mixtral in a loop"}  # vmap cannot run it, so neither can a compiled step
TWINS = {"mixtral": "mixtral in a loop"}  # the same function, where an example alone has no kernel in float64


def make(name: str) -> Case:
    torch.manual_seed(sum(map(ord, name)))
    return MODELS[name]()


def plain(name: str) -> LossFn:
    """The loss as a loop over the examples can run it."""
    return make(TWINS.get(name, name)).loss_fn
