"""How far a fit has come that reads its data several times, so that Ctrl-C loses nothing of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from hakari.inference.bidirectional.rows import Rows

Blocks = Callable[[], Iterator[Rows]]


@dataclass(frozen=True)
class Readings:
    """done: whole readings. blocks, rows: of the next, that are in its sums.

    total: rows of a whole reading, 0 before there was one. first: SHA-256 of the first block.
    """

    done: int = 0
    blocks: int = 0
    rows: int = 0
    total: int = 0
    first: str = ""

    def where(self, of: int) -> str:
        """How far a fit of so many readings has come, in words."""
        return (
            f"the fit was interrupted in reading {self.done + 1} of {of}, after {self.rows:,} rows"
        )

    def rest(self, blocks: Blocks) -> Iterator[tuple[int, Rows]]:
        """Number and rows of each block that is not in the sums.

        Raises ValueError for other data than those that were read so far.
        """
        passed = 0
        for k, rows in enumerate(blocks()):
            if k == 0 and self.first and digest(rows) != self.first:
                raise ValueError(
                    "the first rows are not those that the fit began with: go on with the same "
                    "data, or fit anew without resume"
                )
            if k >= self.blocks:
                yield k, rows
                continue
            passed += len(rows)
            if k == self.blocks - 1 and passed != self.rows:
                raise ValueError(
                    f"{self.blocks} blocks had {self.rows:,} rows when the fit was interrupted and "
                    f"have {passed:,} now: go on with the same data, or fit anew without resume"
                )

    def after(self, rows: int, first: str) -> Readings:
        """With a block more; first: its digest, where it is the first of all."""
        first = self.first or first
        return replace(self, blocks=self.blocks + 1, rows=self.rows + rows, first=first)

    def ended(self) -> Readings:
        """With the reading done. Raises ValueError where it had other rows than the one before."""
        if not self.rows:
            raise ValueError("the data have no rows")
        if self.total not in (0, self.rows):
            raise ValueError(
                f"the data had {self.total:,} rows when they were first read and {self.rows:,} "
                "now: fit a copy that does not change"
            )
        return Readings(self.done + 1, 0, 0, self.rows, self.first)


def digest(rows: Rows) -> str:
    """SHA-256 of a block."""
    found = hashlib.sha256(rows.y.tobytes())
    found.update(rows.X.tobytes())
    if rows.regimes is not None:
        found.update(repr(rows.regimes.tolist()).encode())
    return found.hexdigest()
