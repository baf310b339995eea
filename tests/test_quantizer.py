import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from granq import GRANULARITIES, UserError, choose_qparams, dequantize, fake_quantize, quantize
from granq.quantizer import fake_quantize_with, min_max
from granq.ranges import LearnedStep, best_quantile, quantile_range

X = torch.tensor([[0, 0.5, 1, 2], [0, 0.1, 0.2, 0.3]]).reshape(1, 2, 2, 2)
SHAPES = {
    "per_tensor": (1, 1, 1, 1), "per_channel": (1, 3, 1, 1), "per_sample": (2, 1, 1, 1),
    "per_sample_channel": (2, 3, 1, 1), "per_out_channel": (2, 1, 1, 1), "per_kernel": (2, 3, 1, 1),
}  # fmt: skip


@pytest.mark.parametrize(
    ("granularity", "s", "codes", "values"),
    [
        (
            "per_tensor",
            [3.5],
            [-4, -2, 0, 3, -4, -4, -3, -3],
            [0, 0.571429, 1.142857, 2, 0, 0, 0.285714, 0.285714],
        ),
        (
            "per_sample_channel",
            [3.5, 23.333332],
            [-4, -2, 0, 3, -4, -2, 1, 3],
            [0, 0.571429, 1.142857, 2, 0, 0.085714, 0.214286, 0.3],
        ),
    ],
)
def test_worked_example(granularity, s, codes, values):
    scale_inv, zero_point = choose_qparams(X, 3, granularity)
    assert scale_inv.flatten().tolist() == pytest.approx(s, rel=1e-7)
    assert zero_point.flatten().tolist() == [4.0] * len(s)
    q = quantize(X, scale_inv, zero_point, 3, clamp=False)
    assert q.flatten().tolist() == codes
    assert dequantize(q, scale_inv, zero_point).flatten().tolist() == pytest.approx(values, abs=1e-6)
    assert fake_quantize(X, 3, granularity, clamp=False).flatten().tolist() == pytest.approx(values, abs=1e-6)


def test_signed_tie_and_constant_examples():
    x = torch.tensor([[-1, -0.2, 0.3, 1.4]])
    s, z = choose_qparams(x, 2)
    assert (s.item(), z.item()) == (pytest.approx(1.25), 1)
    assert quantize(x, s, z, 2, clamp=False).tolist() == [[-2, -1, -1, 1]]
    tie = torch.tensor([[0.5, 1.5, 4, 7.5]])
    s, z = choose_qparams(tie, 3)
    assert quantize(tie, s, z, 3, clamp=False).tolist() == [[-4, -2, 0, 4]]
    assert quantize(tie, s, z, 3).tolist() == [[-4, -2, 0, 3]]
    constant = torch.full((1, 1, 2, 2), 2.5)
    assert choose_qparams(constant, 3).scale_inv.item() == pytest.approx(7e8)
    assert torch.equal(fake_quantize(constant, 3, clamp=False), constant)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("clamp", [True, False])
def test_matches_a_plain_loop(granularity, clamp):
    x = torch.randn(2, 3, 4, 4)
    shape = SHAPES[granularity]
    assert choose_qparams(x, 3, granularity).scale_inv.shape == shape
    out = fake_quantize(x, 3, granularity, clamp)
    for group in itertools.product(*(range(n) for n in shape[:2])):
        part = tuple(slice(i, i + 1) if n > 1 else slice(None) for i, n in zip(group, shape, strict=False))
        low, high = min(x[part].flatten().tolist()), max(x[part].flatten().tolist())
        s = 7 / max(high - low, 1e-8)
        z = round(s * low) + 4
        for value, got in zip(x[part].flatten().tolist(), out[part].flatten().tolist(), strict=True):
            code = round(s * value - z)
            code = max(-4, min(3, code)) if clamp else code
            assert got == pytest.approx((code + z) / s, abs=1e-5)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_sample_channel"])
def test_learned_steps_have_the_gradient_of_lsq(granularity):
    """Equation 3 of Esser et al. (2020), value by value; the forward is the clamped quantizer."""
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64).requires_grad_()
    inner = choose_qparams(x.detach() / 2, 3, granularity)  # half the range: values are clamped on both sides
    step = inner.scale.requires_grad_()
    out = LearnedStep.apply(x, 1 / step, inner.zero_point, 3)
    torch.testing.assert_close(out, fake_quantize_with(x, inner, 3))
    grad = torch.randn_like(out)
    grad_x, grad_step = torch.autograd.grad(out, (x, step), grad)
    ratio, low = x / step, inner.zero_point - 4
    below, above = ratio < low - 0.5, ratio > low + 7.5
    assert below.any() and above.any()
    torch.testing.assert_close(grad_x, grad.masked_fill(below | above, 0))
    slope = torch.where(below, low, torch.where(above, low + 7, ratio.round() - ratio))
    torch.testing.assert_close(grad_step, (slope * grad).sum_to_size(step.shape))


def test_quantiles_count_positive_and_negative_values_apart():
    x = torch.tensor([-4.0, -3, -2, -1, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 100]).view(1, 1, 4, 5)
    both = torch.cat([x, 10 * x], 1)
    for quantile, low, high in ((0.9, -4, 10), (0.75, -3, 9), (1.0, -4, 100)):  # of 4 and of 11 values
        ends = quantile_range(both, "per_channel", quantile)
        assert [e.flatten().tolist() for e in ends] == [[low, 10 * low], [high, 10 * high]]
    assert [e.tolist() for e in quantile_range(x.view(-1, 1), "per_tensor", 0.75)] == [[[-3.0]], [[9.0]]]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("values", [stats.halfnorm, stats.expon])
def test_the_best_quantile_has_nearly_the_least_error(values, bits):
    x = torch.tensor(values.ppf((np.arange(100_000) + 0.5) / 100_000))

    def error(end: float) -> float:
        step = end / (2**bits - 1)
        return ((x / step).round().clamp_max(2**bits - 1) * step - x).square().mean().item()

    least = min(error(end) for end in np.linspace(1, 14, 200))
    assert error(values.ppf(best_quantile(bits))) < 1.04 * least


def test_matches_torch_fake_quantize_per_channel():
    w = torch.randn(5, 3, 3, 3)
    s, z = choose_qparams(w, 4, "per_out_channel")
    expected = torch.fake_quantize_per_channel_affine(w, (1 / s).flatten(), -z.flatten(), 0, -8, 7)
    torch.testing.assert_close(fake_quantize(w, 4, "per_out_channel"), expected, atol=1e-6, rtol=0)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.sampled_from(GRANULARITIES), st.integers(0, 2**31), st.floats(1e-3, 1e3))
def test_properties(bits, granularity, seed, size):
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed)) * size
    s, z = choose_qparams(x, bits, granularity)
    q = quantize(x, s, z, bits)
    assert int(q.min()) >= -(2 ** (bits - 1)) and int(q.max()) < 2 ** (bits - 1)
    once = dequantize(q, s, z)
    assert torch.equal(quantize(once, s, z, bits), q)  # idempotent for fixed parameters
    assert ((once - x).abs() <= 1.01 / s).all()  # never more than a step away
    flat = x.flatten(2)[0, 0].argsort()
    assert (q.flatten(2)[0, 0][flat].diff() >= 0).all()  # order kept


@pytest.mark.parametrize("clamp", [True, False])
def test_gradient_is_one(clamp):
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    fake_quantize(x, 2, clamp=clamp).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4, 4)])
def test_dtypes_and_constant_channels(dtype, shape):
    x = torch.randn(shape).to(dtype)
    x[0] = 0
    out = fake_quantize(x, 3)
    assert out.dtype == dtype and out.isfinite().all() and torch.equal(out[0], x[0])


def test_the_release_s_arithmetic_breaks_in_half_precision():
    x = torch.zeros(1, 1, 2, 2, dtype=torch.float16)
    assert fake_quantize(x, 3, promote=False).isnan().all()


def test_nan_and_infinity_stay_in_their_group():
    x = torch.randn(2, 3, 4, 4)
    x[0, 0, 0, 0], x[1, 1, 0, 0] = float("nan"), float("inf")
    bad = fake_quantize(x, 3).isnan().flatten(2).all(2)
    assert bad.nonzero().tolist() == [[0, 0], [1, 1]]
    assert fake_quantize(x, 3).isnan().sum() == 32
    with pytest.raises(ValueError, match="finite"):
        quantize(x, *choose_qparams(x, 3), 3)


@pytest.mark.parametrize(
    ("x", "bits", "granularity", "message"),
    [
        (X, 1, "per_tensor", "bits"), (X, 9, "per_tensor", "bits"), (X, True, "per_tensor", "bits"),
        (X, 3, "per_pixel", "granularity"), (X.int(), 3, "per_tensor", "int32"),
        (X[0, 0, 0], 3, "per_tensor", r"\(2,\)"),
    ],
)  # fmt: skip
def test_bad_input(x, bits, granularity, message):
    with pytest.raises(UserError, match=message):
        fake_quantize(x, bits, granularity)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_cpu():
    x = torch.randn(4, 8, 16, 16)
    torch.testing.assert_close(fake_quantize(x.cuda(), 3).cpu(), fake_quantize(x, 3))


def test_torch_compiles_it():
    x = torch.randn(20, 16, 8, 8).relu().requires_grad_()
    value = torch.compile(fake_quantize, dynamic=True)(x, 3)
    value.sum().backward()
    assert (x.grad == 1).all()
    off = (value - fake_quantize(x, 3)).abs() / choose_qparams(x, 3).scale  # a tie may be rounded the other way
    assert off.max() < 1.001 and (off > 1e-5).float().mean() < 1e-4


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [(3, 5, 4, 6), (2, 1, 3, 3), (2, 4, 1, 1)])
def test_ranges_do_not_depend_on_the_memory_format(granularity, shape):
    x = torch.randn(shape)
    for plain, other in zip(
        min_max(x, granularity),
        min_max(x.contiguous(memory_format=torch.channels_last), granularity),
        strict=True,
    ):
        assert torch.equal(plain, other)
