"""The ``onepass`` command: info, demo, bench."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from onepass import bench, demo


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line (default: ``sys.argv``) and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="onepass", description="Exact attention in one pass over the keys: information, demonstration, benchmarks."
    )
    commands = parser.add_subparsers(metavar="command", required=True)
    info = commands.add_parser("info", help="version, backends, instruction set or GPU, build")
    info.set_defaults(run=_info)
    demo.add_parser(commands)
    bench.add_parser(commands)
    parsed = parser.parse_args(arguments)
    status: int = parsed.run(parsed)
    return status


def _info(_: argparse.Namespace) -> int:
    import onepass

    print(onepass.info())
    return 0
