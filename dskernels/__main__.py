"""``python -m dskernels``: the command `dskernels`."""

from dskernels.cli import main

if __name__ == "__main__":
    main()
