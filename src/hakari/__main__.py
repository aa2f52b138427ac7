"""`python -m hakari`: the same as the command `hakari`."""

from hakari.cli import main

if __name__ == "__main__":
    main()
