"""Six traps of low-bit quantization, each with its cure: small functions that return (wrong, right).

Every one was met in published code or numbers of this method family (docs/method.md section 2), and every one is
silent: nothing crashes, and the accuracy looks plausible.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from granq.analysis import sqnr_db
from granq.generator import build_generator
from granq.quantizer import choose_qparams, fake_quantize, quantize


class Trap(NamedTuple):
    """What the trap gives, and what its cure gives."""

    wrong: Any
    right: Any


def single_number_kernels(bits: int = 3, seed: int = 0) -> Trap:
    """A 1x1 kernel is its own minimum and maximum: one scale per kernel leaves it unquantized.

    Returns:
        SQNR in dB of the weights of a pointwise convolution: with a scale per kernel (about 150 dB, the rounding of
        float32), and with a scale per filter (what ``bits`` really cost).
    """
    weight = torch.randn(32, 16, 1, 1, generator=torch.Generator().manual_seed(seed))
    values = (fake_quantize(weight, bits, granularity) for granularity in ("per_kernel", "per_out_channel"))
    return Trap(*(sqnr_db(weight, value, (0, 1, 2, 3)).item() for value in values))


def compounding_correction(value: float = 2.0, momentum: float = 0.9, steps: int = 4) -> Trap:
    """A moving average starts at 0 and is divided by 1 - momentum^t; storing the quotient divides it again and again.

    Returns:
        The average after every step of a constant ``value``: with the quotient stored (2, 10.5, 35.7, ...), and with
        the sum stored and the quotient only read.
    """
    wrong, right, stored, kept = [], [], 0.0, 0.0
    for t in range(1, steps + 1):
        stored = (momentum * stored + (1 - momentum) * value) / (1 - momentum**t)
        kept = momentum * kept + (1 - momentum) * value
        wrong.append(stored)
        right.append(kept / (1 - momentum**t))
    return Trap(wrong, right)


def vanishing_epsilon(value: float = 2.5, bits: int = 3) -> Trap:
    """1e-8 is zero in float16: the scale of a constant channel becomes infinite, and 0 times it is not a number.

    Returns:
        A constant float16 channel after fake quantization: with the range in float16, and in float32.
    """
    x = torch.full((1, 1, 2, 2), value, dtype=torch.float16)
    return Trap(*(fake_quantize(x, bits, promote=promote).flatten().tolist() for promote in (False, True)))


def ties_above_the_range(bits: int = 3, seed: int = 0) -> Trap:
    """The zero point can be rounded down and the code up: a code above the largest there is.

    Returns:
        Share of codes above 2^(bits-1) - 1 among values half a step off the integers, in channels of 5 x 5 pixels that
        hold both ends of the range, which makes the step one: without a clamp (15 % at 3 bits; the largest value of
        each channel is always among them), and with it. Any other value never ties.
    """
    steps = torch.randint(2**bits, (100, 16, 5, 5), generator=torch.Generator().manual_seed(seed))
    steps[..., 0, 0], steps[..., 0, 1] = 0, 2**bits - 1  # both ends, which 25 pixels need not hold
    x = steps + 0.5
    qparams = choose_qparams(x, bits)
    top = 2 ** (bits - 1) - 1
    return Trap(*((quantize(x, *qparams, bits, clamp) > top).float().mean().item() for clamp in (False, True)))


def best_epoch_on_test(accuracy: float = 0.9, images: int = 10_000, epochs: int = 200, seed: int = 0) -> Trap:
    """The best of many epochs, chosen on the images it is reported on, is above the network's accuracy by chance alone.

    Returns:
        Points above the true accuracy: the best epoch, and the last one, over 200 runs of networks that do not change
        at all. Epochs are drawn independently; those of a real run resemble each other, so its gain is smaller.
    """
    rng = torch.Generator().manual_seed(seed)
    runs = torch.full((200, epochs), float(images))
    measured = 100 * torch.binomial(runs, torch.full_like(runs, accuracy), generator=rng) / images
    excess = measured - 100 * accuracy
    return Trap(excess.amax(1).mean().item(), excess[:, -1].mean().item())


def seed_after_the_generator(seed: int = 0) -> Trap:
    """A seed set after the generator was built does not seed its initial weights: the run cannot be repeated.

    Returns:
        Whether two runs with the same seed start from the same generator: seed set after, and before it is built.
    """

    def start(before: bool, drawn: int) -> Tensor:
        torch.rand(drawn)  # whatever the process did before
        if before:
            torch.manual_seed(seed)
        generator = build_generator(10, 32)
        torch.manual_seed(seed)
        return generator.linear.weight

    with torch.random.fork_rng():
        return Trap(*(torch.equal(start(before, 1), start(before, 2)) for before in (False, True)))
