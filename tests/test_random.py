"""Random numbers belong to a position in the global batch, so how the batch is cut does not matter."""

import math

import pytest
import torch
from scipy import stats

from diffusion_distill.random import SampleRandom, derive_seed

KEYS = (7, 2, 100, 0)  # seed, stream, step, turn


def draws(random: SampleRandom) -> tuple[torch.Tensor, ...]:
    """One of everything, in a fixed order."""
    count = len(random.slots)
    first = random.normal((count, 3, 2))
    return first, random.uniform(), torch.full((count,), random.shared_integer(1000)), random.normal_like(first), random.uniform()


@pytest.mark.parametrize("parts", [(4, 4), (2, 2, 2, 2), (1, 6, 1)])
def test_a_batch_draws_the_same_however_it_is_split(parts: tuple[int, ...]) -> None:
    """Micro-batches and ranks are the same thing here: ranges of slots."""
    ends = torch.tensor(parts).cumsum(0).tolist()
    pieces = [draws(SampleRandom(KEYS, range(end - size, end))) for size, end in zip(parts, ends)]
    for whole, *cut in zip(draws(SampleRandom(KEYS, range(8))), *pieces):
        assert torch.equal(whole, torch.cat(cut))


def test_slots_keep_their_numbers_in_any_order() -> None:
    for ordered, shuffled in zip(draws(SampleRandom(KEYS, (0, 1, 2, 3))), draws(SampleRandom(KEYS, (2, 0, 3, 1)))):
        assert torch.equal(ordered[[2, 0, 3, 1]], shuffled)


def test_every_key_draw_and_slot_gives_other_numbers() -> None:
    """One random number for each of 5 x 40 positions: changed keys, later draws, other slots; no two alike."""
    changed = [KEYS] + [tuple(key + (i == place) for i, key in enumerate(KEYS)) for place in range(len(KEYS))]
    found = []
    for keys in changed:
        random = SampleRandom(keys, range(8))
        found += [random.normal((8,)) for _ in range(5)]
    assert len(torch.cat(found).unique()) == 5 * 40


def test_a_new_object_with_the_same_keys_repeats() -> None:
    assert all(torch.equal(a, b) for a, b in zip(draws(SampleRandom(KEYS, range(4))), draws(SampleRandom(KEYS, range(4)))))


def test_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(0)
    first, state = draws(SampleRandom(KEYS, range(4))), torch.get_rng_state()
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(first, draws(SampleRandom(KEYS, range(4)))))
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_normal_is_normal_and_uniform_is_uniform() -> None:
    """Kolmogorov-Smirnov within samples and across samples, which have streams of their own; p > 0.001."""
    random = SampleRandom(KEYS, range(400))
    normal, uniform = random.normal((400, 50)), torch.stack([random.uniform() for _ in range(20)])
    assert stats.kstest(normal.flatten(), "norm").pvalue > 1e-3
    assert stats.kstest(normal[:, 0], "norm").pvalue > 1e-3
    assert stats.kstest(normal.mean(1) * math.sqrt(50), "norm").pvalue > 1e-3
    assert stats.kstest(normal.mean(0) * math.sqrt(400), "norm").pvalue > 1e-3
    assert stats.kstest(uniform.flatten(), "uniform").pvalue > 1e-3
    assert stats.kstest(uniform[0], "uniform").pvalue > 1e-3
    assert float(uniform.min()) >= 0 and float(uniform.max()) < 1


def test_shared_integer_is_uniform_and_leaves_no_value_out() -> None:
    """Over steps (that is how rungs are drawn) and over draws: chi-square against equal shares, p > 0.001."""
    for values in (
        [SampleRandom((7, 2, step, 0), (0,)).shared_integer(4) for step in range(2000)],
        [random.shared_integer(4) for random in [SampleRandom(KEYS, (0,))] for _ in range(2000)],
    ):
        counts = torch.bincount(torch.tensor(values), minlength=4)
        assert len(counts) == 4
        assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_noise_is_float32_whatever_it_is_like() -> None:
    random = SampleRandom(KEYS, range(2))
    assert random.normal_like(torch.zeros(2, 3, dtype=torch.bfloat16)).dtype == torch.float32
    assert random.normal((2, 3)).shape == (2, 3)


def test_shape_must_start_with_the_batch_size() -> None:
    with pytest.raises(ValueError, match=r"shape \(3, 2\) does not start with the batch size 2"):
        SampleRandom(KEYS, range(2)).normal((3, 2))


def test_derived_seeds_do_not_collide() -> None:
    """A grid of small keys as a run makes them, shorter key lists and negative keys: 63 bits, all different."""
    grid = {derive_seed(seed, step, turn, slot) for seed in range(4) for step in range(100) for turn in range(3) for slot in range(-1, 40)}
    assert len(grid) == 4 * 100 * 3 * 41
    shorter = {derive_seed(a, b) for a in range(100) for b in range(100)} | {derive_seed(a) for a in range(1000)} | {derive_seed()}
    assert len(shorter) == 10_000 + 1000 + 1 and not grid & shorter
    assert all(0 <= seed < 1 << 63 for seed in grid | shorter)
    assert derive_seed(1, 2) != derive_seed(2, 1)


def test_seeds_are_splitmix64() -> None:
    """The first output of splitmix64 from state 0, as its reference implementation prints it, in the upper 63 bits."""
    assert derive_seed(0) == 0xE220A8397B1DCDAF >> 1
