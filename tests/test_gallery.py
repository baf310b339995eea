"""Every trap catches, and every cure cures."""

import math

import pytest
import torch

from granq import gallery


def test_1x1_kernels_stay_unquantized():
    wrong, right = gallery.single_number_kernels()
    assert wrong > 140 and 5 < right < 25  # dB; 3 bits of normal weights cannot reach 25


def test_repeated_division_compounds():
    wrong, right = gallery.compounding_correction()
    assert wrong[:3] == pytest.approx([2, 10.526, 35.70], abs=0.01)
    assert right == pytest.approx([2] * 4)


def test_half_precision_needs_a_larger_epsilon():
    wrong, right = gallery.vanishing_epsilon()
    assert all(map(math.isnan, wrong)) and right == [2.5] * 4


@pytest.mark.parametrize("bits", range(2, 9))
def test_ties_leave_the_range_without_a_clamp(bits):
    wrong, right = gallery.ties_above_the_range(bits)
    # of 25 values one is the largest, one the smallest, and each other one is the largest by chance
    assert wrong == pytest.approx((1 + 23 / 2**bits) / 25, abs=0.006) and right == 0


def test_the_best_epoch_flatters():
    wrong, right = gallery.best_epoch_on_test()
    assert wrong == pytest.approx(2.75 * 100 * math.sqrt(0.9 * 0.1 / 10_000), abs=0.06)  # mean largest of 200 normals
    assert abs(right) < 0.06


def test_the_seed_comes_first():
    state = torch.get_rng_state()
    assert gallery.seed_after_the_generator() == (False, True)
    assert torch.equal(torch.get_rng_state(), state)
