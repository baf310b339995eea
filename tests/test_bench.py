import torch

from granq import fake_quantize, measure_latency_quantizer
from granq.bench import METHODS, channel_loop, textbook_chain


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
