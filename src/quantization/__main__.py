"""Command line: ``python -m quantization demo | report | convert | rates | bench | info``.

Errors are one line on stderr and exit status 2.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from . import _convert, _extras, _formats, _rates, _report, show_config
from ._bench import run as _bench


def _bar(label: str) -> Callable[[Sequence[Any]], Iterable[Any]]:
    """Show a progress bar on stderr if that is a terminal and tqdm is there; otherwise nothing."""

    def wrap(items: Sequence[Any]) -> Iterable[Any]:
        try:
            tqdm = _extras.require("tqdm", "io")
        except ImportError:
            return items
        bar: Iterable[Any] = tqdm.tqdm(items, desc=label, leave=False, disable=None)
        return bar

    return wrap


def _run_demo(arguments: argparse.Namespace) -> None:
    given = {name: value for name in _ONLY_OF if (value := getattr(arguments, name))}
    for name in given:
        if _ONLY_OF[name] != arguments.which:
            raise ValueError(f"demo {arguments.which}: --{name} is an option of demo {_ONLY_OF[name]}")
    options = {**given, "model": arguments.model, "formats": arguments.format, "progress": _bar("demo")}
    if options.pop("kv", False):
        from ._demo import kv

        for name in ("prompt", "formats"):
            if options.pop(name, None):
                raise ValueError(f"demo smollm2 --kv: --{name.removesuffix('s')} does not go with --kv")
        kv.run(sys.stdout, **options)
    elif arguments.which == "smollm2":
        from ._demo import generate

        generate.run(sys.stdout, **options)
    else:
        from ._demo import compare

        compare.run(sys.stdout, **options)


# Options of one of the demo's models, and which.
_ONLY_OF = {"query": "minilm", "layers": "minilm", "plot": "minilm", "prompt": "smollm2", "kv": "smollm2"}


def _run_report(arguments: argparse.Namespace) -> None:
    formats = list(arguments.format or ())
    if arguments.bits or arguments.group_size:
        formats += [("affine", bits, group) for bits in arguments.bits or [4] for group in arguments.group_size or [64]]
    result = _report.report_file(
        arguments.file,
        formats or None,
        scale_dtype=arguments.scale_dtype,
        profile=arguments.profile,
        progress=_bar("report"),
    )
    print(str(result))
    if arguments.plot:
        result.plot(arguments.plot)


def _run_convert(arguments: argparse.Namespace) -> None:
    wanted = (arguments.mode, arguments.bits, arguments.group_size)
    done = _convert.convert(
        arguments.source,
        arguments.target,
        _formats.as_format(wanted),
        overrides=dict(map(_convert.parse_override, arguments.override or ())),
        dtype=arguments.dtype,
        profile=arguments.profile,
        progress=_bar("convert"),
    )
    for name in dict.fromkeys(str(found) for found in done.formats.values() if found):
        print(f"{name}: {sum(str(found) == name for found in done.formats.values())} matrices")
    if done.skipped:
        print(_report.skipped_text(done.skipped, "not quantized"))
    print(f"{arguments.target}: {done.nbytes / 1e6:.1f} MB, {8 * done.nbytes / max(1, done.weights):.2f} bits/weight")


def _run_rates(arguments: argparse.Namespace) -> None:
    _rates.run(sys.stdout, arguments.head_dim, arguments.vectors, arguments.plot)


def _run_bench(arguments: argparse.Namespace) -> int:
    if arguments.restart:
        _bench.machine.restart_with_blas_environment()
    options = _bench.options_of(arguments)
    met = _bench.run(sys.stdout, options, gates=arguments.gates, json=arguments.json, picture=arguments.plot)
    return 1 if arguments.strict and not met else 0


def _run_info(_: argparse.Namespace) -> None:
    print(show_config())


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers such as 4 or 4,8, got {text!r}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m quantization", description="Low-bit quantization of NumPy arrays.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="a real model in every format: size, error, quality, speed")
    demo.add_argument("which", nargs="?", choices=("minilm", "smollm2"), default="minilm", help="default: minilm")
    demo.add_argument(
        "--model",
        metavar="PATH",
        help="folder with model.safetensors, tokenizer.json and config.json (minilm), or GGUF file (smollm2)",
    )
    demo.add_argument("--query", metavar="TEXT", help="minilm: sentence to answer from the 50 of the demo")
    demo.add_argument("--layers", action="store_true", help="minilm: list every matrix at 4 bits, worst first")
    demo.add_argument("--prompt", metavar="TEXT", help="smollm2: what to ask")
    demo.add_argument("--kv", action="store_true", help="smollm2: keys and values in few bits instead of the weights")
    demo.set_defaults(run=_run_demo)

    report = commands.add_parser("report", help="bits per weight and error of every tensor of a file")
    report.add_argument("file", metavar="FILE", help=".npz, .npy or .safetensors")
    report.add_argument("--bits", type=_integers, metavar="N,…", help="widths of affine formats (default: 4)")
    report.add_argument("--group-size", type=_integers, metavar="N,…", help="their group sizes (default: 64)")
    report.add_argument(
        "--scale-dtype",
        choices=("float16", "bfloat16", "float32"),
        help="type of stored scales and biases (default: that of the tensor)",
    )
    _add_profile(report)
    report.set_defaults(run=_run_report)

    _add_convert(commands)
    rates = commands.add_parser("rates", help="bits and error of the key-value codecs beside theory")
    rates.add_argument("--head-dim", type=int, default=256, metavar="D", help="length of a vector (default: 256)")
    rates.add_argument("--vectors", type=int, default=10000, metavar="N", help="how many of them (default: 10000)")
    rates.set_defaults(run=_run_rates)
    for command in (demo, report):
        command.add_argument(
            "--format",
            action="append",
            metavar="NAME",
            help="a format such as affine_4_g64; may be given several times",
        )
    for command in (demo, report, rates):
        command.add_argument("--plot", metavar="FILE", help="also draw it (.png, .svg, .pdf)")
    bench = commands.add_parser("bench", help="kernels and peers beside the ceilings of this machine")
    _bench.add_arguments(bench)
    bench.set_defaults(run=_run_bench)
    info = commands.add_parser("info", help="versions, CPU features, chosen kernels, threads")
    info.set_defaults(run=_run_info)
    return parser


def _add_convert(commands: Any) -> None:
    convert = commands.add_parser("convert", help="a float model folder to a quantized one that mlx-lm reads")
    convert.add_argument("source", metavar="SRC", help="folder with config.json and safetensors files")
    convert.add_argument("target", metavar="DST", help="folder to make; a run that was stopped goes on where it was")
    modes = dict.fromkeys(f.mode for f in _formats.known_formats())
    convert.add_argument("--mode", "--q-mode", choices=tuple(modes), default="affine", help="default: affine")
    convert.add_argument("--bits", "--q-bits", type=int, metavar="N", help="default: 4, or what the mode has")
    convert.add_argument(
        "--group-size", "--q-group-size", type=int, metavar="N", help="default: 64, or what the mode has"
    )
    convert.add_argument(
        "--override",
        action="append",
        metavar="PATTERN=FORMAT",
        help="another format for layers whose name fits, such as '*.down_proj=affine_6_g64', or false to leave them; "
        "may be given several times, the last that fits counts",
    )
    convert.add_argument(
        "--dtype", choices=("float16", "bfloat16", "float32"), help="round floats to this first (default: as they are)"
    )
    _add_profile(convert)
    convert.set_defaults(run=_run_convert)


def _add_profile(command: argparse.ArgumentParser) -> None:
    command.add_argument("--profile", choices=("metal", "cpu"), default="metal", help="MLX backend whose codes to make")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status."""
    arguments = _parser().parse_args(argv)
    arguments.restart = argv is None  # only a process that is ours may become another one
    try:
        status: int | None = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (head, less) has gone. Python flushes stdout again at exit: give it somewhere to flush to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE, what a shell reports of a program that the signal ended
    except KeyboardInterrupt:
        return 130  # 128 + SIGINT
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"quantization: error: {error}", file=sys.stderr)
        return 2
    return status or 0


if __name__ == "__main__":
    sys.exit(main())
