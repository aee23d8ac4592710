"""The command line: ``python -m resnet_fused {info,check,bench,...}``, also installed as ``resnet-fused``.

Exit codes: 0 all is well, 1 a comparison failed, 2 wrong input (one line on stderr that says what to change), 3 a
profiler is missing or not allowed, 130 interrupted. Results go to stdout, progress to stderr; with ``--json`` stdout is
one JSON document.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from resnet_fused import config
from resnet_fused.cli import bench, check, demo, info, profile, report, tune
from resnet_fused.cli.output import Output, UsageError

__all__ = ["main"]

_COMMANDS = (info, demo, check, bench, profile, report, tune)
_EXAMPLES = """\
examples:
  %(prog)s info                        versions, GPU, extension, which backend runs each operation
  %(prog)s demo                        photographs, errors, speed and a training run, in about two minutes
  %(prog)s check resnet50              errors of outputs and gradients against fp64, beside PyTorch's own
  %(prog)s bench resnet50 --batch 8    times beside eager PyTorch and torch.compile
  %(prog)s profile resnet50            every kernel of a step against the bytes and FLOPs that its op needs
  %(prog)s tune                        the fastest kernels for this GPU, measured
  %(prog)s report                      tables and plots of the committed benchmark results
  %(prog)s COMMAND --help              the options of one command
"""


class _Parser(argparse.ArgumentParser):
    """Answers wrong input in one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see `{self.prog} --help`")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="resnet-fused" if not sys.argv[0].endswith("__main__.py") else "python -m resnet_fused",
        description="Fused residual blocks for PyTorch.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    for module in _COMMANDS:
        name = module.__name__.rpartition(".")[2]
        sub = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=module.DESCRIPTION,
            epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.add_argument("--json", action="store_true", help="print one JSON document on stdout instead of tables")
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; None means ``sys.argv[1:]``.
    Returns:
        The exit code, see the top of this file.
    """
    name = "resnet-fused"
    try:
        parser = _parser()
        args = parser.parse_args(argv)
        name = f"{parser.prog} {args.command}"
        try:
            config.backend()
        except ValueError as error:
            raise UsageError(str(error)) from error
        return args.run(args, Output(json_mode=args.json))
    except UsageError as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except SystemExit as stop:  # argparse, after --help
        return int(stop.code or 0)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of stdout went away (`| head`); Python would complain about it at exit
        return 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
