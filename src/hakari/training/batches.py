"""Batches from token shards, by an exact cursor: sample i is a pure function of i.

The cursor of a run is one number, the samples consumed; another number of ranks, or another
batch size, goes on from it without losing a token or seeing one twice.

B rows, S tokens in a row, N tokens of the split.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Int64
from numpy import ndarray
from torch import Tensor

from hakari.training.shards import Tokens, take

IGNORED = -100  # target of padding, as torch's cross_entropy has it
DOCUMENTS, SAMPLES = 0, 1  # what is put in order, part of the seed


@dataclass(frozen=True, eq=False)
class Windows:
    """Tokens as an endless sequence of samples of `length` = S inputs and their S targets.

    packing: every epoch's documents, shuffled, follow each other in one endless stream, and
    window w reads inputs stream[wS .. wS+S-1] and targets stream[wS+1 .. wS+S]. The windows that
    begin in one epoch are shuffled; the last of them may reach into the next. So every token is
    a target once an epoch, a separator too. Without packing, each document is cut into pieces
    of S targets, the last of which is the end of text; a piece is a sample, padded.
    Epochs, and so samples, never end; `seed` decides every order.
    """

    tokens: Tokens
    length: int
    seed: int
    packing: bool = True

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"length = {self.length} is below 1")
        if self.seed < 0:
            raise ValueError(f"seed = {self.seed} is negative")


@dataclass(frozen=True)
class Batch:
    """Rows of a global batch, int64.

    targets: -100 where there is padding. documents: number of each input's document within its
    row, -1 where there is padding. index: of each token within the global batch, row · S +
    position; it keys the routing noise.
    """

    tokens: Int64[Tensor, "B S"]
    targets: Int64[Tensor, "B S"]
    documents: Int64[Tensor, "B S"]
    index: Int64[Tensor, "B S"]


@dataclass(frozen=True)
class _Spans:
    """Runs of consecutive tokens of one document, ordered by row: what rows are filled from."""

    row: Int64[ndarray, " spans"]
    begin: Int64[ndarray, " spans"]  # position in the split
    length: Int64[ndarray, " spans"]


def batch(windows: Windows, first_sample: int, count: int) -> Batch:
    """Samples first_sample .. first_sample + count - 1, counted from 0.

    >>> text = Tokens((np.arange(6, dtype="u2"),), np.array([0]), np.array([0, 4, 6]), 0, 6)
    >>> batch(Windows(text, length=3, seed=1), first_sample=0, count=2).tokens.shape
    torch.Size([2, 3])
    """
    return rank_batch(windows, first_sample, count, 0, 1)


def rank_batch(windows: Windows, consumed: int, global_batch: int, rank: int, ranks: int) -> Batch:
    """The rows of one rank of the global batch that follows `consumed` samples.

    Rank r of R gets rows rB/R .. (r+1)B/R - 1; their index is that of the global batch.
    Raises ValueError if the batch cannot be divided, or the rank is not one of them.
    """
    first, count = _rows(global_batch, rank, ranks)
    if consumed < 0:
        raise ValueError(f"consumed = {consumed} samples is negative")
    samples = np.arange(consumed + first, consumed + first + count)
    cut = _packed if windows.packing else _pieces
    return _fill(windows, cut(windows, samples), count, first)


def validation_batches(
    windows: Windows, global_batch: int, rank: int = 0, ranks: int = 1
) -> Iterator[Batch]:
    """Every window once, in the order of the text: this rank's rows of each global batch.

    The last batch is padded; each rank gets as many batches, so that they can add up together.
    """
    first, count = _rows(global_batch, rank, ranks)
    total = -(-(windows.tokens.count - 1) // windows.length)
    if not windows.packing:
        total = int(_piece_ends(windows)[-1])
    for start in range(0, total, global_batch):
        samples = np.arange(start + first, min(start + first + count, total))
        if windows.packing:
            begin = samples * windows.length
            stop = np.minimum(begin + windows.length + 1, windows.tokens.count)
            spans = _cut(windows, None, begin, stop)
        else:
            spans = _cut_pieces(windows, samples)
        yield _fill(windows, spans, count, first)


def first_sample(windows: Windows, epoch: int) -> int:
    """The sample that begins an epoch; the samples of epoch e are those up to the next one's."""
    if windows.packing:
        return -(-epoch * windows.tokens.count // windows.length)
    return epoch * int(_piece_ends(windows)[-1])


# --- which tokens a sample holds ------------------------------------------------------------


def _rows(global_batch: int, rank: int, ranks: int) -> tuple[int, int]:
    if not 0 <= rank < ranks:
        raise ValueError(f"rank {rank} is none of {ranks}, which are numbered from 0")
    if global_batch < 1 or global_batch % ranks:
        raise ValueError(f"a batch of {global_batch} samples cannot be divided among {ranks} ranks")
    count = global_batch // ranks
    return rank * count, count


def _shuffled(windows: Windows, samples: Int64[ndarray, " B"]) -> Int64[ndarray, " B"]:
    """Each sample's place in its epoch's order of windows (or pieces), put in place of itself."""
    place = samples.copy()
    epoch = _epoch_of(windows, int(samples[0]))
    while (begin := first_sample(windows, epoch)) <= samples[-1]:
        here = (samples >= begin) & (samples < first_sample(windows, epoch + 1))
        if here.any():  # an epoch shorter than a window may have none
            place[here] = begin + _order(windows, epoch, SAMPLES)[samples[here] - begin]
        epoch += 1
    return place


def _epoch_of(windows: Windows, sample: int) -> int:
    if windows.packing:  # window w begins at token wS
        return sample * windows.length // windows.tokens.count
    return sample // first_sample(windows, 1)


def _packed(windows: Windows, samples: Int64[ndarray, " B"]) -> _Spans:
    """S + 1 tokens of the stream for each sample."""
    size = windows.tokens.count
    begin = _shuffled(windows, samples) * windows.length
    stop = begin + windows.length + 1
    epochs = range(int(begin.min()) // size, int(stop.max() - 1) // size + 1)
    parts = []
    for epoch in epochs:
        low, high = (np.clip(edge - epoch * size, 0, size) for edge in (begin, stop))
        parts.append(_cut(windows, epoch, low, high))
    row = np.concatenate([part.row for part in parts])
    order = np.argsort(row, kind="stable")  # a row goes on in the next epoch
    return _Spans(
        row[order],
        np.concatenate([part.begin for part in parts])[order],
        np.concatenate([part.length for part in parts])[order],
    )


def _cut(
    windows: Windows,
    epoch: int | None,
    begin: Int64[ndarray, " B"],
    stop: Int64[ndarray, " B"],
) -> _Spans:
    """For each row, tokens begin .. stop - 1 of the documents in their order of this epoch."""
    starts, (order, ends) = windows.tokens.starts, _documents(windows, epoch)
    first = np.searchsorted(ends, begin, side="right") - 1
    count = np.where(stop > begin, np.searchsorted(ends, stop, side="left") - first, 0)
    row = np.repeat(np.arange(len(begin)), count)
    place = np.repeat(first - (np.cumsum(count) - count), count) + np.arange(len(row))
    low = np.maximum(ends[place], begin[row])
    high = np.minimum(ends[place + 1], stop[row])
    return _Spans(row, starts[order[place]] + low - ends[place], high - low)


def _pieces(windows: Windows, samples: Int64[ndarray, " B"]) -> _Spans:
    place = _shuffled(windows, samples)
    return _cut_pieces(windows, place % first_sample(windows, 1))


def _cut_pieces(windows: Windows, pieces: Int64[ndarray, " B"]) -> _Spans:
    """Up to S + 1 tokens of a document for each row; its last piece has no token after it."""
    ends, starts = _piece_ends(windows), windows.tokens.starts
    document = np.searchsorted(ends, pieces, side="right") - 1
    begin = starts[document] + (pieces - ends[document]) * windows.length
    length = np.minimum(windows.length + 1, starts[document + 1] - begin)
    return _Spans(np.arange(len(pieces)), begin, length)


# --- tensors --------------------------------------------------------------------------------


def _fill(windows: Windows, spans: _Spans, count: int, first_row: int) -> Batch:
    """Read the spans into rows of S + 1 tokens, of which inputs and targets are views."""
    shape = (count, windows.length + 1)
    tokens = np.full(shape, windows.tokens.end_of_text, np.int64)
    documents = np.full(shape, -1, np.int64)
    first = np.searchsorted(spans.row, spans.row)  # the first span of each one's row
    before = np.cumsum(spans.length) - spans.length
    each = (spans.row, -before[first], spans.begin - before, np.arange(len(first)) - first)
    row, column, begin, document = (np.repeat(one, spans.length) for one in each)
    every = np.arange(len(row))
    tokens[row, column + every] = take(windows.tokens, begin + every)
    documents[row, column + every] = document
    # packed, a token is an input if the next is there; else an end of text follows the last one
    known = documents[:, 1:] >= 0 if windows.packing else documents[:, :-1] >= 0
    index = np.arange(count * windows.length) + first_row * windows.length
    return Batch(
        torch.from_numpy(np.where(known, tokens[:, :-1], windows.tokens.end_of_text)),
        torch.from_numpy(np.where(known, tokens[:, 1:], IGNORED)),
        torch.from_numpy(np.where(known, documents[:, :-1], -1)),
        torch.from_numpy(index.reshape(count, windows.length)),
    )


# --- orders ---------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _order(windows: Windows, epoch: int, what: int) -> Int64[ndarray, " n"]:
    """Documents, or samples, of an epoch in random order.

    numpy promises the same raw bits in every version, not the same permutations; so they are
    made of bits here.
    """
    count = len(windows.tokens.starts) - 1
    if what == SAMPLES:
        count = first_sample(windows, epoch + 1) - first_sample(windows, epoch)
    seeds = np.random.SeedSequence(windows.seed, spawn_key=(epoch, what))
    return np.argsort(np.random.Philox(seeds).random_raw(count), kind="stable")


@lru_cache(maxsize=8)
def _documents(
    windows: Windows, epoch: int | None
) -> tuple[Int64[ndarray, " documents"], Int64[ndarray, " bounds"]]:
    """The documents in the order of an epoch, None: as stored; and where each begins in it."""
    lengths = np.diff(windows.tokens.starts)
    if epoch is None:
        return np.arange(len(lengths)), windows.tokens.starts
    order = _order(windows, epoch, DOCUMENTS)
    return order, np.concatenate([[0], np.cumsum(lengths[order])])


@lru_cache(maxsize=8)
def _piece_ends(windows: Windows) -> Int64[ndarray, " bounds"]:
    """How many pieces the documents before each have, and last how many all have."""
    lengths = np.diff(windows.tokens.starts)
    return np.concatenate([[0], np.cumsum(-(-lengths // windows.length))])
