"""Every token is a target once an epoch, whatever the rows, batches, ranks and stops."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hakari.training import batches
from hakari.training.batches import (
    IGNORED,
    Batch,
    Windows,
    batch,
    first_sample,
    rank_batch,
    validation_batches,
)
from hakari.training.shards import Tokens

END = 10_000
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=12)
CASES = {
    "lengths": LENGTHS,
    "length": st.integers(1, 14),
    "seed": st.integers(0, 2**40),
    "shards": st.integers(1, 4),
}
FIELDS = ("tokens", "targets", "documents", "index")


def split(lengths, shards=1):
    """Documents whose every token differs: token = its position in the split."""
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    cuts = starts[:-1][:: -(-len(lengths) // shards)]
    parts = np.split(np.arange(starts[-1], dtype=np.uint16), cuts[1:])
    return Tokens(tuple(parts), cuts, starts, END, END + 1)


def windows_of(lengths, length, seed, shards=1, packing=True):
    return Windows(split(lengths, shards), length, seed, packing)


def known(one: Batch) -> list[int]:
    return one.targets[one.targets != IGNORED].tolist()


def same(ours: Batch, theirs: Batch) -> None:
    for field in FIELDS:
        assert torch.equal(getattr(ours, field), getattr(theirs, field)), field


# --- packed ---------------------------------------------------------------------------------


def every_token_once_an_epoch(targets_of, size, length):
    """S epochs of N tokens are N windows of S targets: each token S times, but that the very
    first of all is none, and the first of the next epoch is one already. And after the windows
    that begin in the first e epochs, each was a target e times, but for that very first one."""

    def count(samples):
        return Counter(target for sample in range(samples) for target in targets_of(sample))

    exact = count(size)
    off = sorted(exact[token] - length for token in range(size) if exact[token] != length)
    if exact.total() != size * length or off not in ([], [-1, 1]):
        return False
    for epoch in (1, 2, 3):
        counts = count(-(-epoch * size // length))
        lacking = sorted(epoch - counts[token] for token in range(size) if counts[token] < epoch)
        if lacking not in ([], [1]):
            return False
    return True


@settings(deadline=None, max_examples=200)
@given(**CASES)
def test_packed_every_token_is_a_target_once_an_epoch(lengths, length, seed, shards):
    windows = windows_of(lengths, length, seed, shards)
    assert every_token_once_an_epoch(
        lambda sample: known(batch(windows, sample, 1)), sum(lengths), length
    )


def drop_straddling(windows, sample):
    """The mutant that begins each epoch afresh, and loses the tail of the one before."""
    size = windows.tokens.count
    epoch, window = divmod(sample, size // windows.length)
    begin = epoch * size + window * windows.length
    return [token % size for token in range(begin + 1, begin + windows.length + 1)]


def overlap(windows, sample):
    """The mutant whose windows share a token with the next: S targets for S - 1 new ones."""
    begin = sample * (windows.length - 1)
    return [token % windows.tokens.count for token in range(begin + 1, begin + windows.length + 1)]


def with_replacement(windows, sample):
    """The mutant that draws windows at random."""
    return known(batch(windows, int(np.random.default_rng(sample).integers(10)), 1))


@pytest.mark.parametrize("mutant", [drop_straddling, overlap, with_replacement])
def test_the_count_of_targets_catches_a_sampler_that_loses_or_repeats(mutant):
    windows = windows_of([5, 3, 9, 6], 4, seed=1)
    right, wrong = (
        every_token_once_an_epoch(lambda sample, take=take: take(windows, sample), 23, 4)
        for take in (lambda w, sample: known(batch(w, sample, 1)), mutant)
    )
    assert right
    assert not wrong


def plain_stream(windows, epochs):
    """(token, number of the document since the beginning of time), epoch after epoch."""
    stream, number = [], 0
    starts = windows.tokens.starts
    for epoch in range(epochs):
        for document in batches._order(windows, epoch, batches.DOCUMENTS):
            stream += [(t, number) for t in range(starts[document], starts[document + 1])]
            number += 1
    return stream


@settings(deadline=None, max_examples=100)
@given(**CASES)
def test_packed_rows_are_those_of_a_stream_written_out(lengths, length, seed, shards):
    windows = windows_of(lengths, length, seed, shards)
    stream = plain_stream(windows, 6 + 4 * -(-length // sum(lengths)))
    samples = first_sample(windows, 2) + 3
    found = batch(windows, 0, samples)
    for sample in range(samples):
        epoch = next(e for e in range(99) if first_sample(windows, e + 1) > sample)
        begin = first_sample(windows, epoch)
        window = begin + batches._order(windows, epoch, batches.SAMPLES)[sample - begin]
        row = stream[window * length : (window + 1) * length + 1]
        assert found.tokens[sample].tolist() == [token for token, _ in row[:-1]]
        assert found.targets[sample].tolist() == [token for token, _ in row[1:]]
        assert found.documents[sample].tolist() == [n - row[0][1] for _, n in row[:-1]]
        assert window * length // sum(lengths) == epoch


@settings(deadline=None, max_examples=100)
@given(**CASES)
def test_a_separator_begins_a_document_and_nothing_else_does(lengths, length, seed, shards):
    windows = windows_of(lengths, length, seed, shards)
    found = batch(windows, 0, 7)
    begins = set(windows.tokens.starts[:-1].tolist())
    assert (found.documents[:, 0] == 0).all()
    for tokens, documents in zip(found.tokens.tolist(), found.documents.tolist(), strict=True):
        for token, (before, after) in zip(tokens[1:], pairwise(documents), strict=True):
            assert after - before == (token in begins)


def test_the_window_at_the_end_of_an_epoch_goes_on_in_the_next():
    windows = windows_of([4, 3], 5, seed=3)
    stream = plain_stream(windows, 2)
    rows = batch(windows, 0, first_sample(windows, 1)).tokens.tolist()
    assert [token for token, _ in stream[5:10]] in rows  # tokens 5, 6 of epoch 0, then epoch 1


@pytest.mark.parametrize("packing", [True, False])
def test_epochs_and_seeds_have_orders_of_their_own(packing):
    def order(seed, epoch):
        windows = windows_of([7] * 40, 7, seed, packing=packing)
        begin = first_sample(windows, epoch)
        return batch(windows, begin, 40).tokens.tolist()

    orders = [order(1, 0), order(1, 1), order(2, 0), order(2, 1)]
    assert order(1, 0) == orders[0]
    assert all(orders[a] != orders[b] for a in range(4) for b in range(a))


def test_a_batch_does_not_hold_neighbours_of_one_document():
    windows = windows_of([1000], 10, seed=1)
    first = batch(windows, 0, 100).tokens[:, 0].tolist()
    neighbours = sum(b - a == 10 for a, b in pairwise(first))
    assert neighbours < 6  # about 1 by chance, 99 without the shuffle


def test_the_order_of_a_seed_stays_what_it_was():
    """A run must resume under another numpy: these are of numpy 2.4, from raw bits."""
    windows = windows_of([2] * 8, 2, seed=7)
    assert batches._order(windows, 0, batches.DOCUMENTS).tolist() == [2, 0, 6, 5, 1, 4, 7, 3]
    assert batches._order(windows, 3, batches.SAMPLES).tolist() == [7, 0, 3, 4, 2, 1, 5, 6]


# --- not packed -----------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(**CASES)
def test_unpacked_every_token_and_every_end_is_a_target_once_an_epoch(
    lengths, length, seed, shards
):
    windows = windows_of(lengths, length, seed, shards, packing=False)
    starts = set(windows.tokens.starts[:-1].tolist())
    expected = [token for token in range(sum(lengths)) if token not in starts]
    expected += [END] * len(lengths)
    for epoch in range(3):
        begin, end = first_sample(windows, epoch), first_sample(windows, epoch + 1)
        assert sorted(known(batch(windows, begin, end - begin))) == sorted(expected)


@settings(deadline=None, max_examples=100)
@given(**CASES)
def test_unpacked_a_row_is_a_piece_of_one_document(lengths, length, seed, shards):
    windows = windows_of(lengths, length, seed, shards, packing=False)
    found = batch(windows, 0, first_sample(windows, 1))
    starts = windows.tokens.starts
    for tokens, targets, documents in zip(
        found.tokens, found.targets, found.documents, strict=True
    ):
        size = int((documents == 0).sum())
        piece = tokens[:size].tolist()
        document = np.searchsorted(starts, piece[0], side="right") - 1
        assert (piece[0] - starts[document]) % length == 0
        assert piece == list(range(piece[0], min(piece[0] + length, starts[document + 1])))
        after = piece[-1] + 1
        assert targets[:size].tolist() == [
            *piece[1:],
            END if after == starts[document + 1] else after,
        ]
        assert documents[size:].tolist() == [-1] * (length - size)
        assert targets[size:].tolist() == [IGNORED] * (length - size)
        assert tokens[size:].tolist() == [END] * (length - size)


# --- the cursor -----------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(
    **CASES,
    packing=st.booleans(),
    plan=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=5),
)
def test_stops_ranks_and_batch_sizes_change_no_sample(lengths, length, seed, shards, packing, plan):
    """plan: (ranks, rows of a rank) of each step; a run that stops after any of them, and goes
    on with other ranks, sees the samples of an uninterrupted one."""
    windows = windows_of(lengths, length, seed, shards, packing)
    steps, consumed = [], 0
    for ranks, rows in plan:
        fresh = windows_of(lengths, length, seed, shards, packing)
        parts = [rank_batch(fresh, consumed, ranks * rows, r, ranks) for r in range(ranks)]
        index = torch.cat([part.index for part in parts])
        assert torch.equal(index.flatten(), torch.arange(ranks * rows * length))
        steps += parts
        consumed += ranks * rows
    whole = batch(windows, 0, consumed)
    for field in ("tokens", "targets", "documents"):
        joined = torch.cat([getattr(part, field) for part in steps])
        assert torch.equal(joined, getattr(whole, field))


def test_a_mutant_that_counts_rows_within_the_rank_would_be_seen():
    windows = windows_of([9, 9, 9], 3, seed=1)
    second = rank_batch(windows, 0, 4, 1, 2)
    assert second.index[0].tolist() == [6, 7, 8]
    assert not torch.equal(second.index, batch(windows, 2, 2).index)


def test_far_epochs_are_reached_at_once():
    windows = windows_of([3, 5, 2], 4, seed=1)
    far = 10**12
    assert sorted(known(batch(windows, first_sample(windows, far), 1))) != []
    assert batch(windows, far, 3).tokens.shape == (3, 4)


def test_tensors_are_whole_numbers_of_64_bits():
    found = batch(windows_of([3, 5], 4, seed=1), 0, 2)
    assert {getattr(found, field).dtype for field in FIELDS} == {torch.int64}
    assert {getattr(found, field).shape for field in FIELDS} == {(2, 4)}


# --- validation -----------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(**CASES, rows=st.integers(1, 3), ranks=st.integers(1, 3))
def test_validation_reads_every_token_once_in_order_on_any_ranks(
    lengths, length, seed, shards, rows, ranks
):
    windows = windows_of(lengths, length, seed, shards)
    whole = list(validation_batches(windows, rows * ranks))
    assert [target for one in whole for target in known(one)] == list(range(1, sum(lengths)))
    assert len(whole) == -(-(sum(lengths) - 1) // (rows * ranks * length))
    shares = [list(validation_batches(windows, rows * ranks, r, ranks)) for r in range(ranks)]
    for one, parts in zip(whole, zip(*shares, strict=True), strict=True):
        same(one, Batch(*(torch.cat([getattr(p, f) for p in parts]) for f in FIELDS)))
        assert ((one.documents < 0) == (one.targets == IGNORED)).all()
        assert (one.tokens[one.documents < 0] == END).all()


@settings(deadline=None, max_examples=100)
@given(**CASES, rows=st.integers(1, 3))
def test_validation_of_documents_reads_each_in_order(lengths, length, seed, shards, rows):
    windows = windows_of(lengths, length, seed, shards, packing=False)
    targets = [t for one in validation_batches(windows, rows) for t in known(one)]
    expected = []
    for start, stop in pairwise(windows.tokens.starts.tolist()):
        expected += [*range(start + 1, stop), END]
    assert targets == expected


# --- what is refused ------------------------------------------------------------------------


def test_batches_that_cannot_be_divided():
    windows = windows_of([3, 5], 4, seed=1)
    with pytest.raises(ValueError, match="a batch of 5 samples cannot be divided among 2 ranks"):
        rank_batch(windows, 0, 5, 0, 2)
    with pytest.raises(ValueError, match="a batch of 0 samples cannot be divided among 1 ranks"):
        batch(windows, 0, 0)
    with pytest.raises(ValueError, match="rank 2 is none of 2, which are numbered from 0"):
        rank_batch(windows, 0, 4, 2, 2)
    with pytest.raises(ValueError, match="rank -1 is none of 2"):
        next(validation_batches(windows, 4, -1, 2))
    with pytest.raises(ValueError, match="consumed = -1 samples is negative"):
        batch(windows, -1, 2)


def test_windows_that_cannot_be():
    with pytest.raises(ValueError, match="length = 0 is below 1"):
        windows_of([3], 0, seed=1)
    with pytest.raises(ValueError, match="seed = -1 is negative"):
        windows_of([3], 1, seed=-1)
