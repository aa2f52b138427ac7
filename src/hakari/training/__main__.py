"""`torchrun --nproc-per-node N -m hakari.training FILE ...`: `hakari train` on more processes."""

import sys
from pkgutil import resolve_name

if __name__ == "__main__":
    # by name: this is the command line at work, which the package itself does not import
    resolve_name("hakari.cli:main")(["train", *sys.argv[1:]])
