import torch

from granq import fake_quantize, measure_latency_quantizer
from granq.bench import METHODS, _peak_mb, channel_loop, measure_latency_scaling, textbook_chain


def test_the_timed_methods_compute_the_same():
    x = torch.randn(3, 5, 6, 7)
    expected = fake_quantize(x, 3, clamp=False)
    assert torch.equal(channel_loop(x, 3), expected)
    torch.testing.assert_close(textbook_chain(x, 3), expected)


def test_textbook_gradient_is_one():
    x = torch.rand(2, 3, 4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(textbook_chain(x, 8).sum(), x)
    torch.testing.assert_close(gradient, torch.ones_like(x))


def test_one_row_per_method_and_shape():
    frame = measure_latency_quantizer([(2, 3, 4, 4), (1, 2, 4, 4)], repetitions=2)
    assert len(frame) == 2 * len(METHODS) and (frame.median_ms > 0).all()
    assert (frame.ratio_to_copy[frame.method == "copy"] == 1).all()


def test_scaling_rows_and_memory(capfd):
    """A row for each execution and shape; the grouped one holds every partial sum twice (int32, then rescaled)."""
    frame = measure_latency_scaling((2, 4), (1, 2), fixed=(2, 2), size=8, repetitions=3)
    assert len(frame) == 6 * 3 and (frame.q25_ms <= frame.median_ms).all() and (frame.median_ms <= frame.q75_ms).all()
    grouped = frame[(frame.execution == "accumulation-time, grouped") & (frame.channels == 4)].iloc[0]
    partial_bytes = 2 * 4 * 4 * 8 * 8 * 4
    assert 2 * partial_bytes <= grouped.peak_mb * 1e6 < 3.5 * partial_bytes
    assert (frame.scale_multiplications[frame.execution == "folded"] == 0).all()
    assert not capfd.readouterr().out


def test_peak_memory_is_that_of_the_largest_moment():
    def two_at_once_then_one():
        first = torch.empty(1000, 250)  # 1 MB
        second = first.clone()
        del first, second
        return torch.empty(1000, 250)

    assert abs(_peak_mb(two_at_once_then_one) - 2) < 0.01
