"""The process that ncu and nsys look at; ``python -m resnet_fused profile ... --dry-run`` prints its command line.

It runs one step between cudaProfilerStart and cudaProfilerStop, in NVTX ranges, and writes to a file what they mean.
"""

from __future__ import annotations

import sys

from resnet_fused.cli.output import UsageError
from resnet_fused.profiling.capture import TARGET_SAYS, capture, cuda_profiler, parse_arguments
from resnet_fused.profiling.ranges import nvtx


def main(argv: list[str]) -> int:
    """Exit code 2 with one line on stderr where the input is wrong."""
    calls, job, block = parse_arguments(argv)
    try:
        capture(job, block, nvtx, cuda_profiler).write(calls)
    except UsageError as error:
        print(f"{TARGET_SAYS}{error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
