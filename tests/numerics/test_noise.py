"""Counter-based noise: its bits by another implementation, and its statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chi2, kstest

from hakari.training import noise
from hakari.training.noise import token_keys, uniforms

torch.set_num_threads(1)  # small tensors: threads would wait for each other
ONES = 2**64 - 1


def absorb_in_python(state: int, word: int) -> int:
    """SplitMix64's finaliser of (state xor word) times the golden ratio, in whole numbers."""
    x = (state ^ word) * 0x9E3779B97F4A7C15 & ONES
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & ONES
    x = (x ^ x >> 27) * 0x94D049BB133111EB & ONES
    return x ^ x >> 31


def uniform_in_python(seed, step, index, layer, slot, column) -> float:
    state = 0x243F6A8885A308D3
    for word in (seed, step, index, layer, slot, column):
        state = absorb_in_python(state, word)
    signed = (state >> 41) - (2**23 if state >> 63 else 0)
    return (signed + 2**22 + 0.5) / 2**23


COUNTERS = [(0, 0, 0, 0, 0, 0), (1, 2, 3, 4, 5, 6), (2**63 - 1, 10**9, 2**40, 95, 2**20, 63)]
PINNED = [0.04817146062850952, 0.34765785932540894, 0.8325182795524597]


@pytest.mark.parametrize(("counter", "pinned"), list(zip(COUNTERS, PINNED, strict=True)))
def test_the_bits_are_those_of_whole_number_arithmetic(counter, pinned):
    seed, step, index, layer, slot, column = counter
    keys = token_keys(seed, step, torch.tensor([index]))
    found = uniforms(keys, layer, slot, column + 1)[0, column].item()
    assert found == uniform_in_python(*counter)
    assert found == pinned


def test_the_noise_of_a_token_depends_on_its_counter_only():
    index = torch.arange(240)
    keys = token_keys(3, 8, index)
    whole = uniforms(keys, 2, 1, 16)
    order = torch.randperm(240, generator=torch.Generator().manual_seed(0))
    assert torch.equal(token_keys(3, 8, index[order]), keys[order])
    assert torch.equal(token_keys(3, 8, index.view(4, 60)), keys.view(4, 60))
    assert torch.equal(uniforms(keys[order], 2, 1, 16), whole[order])
    assert torch.equal(uniforms(keys[100:130], 2, 1, 16), whole[100:130])
    assert torch.equal(uniforms(keys, 2, 1, 7), whole[:, :7])
    assert torch.equal(uniforms(keys, torch.tensor(2), 1, 16), whole)
    assert uniforms(keys[:0], 2, 1, 16).shape == (0, 16)


def test_drawing_changes_neither_the_keys_nor_torchs_generator():
    keys, state = token_keys(0, 0, torch.arange(50)), torch.get_rng_state()
    before = keys.clone()
    uniforms(keys, 0, 0, 8)
    assert torch.equal(keys, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("word", "extreme"), [(-(2**63), 2**-24), (2**63 - 1, 1 - 2**-24)])
def test_the_extremes_are_inside_the_unit_interval(monkeypatch, word, extreme):
    monkeypatch.setattr(noise, "_mix", lambda x: torch.full_like(x, word))
    found = uniforms(torch.zeros(1, dtype=torch.int64), 0, 0, 1)
    assert found.dtype == torch.float32
    assert found.item() == extreme
    # what 24 bits would give at the upper end
    assert torch.tensor((2**24 - 1 + 0.5) * 2**-24, dtype=torch.float32) == 1


def draws(seed=0, step=0, start=0, layer=0, slot=0, tokens=60_000) -> np.ndarray:
    keys = token_keys(seed, step, torch.arange(start, start + tokens))
    return uniforms(keys, layer, slot, 2).double().numpy()


def test_draws_are_uniform():
    u = uniforms(token_keys(0, 0, torch.arange(2**16)), 0, 0, 16).double().flatten()
    assert ((u * 2**24) % 2 == 1).all()
    for digits in (u, u * 2**8 % 1, u * 2**15 % 1):  # the upper, middle and lowest bits
        counts = torch.histc(digits, 256, 0, 1)
        assert ((counts - 2**12) ** 2 / 2**12).sum() < chi2.ppf(0.9999, 255)
    assert kstest(u[:200_000].numpy(), "uniform").pvalue > 1e-4


def dependence(x: np.ndarray, y: np.ndarray) -> float:
    """Chi-square of a 16 x 16 table over its 99.99 % point; the larger of u and its low bits."""
    parts = [np.histogram2d(x * s % 1, y * s % 1, 16, [[0, 1], [0, 1]])[0] for s in (1, 2**12)]
    each = len(x) / 256
    return max(float(((p - each) ** 2 / each).sum()) for p in parts) / chi2.ppf(0.9999, 255)


NEIGHBOURS = {
    "token": {"start": 1},
    "far token": {"start": 2**32},
    "step": {"step": 1},
    "seed": {"seed": 1},
    "layer": {"layer": 1},
    "slot": {"slot": 1},
    "layer and slot": {"layer": 1, "slot": 1},
}


@pytest.mark.parametrize("change", NEIGHBOURS.values(), ids=NEIGHBOURS)
def test_neighbours_are_independent(change):
    x, y = draws(), draws(**change)
    assert dependence(x[:, 0], y[:, 0]) < 1
    assert dependence(x[:, 0], y[:, 1]) < 1
    assert abs(np.corrcoef(x[:, 0], y[:, 0])[0, 1]) < 5 / len(x) ** 0.5


def test_columns_are_independent():
    u = draws()
    assert dependence(u[:, 0], u[:, 1]) < 1
    wide = uniforms(token_keys(0, 0, torch.arange(20_000)), 0, 0, 64).double().numpy()
    correlation = np.corrcoef(wide.T) - np.eye(64)
    assert abs(correlation).max() < 5.5 / 20_000**0.5


def test_a_counter_that_is_only_multiplied_is_caught(monkeypatch):
    monkeypatch.setattr(noise, "_absorb", lambda state, word: (state ^ word) * noise._GOLDEN)
    monkeypatch.setattr(noise, "_mix", lambda word: word * noise._GOLDEN)
    assert dependence(draws()[:, 0], draws(start=1)[:, 0]) > 2


def test_every_bit_of_the_index_changes_half_of_the_key():
    index = torch.arange(2000)
    keys = token_keys(5, 5, index).numpy().view(np.uint64)
    for bit in range(48):
        other = token_keys(5, 5, index ^ (1 << bit)).numpy().view(np.uint64)
        flips = np.unpackbits((keys ^ other).view(np.uint8)).mean()
        assert abs(flips - 0.5) < 0.008


def test_no_two_tokens_share_a_key():
    index = torch.arange(100_000)
    keys = torch.cat([token_keys(seed, step, index) for seed in (0, 1) for step in (0, 1)])
    assert len(keys.unique()) == 400_000


@pytest.mark.parametrize(("seed", "step"), [(-1, 0), (2**63, 0), (0, -1)])
def test_a_counter_out_of_range_is_refused(seed, step):
    name, number = ("seed", seed) if seed else ("step", step)
    with pytest.raises(ValueError, match=rf"{name} is {number}: it must be in 0 \.\. 2\*\*63 - 1"):
        token_keys(seed, step, torch.arange(3))


def test_narrow_indices_are_refused():
    with pytest.raises(ValueError, match=r"index has dtype torch.int32: .* must be torch.int64"):
        token_keys(0, 0, torch.arange(3, dtype=torch.int32))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor's own
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_noise_has_the_same_bits(backend):
    """Inductor with changing sizes: constants must not be folded into the index of a loop."""
    compiled = torch.compile(uniforms, backend=backend, fullgraph=True)
    for tokens, layer, width in ((64, 0, 8), (300, 1, 64), (1000, 2, 7)):
        keys = token_keys(1, 2, torch.arange(tokens))
        assert torch.equal(compiled(keys, layer, 1, width), uniforms(keys, layer, 1, width))
        number = torch.tensor(layer)
        assert torch.equal(compiled(keys, number, 1, width), uniforms(keys, layer, 1, width))
