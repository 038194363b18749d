"""The command line of transformers, with every model that it loads accelerated.

python -m dskernels.integrations.transformers [--fp8] serve ...
"""

from __future__ import annotations

import importlib
import sys

from dskernels.integrations.transformers import accelerated


def main() -> None:
    """Run the transformers command that follows, inside `accelerated`."""
    fp8 = "--fp8" in sys.argv[1:]
    sys.argv = ["transformers", *(argument for argument in sys.argv[1:] if argument != "--fp8")]
    with accelerated(fp8=fp8):
        importlib.import_module("transformers.cli.transformers").main()


if __name__ == "__main__":
    main()
