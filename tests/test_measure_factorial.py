"""The factorial: the cells that exist, what a cell quantizes, and resumption."""

import pandas as pd
import pytest
import torch
from torch import nn

from granq.errors import UserError
from granq.generator import build_generator
from granq.measure import factorial, running
from granq.measure.factorial import Cell, factorial_cells, measure_granularity_factorial
from granq.measure.images import generated_batches
from granq.quantizer import fake_quantize


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    rng = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 3, 8, 8, generator=rng), torch.randint(3, (8,), generator=rng)) for _ in range(2)]


def calibration(seed: int) -> list[torch.Tensor]:
    return [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(seed))]


def test_cells_are_those_that_exist() -> None:
    cells = factorial_cells((2, 3))
    assert len(cells) == len(set(cells)) == 2 * 4 * (1 + 4 + 2)
    assert {c.activations for c in cells if c.ranges == "static"} == {"per_tensor", "per_channel"}
    assert {c.ranges for c in cells if c.activations == "full"} == {"none"}


def test_seeds_repeat_only_what_draws() -> None:
    cells = factorial_cells((2,), seeds=2)
    assert {c.ranges for c in cells if c.seed == 1} == {"static"} and len(cells) == 28 + 8


def test_a_cell_quantizes_what_it_says(tiny: nn.Module) -> None:
    """Against a network whose weights are quantized by hand, and one that is left alone."""
    cell = Cell("per_kernel", "full", "none", 2)
    frame = measure_granularity_factorial(tiny, batches(), [cell, Cell("full", "full", "none", 2)], calibration)
    with torch.no_grad():
        for layer in (tiny.conv1, tiny.conv2, tiny.point, tiny.fc):
            layer.weight.copy_(fake_quantize(layer.weight, 2, "per_kernel"))
    right = torch.cat([tiny(x).argmax(1) == y for x, y in batches()])
    assert frame.top1[0] == pytest.approx(100 * right.double().mean().item())
    assert frame.lost[1] == frame.lost_low[1] == frame.lost_high[1] == 0, "full precision in both loses nothing"


def test_static_ranges_come_from_the_calibration(tiny: nn.Module) -> None:
    asked: list[int] = []

    def tiny_range(seed: int) -> list[torch.Tensor]:
        asked.append(seed)
        return [torch.zeros(2, 3, 8, 8)]  # ranges that no image fits into

    with torch.no_grad():  # every class gets its share, and the network is always right
        tiny.fc.bias -= tiny(batches()[0][0]).mean(0)
        own = [(x, tiny(x).argmax(1)) for x, _ in batches()]
    cells = [Cell("full", "per_tensor", kind, 8, 3) for kind in ("static", "dynamic")]
    frame = measure_granularity_factorial(tiny, own, cells, tiny_range)
    assert asked == [3]
    assert frame.top1[1] >= 75 > frame.top1[0] + 10


def test_interval_is_the_binomial_one() -> None:
    """The bootstrap of a share is binomial: standard deviation sqrt(p (1 - p) / n)."""
    found = running.mean_and_interval("top1", (0, 100), (300, 700))
    half = 1.96 * 100 * (0.3 * 0.7 / 1000) ** 0.5
    assert found["top1"] == 70
    assert found["top1_low"] == pytest.approx(70 - half, abs=0.35)
    assert found["top1_high"] == pytest.approx(70 + half, abs=0.35)


def test_resumes_with_the_missing_cells_only(tiny: nn.Module, tmp_path, monkeypatch) -> None:
    cells, out = factorial_cells((2,))[:6], tmp_path / "f.csv"
    whole = measure_granularity_factorial(tiny, batches(), cells, calibration, facts={"dataset": "x"})
    quantize, count = factorial.quantize_model, []

    def fails_at_the_third(*args: object) -> nn.Module:
        count.append(1)
        if len(count) == 3:
            raise RuntimeError("killed")
        return quantize(*args)

    monkeypatch.setattr(factorial, "quantize_model", fails_at_the_third)
    with pytest.raises(RuntimeError, match="killed"):
        measure_granularity_factorial(tiny, batches(), cells, calibration, facts={"dataset": "x"}, out=out)
    assert len(pd.read_csv(out)) == 2
    measure_granularity_factorial(tiny, batches(), cells, calibration, facts={"dataset": "x"}, out=out)
    assert len(count) == 3 + 4
    pd.testing.assert_frame_equal(pd.read_csv(out), whole, rtol=1e-5, check_dtype=False)
    with pytest.raises(UserError, match="measured with dataset x, not y"):
        measure_granularity_factorial(tiny, batches(), cells, calibration, facts={"dataset": "y"}, out=out)
    out.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="lacks the columns batch_size, images, reference_top1"):
        measure_granularity_factorial(tiny, batches(), cells, calibration, out=out)


def test_generated_batches_leave_the_random_state() -> None:
    generator = build_generator(3, 8)
    generator.eval()
    state, before = torch.get_rng_state(), {k: v.clone() for k, v in generator.state_dict().items()}
    drawn = [torch.cat(list(generated_batches(generator, seed, 6, 4))) for seed in (0, 0, 1)]
    assert torch.equal(state, torch.get_rng_state()) and not generator.training
    assert all(torch.equal(v, before[k]) for k, v in generator.state_dict().items())
    assert drawn[0].shape == (6, 3, 8, 8)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
