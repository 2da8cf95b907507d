"""What campaigns share: how they go on from case to case, how a difference ends them, and what they compare."""

import argparse
import sys
import time

import quantization


class MismatchError(Exception):
    """The first difference found."""


def available_isas():
    """Names of the instruction sets that this machine has, scalar C first."""
    return [entry["name"] for entry in reversed(quantization._C.isas()) if entry["available"]]


def go_on(name, doc, check, arguments=None, quick_cases=None):
    """Check case after case until the time is over, or so many with --quick; return how many there were.

    ``check(seed, i)`` checks the i-th case of a seed. A MismatchError of it ends the campaign with exit status 1, and
    what reproduces it is printed.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="how long to go on (default 60)")
    if quick_cases:
        parser.add_argument("--quick", action="store_true", help=f"{quick_cases} cases instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="case to begin with, to reproduce one")
    options = parser.parse_args(arguments)
    quick = quick_cases and options.quick
    end, i = time.monotonic() + options.seconds, options.first
    try:
        while i < options.first + quick_cases if quick else i == options.first or time.monotonic() < end:
            check(options.seed, i)
            i += 1
    except MismatchError as difference:
        sys.exit(f"{name}: --seed {options.seed} --first {i}: {difference}")
    return i - options.first
