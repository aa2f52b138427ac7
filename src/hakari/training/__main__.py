"""`torchrun --nproc-per-node N -m hakari.training FILE ...`: `hakari train` on more processes."""

import sys

from hakari.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
