"""``python -m resnet_fused``."""

from __future__ import annotations

import sys

from resnet_fused.cli import main

if __name__ == "__main__":
    sys.exit(main())
