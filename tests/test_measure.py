"""Measurements against plain computations, their column contract, and memory that does not grow with batches."""

import copy
import gc

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import granq
from granq.convert import calibrate, quantize_model
from granq.data import DataSpec
from granq.generator import Generator
from granq.measure import layer_error, running
from granq.models import right
from granq.quantizer import choose_qparams, fake_quantize

LAYERS = ["conv1", "conv2", "point", "fc"]
SPEC = DataSpec(name="digits", classes=3, image_size=8, mean=(0.3,) * 3, std=(0.4,) * 3)


def images(count: int = 3, n: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 3, 8, 8, generator=generator) for _ in range(count)]


def inputs_of(model: nn.Module, layer: str, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    seen = []
    hook = model.get_submodule(layer).register_forward_pre_hook(lambda m, args: seen.append(args[0].detach().clone()))
    for batch in batches:
        model(batch)
    hook.remove()
    return seen


MEASURES = {
    "scale_maps": (
        lambda m: granq.measure_scale_maps(m, images()[0], "conv2", 3),
        ["layer", "bits", "granularity", "image", "channel", "scale"],
        4 * 5 * 4,
    ),
    "activation_distortion": (
        lambda m: granq.measure_activation_distortion(m, images(), ["conv2", "fc"], bits=(3, 4)),
        ["layer", "bits", "granularity", "bin_left", "bin_right", "density_full_precision", "density_quantized",
         "rms_error", "mse", "sqnr_db", "images"],
        2 * 2 * 3 * running.BINS,
    ),
    "channel_scales": (
        lambda m: granq.measure_channel_scales(m, images()),
        ["layer", "channel", "source", "granularity", "bits", "scale", "scale_min", "scale_max", "images"],
        3 + 4 + 4 + 4,
    ),
    "layer_error": (
        lambda m: granq.measure_layer_error(m, images(), ["granq", "layerwise"], 3),
        ["layer", "scheme", "weight_bits", "act_bits", "mode", "mse", "sqnr_db", "cosine_similarity", "images"],
        4 * 2 * 2,
    ),
    "channel_error": (
        lambda m: granq.measure_layer_error(m, images(), ["strict"], (4, 3), per_channel=True, layers=["conv2"]),
        ["layer", "scheme", "weight_bits", "act_bits", "mode", "channel", "mse", "sqnr_db", "cosine_similarity",
         "images"],
        2 + 4 * 2,
    ),
    "synthetic_gap": (
        lambda m: granq.measure_synthetic_gap(m, images(2), images()),
        ["layer", "channel", "mean_synthetic", "mean_real", "variance_synthetic", "variance_real", "ks_distance",
         "images_synthetic", "images_real"],
        3 + 4 + 4 + 4,
    ),
    "generated_images": (
        lambda m: granq.measure_generated_images(Generator(3, 8), m, SPEC, per_class=2),
        ["label", "sample", "predicted", "confidence", "size", "pixels"],
        6,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MEASURES)
def test_columns_and_rows(name: str, tiny: nn.Module) -> None:
    measure, columns, rows = MEASURES[name]
    before = {k: v.clone() for k, v in tiny.state_dict().items()}
    frame = measure(tiny)
    assert list(frame.columns) == columns
    assert len(frame) == rows
    if "channel" in frame and "mode" in frame:  # rows of layers first, then those of their channels
        assert list(frame.channel.isna()) == [True] * 2 + [False] * 8
        frame = frame.dropna(subset="channel")
    assert not frame.drop(columns="rms_error", errors="ignore").isna().any().any()
    assert all(torch.equal(v, before[k]) for k, v in tiny.state_dict().items())
    assert not any(m._forward_hooks for m in tiny.modules()), "a hook was left behind"


def test_scale_maps_are_the_quantizer_s(tiny: nn.Module) -> None:
    frame = granq.measure_scale_maps(tiny, images()[0], "conv2", 3)
    x = inputs_of(tiny, "conv2", images(1))[0]
    for name, rows in frame.groupby("granularity"):
        expected = choose_qparams(x, 3, str(name)).scale.flatten(1).expand(5, 4)
        assert torch.equal(torch.tensor(rows.pivot(index="image", columns="channel", values="scale").values), expected)


def test_distortion_equals_plain_computation_over_all_batches(tiny: nn.Module) -> None:
    frame = granq.measure_activation_distortion(tiny, images(), ["conv2"], bits=[3])
    xs = inputs_of(tiny, "conv2", images())
    for name, rows in frame.groupby("granularity"):
        values = [fake_quantize(x, 3, str(name)) for x in xs]
        error = torch.cat([v - x for v, x in zip(values, xs, strict=True)]).double()
        expected = 10 * torch.log10(torch.cat(xs).double().square().sum() / error.square().sum())
        assert rows.sqnr_db.iloc[0] == pytest.approx(expected.item(), abs=1e-4)
        width = rows.bin_right - rows.bin_left
        for column in ("density_full_precision", "density_quantized"):
            assert (rows[column] * width).sum() == pytest.approx(1)
        share = (rows.density_full_precision * width).to_numpy()
        assert np.nansum(share * rows.rms_error**2) == pytest.approx(error.square().mean().item(), rel=1e-6)


@pytest.mark.parametrize("granularity", ["per_channel", "per_sample_channel"])
def test_channel_scales_over_batches(tiny: nn.Module, granularity: str) -> None:
    frame = granq.measure_channel_scales(tiny, images(), granularity, "real", bits=3)
    x = torch.cat(inputs_of(tiny, "conv2", images()))
    scales = choose_qparams(x, 3, granularity).scale[:, :, 0, 0].mean(0)  # all batches as one
    np.testing.assert_allclose(frame[frame.layer == "conv2"].scale, scales, rtol=1e-6)


def test_layer_error_local_and_accumulated(tiny: nn.Module) -> None:
    """Both modes against outputs collected by hand; local starts from the clean input, accumulated does not."""
    batches = images()
    frame = granq.measure_layer_error(tiny, iter(batches), ["strict"], (4, 3))
    student = quantize_model(tiny, "strict", 4, 3)
    calibrate(student, batches[:1])
    with torch.no_grad():
        clean = inputs_of(tiny, "conv2", batches)
        reference = torch.cat([tiny.conv2(x) for x in clean]).double()
        local = torch.cat([student.conv2(fake_quantize(x, 3, "per_sample_channel")) for x in clean]).double()
        dirty = inputs_of(student, "conv2", batches)  # already quantized: the hook sits behind the quantizer
        accumulated = torch.cat([student.conv2(x) for x in dirty]).double()
    for mode, value in (("local", local), ("accumulated", accumulated)):
        row = frame[(frame.layer == "conv2") & (frame["mode"] == mode)].iloc[0]
        assert row.mse == pytest.approx((value - reference).square().mean().item(), rel=1e-4)
        assert row.cosine_similarity == pytest.approx(
            torch.cosine_similarity(value.flatten(), reference.flatten(), 0).item(), abs=1e-5
        )
    assert not torch.equal(local, accumulated)


def test_every_call_of_a_layer_has_the_quantizer_of_its_own_input() -> None:
    """Called on the image, which ``layerwise`` leaves alone, and on a ReLU a hundred times as large."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv((100 * self.conv(x)).relu())

    torch.manual_seed(0)
    model, (x,) = Twice().eval(), images(1)
    frame = granq.measure_layer_error(model, [x], ["layerwise"], 8, modes=["local"])
    student = quantize_model(model, "layerwise", 8, 8)
    calibrate(student, [x])
    with torch.no_grad():
        place, behind = student.get_submodule("act_quant.relu"), (100 * model.conv(x)).relu()
        errors = [student.conv(x) - model.conv(x), student.conv(place(behind)) - model.conv(behind)]
    assert frame.mse[0] == pytest.approx(torch.stack(errors).double().square().mean().item(), rel=1e-4)


def test_first_layer_has_no_error_before_it(tiny: nn.Module) -> None:
    frame = granq.measure_layer_error(tiny, images(), ["strict"], 3, layers=["conv1"]).set_index("mode")
    assert frame.mse["local"] == pytest.approx(frame.mse["accumulated"])


def test_in_place_relu_does_not_hide_errors() -> None:
    """A ReLU that overwrites the reference output in place must not change what it is compared with."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    inplace = nn.Sequential(plain[0], nn.ReLU(inplace=True), plain[2]).eval()
    a, b = (granq.measure_layer_error(m, images(), ["strict"], 3) for m in (plain, inplace))
    np.testing.assert_allclose(a.mse, b.mse)


def test_equal_images_have_no_gap(tiny: nn.Module) -> None:
    frame = granq.measure_synthetic_gap(tiny, images(), images())
    assert frame.ks_distance.max() == 0
    shifted = granq.measure_synthetic_gap(tiny, [x + 100 for x in images()], images())
    # the first batch fixes the quantiles, so values of later batches above its maximum are not seen
    assert (shifted[shifted.layer == "conv1"].ks_distance > 0.99).all()


def test_gap_counts_what_a_library_counts(tiny: nn.Module) -> None:
    from scipy.stats import ks_2samp

    synthetic = [x * 1.5 for x in images(2)]
    frame = granq.measure_synthetic_gap(tiny, synthetic, images()).query("layer == 'conv1'")
    for channel, row in enumerate(frame.itertuples()):
        ours, theirs = (torch.cat(b)[:, channel].flatten().numpy() for b in (synthetic, images()))
        # 64 of all the places where the distance could be largest: never above the exact one, and close to it
        exact = ks_2samp(ours, theirs).statistic
        assert exact - 0.04 < row.ks_distance <= exact + 1e-9
        assert row.variance_synthetic == pytest.approx(ours.var(), rel=1e-4)


def test_generated_images_are_reproducible_and_leave_the_generator_alone(tiny: nn.Module) -> None:
    generator = Generator(3, 8)
    before, rng = {k: v.clone() for k, v in generator.state_dict().items()}, torch.get_rng_state()
    first, again = (granq.measure_generated_images(generator, tiny, SPEC) for _ in range(2))
    assert first.equals(again)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in generator.state_dict().items())
    assert granq.decode_pixels(first.pixels[0], 8).shape == (8, 8, 3)


def test_one_s_own_generator_and_scheme(tiny: nn.Module) -> None:
    class Gray(nn.Module):
        def forward(self, noise: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return noise[:, :64].reshape(-1, 1, 8, 8).expand(-1, 3, -1, -1)

    pixels = granq.measure_generated_images(Gray(), tiny, SPEC).pixels[0]
    assert np.ptp(granq.decode_pixels(pixels, 8), axis=2).max() == 0
    names = "mse sqnr_db cosine_similarity".split()
    own, known = (granq.measure_layer_error(tiny, images(1), [s], 3) for s in (granq.SCHEMES["strict"], "strict"))
    pd.testing.assert_frame_equal(own[names], known[names])


def test_a_channel_of_zeros_has_no_angle() -> None:
    model = nn.Conv2d(3, 2, 1)
    model.weight.data[0], model.bias.data[0] = 0, 0
    frame = granq.measure_layer_error(nn.Sequential(model), images(1), ["strict"], 3, per_channel=True)
    assert frame.cosine_similarity[frame.channel == 0].isna().all() and (frame.mse[frame.channel == 0] == 0).all()
    assert frame.cosine_similarity[frame.channel == 1].between(0.9, 1).all()


@pytest.mark.parametrize("name", ["activation_distortion", "channel_scales", "layer_error", "synthetic_gap"])
def test_memory_does_not_grow_with_batches(name: str, tiny: nn.Module) -> None:
    """Tensor bytes alive when the last batch is asked for: the same after 3 and after 12 batches."""

    def alive(count: int) -> int:
        held = []

        def stream():
            for i in range(count):
                if i == count - 1:
                    gc.collect()
                    tensors = (o for o in gc.get_objects() if type(o) is torch.Tensor)
                    held.append(sum(t.untyped_storage().nbytes() for t in tensors))
                yield torch.randn(4, 3, 8, 8)

        {
            "activation_distortion": lambda b: granq.measure_activation_distortion(tiny, b, LAYERS),
            "channel_scales": lambda b: granq.measure_channel_scales(tiny, b),
            "layer_error": lambda b: granq.measure_layer_error(tiny, b, ["strict"], 3),
            "synthetic_gap": lambda b: granq.measure_synthetic_gap(tiny, b, images(1)),
        }[name](stream())
        return held[0]

    gc.freeze()  # only tensors from now on are looked through
    few, many = alive(3), alive(12)
    gc.unfreeze()
    assert 0 < many <= few + 1024


def test_bad_input_is_told(tiny: nn.Module) -> None:
    with pytest.raises(granq.UserError, match="unknown layer 'nowhere'; known: conv1, "):
        granq.measure_activation_distortion(tiny, images(), ["nowhere"])
    with pytest.raises(granq.UserError, match="unknown mode"):
        granq.measure_layer_error(tiny, images(), ["strict"], 3, modes=["global"])
    for measure in (granq.measure_channel_scales, lambda m, b: granq.measure_layer_error(m, b, ["strict"], 3)):
        with pytest.raises(granq.UserError, match="no image"):
            measure(tiny, [])
        with pytest.raises(granq.UserError, match=r"images \(N, 3, H, W\), got \(3, 8, 8\)"):
            measure(nn.Sequential(tiny.conv1, tiny.point), images()[0])  # without BatchNorm nothing else would notice


def test_a_student_of_others_is_measured_in_eval_mode(tiny: nn.Module) -> None:
    class Noisy(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(nn.functional.dropout(x, training=self.training))

    student = copy.deepcopy(tiny)
    student.conv2 = Noisy(4, 4, 3, padding=1)
    student.conv2.load_state_dict(tiny.conv2.state_dict())
    frame = granq.measure_layer_error(tiny, images(), {"noisy": student.train()}, layers=["conv2"], modes=["local"])
    assert frame.sqnr_db.tolist() == [float("inf")] and student.training


def test_only_what_runs_in_integers_is_walked_in_integers(tiny: nn.Module) -> None:
    for student, layer in ((tiny, "conv1"), (granq.quantize_model(tiny, "strict", 3, 3), "conv1"),
                           (granq.quantize_model(tiny, "foldable", 3, 3), "conv1")):  # fmt: skip
        with pytest.raises(granq.UserError, match="is no convolution of a calibrated foldable student"):
            granq.measure_integer_walk(student, images()[0], layer)


def test_sums_in_float64_leave_a_device_that_has_none() -> None:
    """Apple's MPS refuses float64. Fake tensors carry its name without such a machine."""
    with FakeTensorMode():
        x = torch.empty(2, 3, 4, 4, device="mps")
        for sums in (
            layer_error._energy(x, nn.Conv2d(3, 3, 1)),
            layer_error._energy(x, nn.Linear(4, 4)),
            running.where_float64_is(x),
            running.by_channel(x, nn.Conv2d(3, 3, 1)),
        ):
            assert sums.device.type == "cpu"


def test_training_mode_changes_nothing(tiny: nn.Module) -> None:
    """A fresh network is in training mode: it is measured in eval mode, and gets back what it had."""
    wanted = {name: measure(tiny) for name, (measure, _, _) in MEASURES.items() if name != "generated_images"}
    tiny.train()
    tiny.bn1.eval()
    before = {k: v.clone() for k, v in tiny.state_dict().items()}
    for name, frame in wanted.items():
        pd.testing.assert_frame_equal(MEASURES[name][0](tiny), frame)
    assert all(torch.equal(v, before[k]) for k, v in tiny.state_dict().items())
    assert tiny.training and tiny.conv1.training and not tiny.bn1.training


def test_a_layer_named_twice_is_one(tiny: nn.Module) -> None:
    frames = [granq.measure_activation_samples(tiny, {"a": images()[0]}, ["conv1"] * times) for times in (1, 2)]
    pd.testing.assert_frame_equal(*frames)


class ChannelsLast(nn.Module):
    """A Linear on (N, H, W, C), as in ConvNeXt and Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.wide, self.fc = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.wide(self.conv(x).permute(0, 2, 3, 1).relu()).mean((1, 2)))


def test_channels_in_front_of_a_linear_are_the_last_dimension() -> None:
    model = ChannelsLast().eval()
    ranges = granq.measure_ranges(model, images()).query("part == 'activations' and layer == 'wide'")
    seen = torch.cat(inputs_of(model, "wide", images())).flatten(0, 2)
    np.testing.assert_allclose(ranges.low, seen.amin(0).numpy())
    np.testing.assert_allclose(ranges.high, seen.amax(0).numpy())
    errors = granq.measure_layer_error(model, images(), ["strict"], 3, per_channel=True, layers=["wide"])
    assert errors.channel.max() == 11
    scales = granq.measure_channel_scales(model, images(), "per_channel")
    assert scales.query("layer == 'wide'").channel.max() == 5


def test_a_layer_that_is_called_twice_is_shown_once(tiny: nn.Module) -> None:
    tiny.point = tiny.conv2
    maps = granq.measure_scale_maps(tiny, images()[0], ["conv2"], 3)
    assert not maps.duplicated(["granularity", "image", "channel"]).any()


def test_layers_of_any_other_kind_are_measured_as_they_are(tiny: nn.Module) -> None:
    class Rounded(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (8 * self.layer(x)).round() / 8

    other = copy.deepcopy(tiny)
    other.conv2 = Rounded(other.conv2)
    frame = granq.measure_layer_error(tiny, images(), {"theirs": other}, modes=["local"], layers=["conv1", "conv2"])
    assert frame.mse[0] == 0 < frame.mse[1]


def test_labels_in_a_column_and_images_in_a_list_are_understood(tiny: nn.Module) -> None:
    x, labels = images()[0], torch.tensor([0, 1, 2, 0, 1])
    for measure in (
        lambda y: right(tiny, [(x, y)]).tolist(),
        lambda y: granq.measure_sensitivity(tiny, [(x, y)], "strict", 2, kinds=["alone"]).top1.tolist(),
    ):
        assert measure(labels) == measure(labels[:, None])
    assert "top1" not in granq.measure_sensitivity(tiny, [[x]], "strict", 2, kinds=["alone"])
