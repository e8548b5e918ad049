"""The command line ``coopflow``.

Exit codes: 0 done, 1 failed with one readable line, 2 bad usage, 130 interrupted, 141 nobody read
the output to its end.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import io
import json
import os
import select
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from coopflow_ext import Key, build_info, coop
from coopflow_ext.coop import pictures
from coopflow_ext.coop.config import (
    DEFAULT_PRESETS,
    PRESETS,
    RATES,
    START_NAMES,
    SettingType,
    TrainConfig,
    default_preset,
)
from coopflow_ext.coop.divergence import check_finite
from coopflow_ext.coop.judge import fd_table
from coopflow_ext.coop.lock import holding
from coopflow_ext.coop.ranks import process_group
from coopflow_ext.coop.study import experiments
from coopflow_ext.coop.study.ablate import Ablation, run_ablation, table
from coopflow_ext.coop.study.diagnose import diagnose_run
from coopflow_ext.coop.study.evaluate import evaluate_run
from coopflow_ext.coop.study.report import report_run

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
EXIT_UNREAD = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. Bad usage exits with 2, as argparse does."""
    _prepare_output()
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        with _plain_warnings():
            args.command(args)
        sys.stdout.flush()
    except KeyboardInterrupt as error:
        print(f"coopflow: {str(error) or 'interrupted'}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _is_unread():
            return EXIT_UNREAD
        if args.debug:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"coopflow: {message} (--debug shows the traceback)", file=sys.stderr)
        return EXIT_FAILED
    return 0


def _prepare_output() -> None:
    """A command does not fail for a letter that a terminal has not, nor where there is none."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 (while it runs)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _is_unread() -> bool:
    """Whether stdout is a pipe that nobody reads any more; what it still holds is dropped then,
    which would fail again when Python ends."""
    try:
        number = sys.stdout.fileno()
    except OSError:  # it is no file
        return False
    poll = select.poll()
    poll.register(number, 0)
    unread = any(event & select.POLLERR for _, event in poll.poll(0))
    if unread:
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return unread


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings as one readable line each, without the place in the code."""
    layout = warnings.formatwarning

    def one_line(message: Warning | str, category: type[Warning], *place: Any) -> str:
        if issubclass(category, UserWarning):
            return f"coopflow: warning: {' '.join(str(message).split())}\n"
        return layout(message, category, *place)

    warnings.formatwarning = one_line  # type: ignore[assignment]
    try:
        yield
    finally:
        warnings.formatwarning = layout


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="coopflow", description="Train CoopFlow, sample from it, judge it."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_sample(commands)
    _add_evaluate(commands)
    _add_experiments(commands)
    _add_diagnose(commands)
    report_parser = _add_command(commands, "report", "write a run as one HTML page", report)
    report_parser.add_argument("run", type=_path, help="a run folder")
    _add_ablate(commands)
    _add_import_official(commands)
    _add_bench(commands)
    _add_command(commands, "info", "versions, devices and how the native library was built", info)
    return parser


def _add_command(
    commands: Any, name: str, description: str, command: Callable[[argparse.Namespace], None]
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=description, description=description[0].upper() + description[1:] + "."
    )
    parser.set_defaults(command=command)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _path(text: str) -> Path:
    if not text:  # of a variable that is not set; a Path would take it for "."
        raise argparse.ArgumentTypeError("must name a file or folder, got ''")
    return Path(text)


def _add_number(parser: argparse.ArgumentParser, description: str, **options: Any) -> None:
    """How many of something.

    ``--n`` is an older spelling: torchrun refuses it as an abbreviation of several of its own
    options, although it stands behind the name of the module (argparse looks for abbreviations in
    all arguments, also in those left for the module). The same holds for ``--log`` and ``--start``
    of ``train``, which have second spellings for that.
    """
    parser.add_argument("-n", "--n-samples", "--n", dest="n", type=int, help=description, **options)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, …; default: a GPU if any"
    )


_MORE_SPELLINGS = {"n_samples": ("-n",), "start": ("--chain-start",)}


def _parser_of(setting: SettingType) -> Callable[[str], Any]:
    """argparse turns only some exceptions into a usage error."""

    def convert(text: str) -> Any:
        try:
            return setting.parse(text)
        except (ValueError, KeyError) as error:
            message = f"must be {setting.metavar}, got {text!r}"
            raise argparse.ArgumentTypeError(message) from error

    return convert


def _add_train(commands: Any) -> None:
    parser = _add_command(commands, "train", "train a CoopFlow and leave a run folder", train)
    parser.add_argument("--out", required=True, type=_path, help="the run folder")
    parser.add_argument(
        "--preset", choices=PRESETS, help=f"settings to start from; by default {DEFAULT_PRESETS}"
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        choices=("auto",),
        metavar="auto",
        help="continue the run in --out; of the settings only --steps and the rates may change; "
        "auto: where there is none yet, begin it",
    )
    parser.add_argument("--lr", type=float, help=f"Adam's rates in one: {', '.join(RATES)}")
    parser.add_argument(
        "--log-to", "--log", dest="log", choices=("tensorboard",), help="also write RUN/tensorboard"
    )
    _add_device(parser)
    settings = parser.add_argument_group("settings, in place of those of the preset")
    for field in dataclasses.fields(TrainConfig):
        kind = SettingType.of(str(field.type))
        options = [*_MORE_SPELLINGS.get(field.name, ()), "--" + field.name.replace("_", "-")]
        common: dict[str, Any] = {
            "dest": field.name,
            "default": argparse.SUPPRESS,
            "help": field.metadata["help"],
        }
        if field.default is False:
            switch = argparse.BooleanOptionalAction
            settings.add_argument(*options, action=switch, **common)
            continue
        settings.add_argument(
            *options,
            type=_parser_of(kind),
            nargs=kind.words,
            metavar=kind.metavar,
            **common,
        )


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given on the command line."""
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    given = {name: value for name, value in vars(args).items() if name in names}
    if args.lr is not None:
        given = {**dict.fromkeys(RATES, args.lr), **given}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}


def train(args: argparse.Namespace) -> None:
    """``coopflow train``."""
    given = _settings(args)
    # Asked before a group of processes waits for its last, and so before one of them makes the run.
    is_run = (args.out / "config.json").exists()
    resume = args.resume is True or (args.resume == "auto" and is_run)
    if resume:
        run = coop.RunFolder.open(args.out)
        if args.preset:
            config = TrainConfig.from_dict({"preset": args.preset, **given})
        else:
            config = dataclasses.replace(run.config, **given)
    else:
        preset = args.preset or default_preset(given.get("data", "digits"))
        config = TrainConfig.from_dict({"preset": preset, **given})
    with process_group(_device(args.device)) as device:
        summary = coop.train(config, args.out, resume=resume, device=device, log=args.log)
    if not summary:
        return
    print(
        f"trained {summary['pretrain_steps']} + {summary['steps']} steps in "
        f"{summary['seconds']:.0f} s ({summary['iterations_per_second']:.1f}/s)"
    )
    print(fd_table(summary["fd"], summary["start_of_chains"]))
    print(f"picture: {args.out / summary['picture']}  curves: {args.out / 'curves.png'}")
    print(f"all of it as one page: coopflow report {shlex.quote(str(args.out))}")


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu, cuda, cuda:1, … or auto, got {name!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be one that this torch can use, got {name!r}: no CUDA here")
    return name


def _add_sample(commands: Any) -> None:
    parser = _add_command(commands, "sample", "draw samples from a run into a picture", sample)
    parser.add_argument("run", type=_path, help="a run folder or a checkpoint")
    _add_number(parser, "how many (default 64)", default=64)
    parser.add_argument("--out", type=_path, required=True, help="PNG, or .npy for the numbers")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples (default 0)")
    _add_device(parser)


def sample(args: argparse.Namespace) -> None:
    """``coopflow sample``."""
    if args.out.suffix not in (".png", ".npy"):
        raise ValueError(f"out must end in .png or .npy, got {args.out}")
    if not args.out.parent.is_dir():
        raise FileNotFoundError(f"out must be in a folder that exists, got {args.out}")
    model = coop.CoopFlow.load(args.run, device=_device(args.device))
    proposals, results = model.sample_pairs(args.n, Key(args.seed))
    start = START_NAMES[model.config.start if model.config else "flow"]
    if args.out.suffix == ".npy":
        pictures.save_array(args.out, results)
    else:
        pictures.save_panels(args.out, {start: proposals, "after Langevin": results})
    print(f"{args.n} samples: {args.out}")


def _add_evaluate(commands: Any) -> None:
    parser = _add_command(commands, "evaluate", "measure a run", evaluate)
    parser.add_argument("run", type=_path, help="a run folder")
    _add_number(parser, "samples; default as in the run's settings")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples (default 0)")
    parser.add_argument("--fid", action="store_true", help="also the FID with Inception features")
    parser.add_argument(
        "--fid-stats",
        type=_path,
        metavar="FILE",
        help="the FID against these statistics (.npz with mu and sigma, as pytorch-fid writes them)"
        " instead of the training images",
    )
    parser.add_argument("--export-png", type=_path, metavar="DIR", help="write the samples as PNG")
    parser.add_argument(
        "--export-training", type=_path, metavar="DIR", help="write the training images as PNG"
    )
    _add_device(parser)


def evaluate(args: argparse.Namespace) -> None:
    """``coopflow evaluate``."""
    summary = evaluate_run(
        args.run,
        n=args.n,
        seed=args.seed,
        inception=args.fid,
        fid_stats=args.fid_stats,
        export_png=args.export_png,
        export_training=args.export_training,
        device=_device(args.device),
    )
    print(json.dumps(summary, indent=2))
    print(f"pictures: {args.run / 'evaluation'}", file=sys.stderr)


_EXPERIMENTS = {
    "reconstruct": "reconstruct held-out images by searching the start of the chain",
    "inpaint": "fill a hole in held-out images",
    "interpolate": "walk between images in the flow's latent space",
}


def _add_experiments(commands: Any) -> None:
    for name, description in _EXPERIMENTS.items():
        parser = _add_command(commands, name, description, experiment)
        parser.set_defaults(experiment=name)
        parser.add_argument("run", type=_path, help="a run folder")
        default = inspect.signature(getattr(experiments, f"{name}_run")).parameters["n"].default
        _add_number(parser, f"how many images (default {default})")
        parser.add_argument("--seed", type=int, help="seed of the chains' starts (default 0)")
        parser.add_argument(
            "--step-size",
            type=float,
            metavar="δ",
            help="of the chain; default: that of the run's training, 0.03 in the paper",
        )
        _add_device(parser)
        if name == "inpaint":
            parser.add_argument("--chains", type=int, help="fillings of each image (default 4)")
            parser.add_argument("--mask", type=_path, help=".npy, bool (H, W), True where known")
        if name == "interpolate":
            parser.add_argument("--points", type=int, help="points of a line (default 21)")


def experiment(args: argparse.Namespace) -> None:
    """``coopflow reconstruct``, ``inpaint`` and ``interpolate``."""
    names = ("n", "seed", "step_size", "chains", "mask", "points")
    options = {name: getattr(args, name, None) for name in names}
    given = {name: value for name, value in options.items() if value is not None}
    run = getattr(experiments, f"{args.experiment}_run")
    results = run(args.run, device=_device(args.device), **given)
    results.pop("errors", None)
    print(json.dumps(results, indent=2))


def _add_diagnose(commands: Any) -> None:
    parser = _add_command(
        commands, "diagnose", "moment gap, drift of the proposals and long chains", diagnose
    )
    parser.add_argument("run", type=_path, help="a run folder")
    _add_number(parser, "chains (default 200)", default=200)
    parser.add_argument(
        "--long",
        type=int,
        nargs="+",
        default=[10, 100],
        metavar="K",
        help="lengths of the long chains in multiples of T (default 10 100)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the chains (default 0)")
    _add_device(parser)


def diagnose(args: argparse.Namespace) -> None:
    """``coopflow diagnose``."""
    summary = diagnose_run(
        args.run,
        n=args.n,
        factors=tuple(args.long),
        seed=args.seed,
        device=_device(args.device),
    )
    print(json.dumps(summary, indent=2))


def report(args: argparse.Namespace) -> None:
    """``coopflow report``."""
    print(f"report: {report_run(args.run)}")


def _add_ablate(commands: Any) -> None:
    parser = _add_command(
        commands, "ablate", "train a list of settings with several seeds and compare them", ablate
    )
    parser.add_argument("--configs", type=_path, required=True, help="JSON: seeds, base, rows")
    parser.add_argument("--out", type=_path, required=True, help="folder of the runs and the table")
    _add_device(parser)


def ablate(args: argparse.Namespace) -> None:
    """``coopflow ablate``."""
    rows = run_ablation(Ablation.read(args.configs), args.out, device=_device(args.device))
    print(table(rows), end="")
    print(f"table: {args.out / 'table.md'}  plot: {args.out / 'ablation.png'}")


def _add_import_official(commands: Any) -> None:
    parser = _add_command(
        commands,
        "import-official",
        "turn a checkpoint of the authors' published code into a run",
        import_official,
    )
    parser.add_argument("checkpoint", type=_path, help="the file with flow_net and ebm_net")
    parser.add_argument("--out", required=True, type=_path, help="the run folder")
    parser.add_argument(
        "--preset", choices=PRESETS, default="cifar10", help="settings of the chain and the data"
    )
    parser.add_argument(
        "--image-shape", type=_image_shape, default=(3, 32, 32), help="C,H,W; default: 3,32,32"
    )
    parser.add_argument(
        "--dropout", type=float, default=0.2, help="of the flow when it trains on (default 0.2)"
    )


def _image_shape(text: str) -> tuple[int, int, int]:
    try:
        channels, height, width = map(int, text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not C,H,W") from error
    return channels, height, width


def import_official(args: argparse.Namespace) -> None:
    """``coopflow import-official``."""
    coop.RunFolder.check_free(args.out)
    model = coop.CoopFlow.from_official(
        args.checkpoint, args.image_shape, preset=args.preset, dropout=args.dropout
    )
    assert model.config is not None
    check_finite(model.state_dict())
    with holding(args.out):
        run = coop.RunFolder.create(args.out, model.config)
        run.save(0, model.state_dict(), model.metadata())
    run_folder = shlex.quote(str(args.out))
    print(f"{args.out}: sample from it with `coopflow sample {run_folder} --out samples.png`")


def _add_bench(commands: Any) -> None:
    parser = _add_command(commands, "bench", "measure this package against plain PyTorch", bench)
    parser.add_argument("--quick", action="store_true", help="few cases, without torch.compile")
    parser.add_argument("--out", type=_path, metavar="DIR", help="results.json, table.md and plots")
    parser.add_argument(
        "--case", action="append", default=[], metavar="PATTERN", help="such as 'langevin/*'"
    )
    parser.add_argument("--resume", action="store_true", help="add what the results in --out lack")
    _add_device(parser)


def bench(args: argparse.Namespace) -> None:
    """``coopflow bench``."""
    if args.resume and args.out is None:
        raise ValueError("--resume must be given with the --out that has results, got none")
    package = Path(__file__).resolve().parent
    folder = package / "_benchmarks"  # setup.py puts them there
    if not folder.is_dir():
        folder = package.parent / "benchmarks"  # an editable install
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    suite = importlib.import_module("suite")
    results = suite.run(_device(args.device), args.quick, args.out, args.case, args.resume)
    if args.out is not None:
        importlib.import_module("report").write(results, args.out)
        print(f"results: {args.out}")
    if failed := suite.failures(results):
        raise RuntimeError(failed)


def info(args: argparse.Namespace) -> None:
    """``coopflow info``."""
    for name, value in build_info().items():
        print(f"{name}: {value}")
