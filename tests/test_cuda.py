"""What needs a GPU, besides the tests marked cuda elsewhere: ``make gpu`` runs them, others skip them."""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch wants it for deterministic sums, before CUDA starts

from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import same_bits

from granq import QATConfig, calibrate, fake_quantize, quantize_model, train
from granq.quantizer import choose_qparams, quantize
from granq.runs import begin
from granq.schemes import GRANULARITIES, SCHEMES

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: make gpu")]

CONFIG = QATConfig(epochs=3, warmup_epochs=1, iterations=3, batch_size=8, image_size=8, device="cuda", student_lr=0.01)


@pytest.fixture
def deterministic():
    """Torch refuses what could give other bits the next time. Convolutions in float32, not TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def float64():
    """So exact that rounding flips no codes: what two ways of computing find is equal, or one of them is wrong."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_codes_are_those_of_the_cpu(granularity, layout):
    """But where the two divide differently in the last bit, and a value lies on the edge between two codes."""
    x = torch.randn(6, 8, 10, 12).contiguous(memory_format=layout)
    there = x.cuda()
    codes = quantize(there, *choose_qparams(there, 3, granularity), 3).cpu()
    assert (codes != quantize(x, *choose_qparams(x, 3, granularity), 3)).float().mean() < 1e-3


def test_constant_channels_in_half_precision():
    x = torch.full((2, 3, 4, 4), 2.5, dtype=torch.float16, device="cuda")
    assert torch.equal(fake_quantize(x, 3), x)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.usefixtures("deterministic")
def test_a_student_computes_what_it_does_on_the_cpu(tiny, scheme):
    images = torch.randn(16, 3, 8, 8)
    student = quantize_model(tiny, scheme, 4, 4)
    with torch.no_grad():
        calibrate(student, [images])
        expected, found = student(images), student.cuda()(images.cuda()).cpu()
    assert (found - expected).norm() < 0.1 * expected.norm()  # a code may differ by one where a value lies on an edge


@pytest.mark.parametrize("recipe", ["adadfq", "gdfq", "match"])
@pytest.mark.usefixtures("deterministic")
def test_same_seed_same_bits_and_a_resumed_run_too(tiny, tmp_path, recipe):
    config = CONFIG.change(recipe=recipe, scheme={"adadfq": "layerwise", "gdfq": "granq", "match": "foldable"}[recipe])

    def stop(game):
        if game.epoch == 2:
            raise KeyboardInterrupt

    whole, again = train(tiny, config), train(tiny, config)
    with pytest.raises(KeyboardInterrupt):
        train(tiny, config, out=tmp_path, after_epoch=stop)
    resumed = train(tiny, config, out=tmp_path, resume=True)
    for other in (again, resumed):
        assert same_bits(whole.student, other.student) and same_bits(whole.generator, other.generator)
        assert whole.history.equals(other.history)


@pytest.mark.parametrize("scheme", ["granq", "foldable"])
def test_bf16_leaves_weights_and_losses_in_float32_and_close(tiny, scheme):
    results = [train(tiny, CONFIG.change(scheme=scheme, bf16=bf16)) for bf16 in (False, True)]
    for value in results[1].student.state_dict().values():
        assert value.isfinite().all() and value.dtype != torch.bfloat16
    losses = [result.history.generator_loss.iloc[0] for result in results]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_step_never_waits_for_the_gpu(tiny, bf16):
    game = begin(tiny, CONFIG.change(bf16=bf16))
    game.play(True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # whatever synchronizes raises
    try:
        game.play(True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("deterministic", "float64")
def test_a_replayed_step_is_the_step(tiny, monkeypatch):
    """Of the same seed: losses, weights and random numbers, before and after rates change and the generator stops."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    from step import GraphedGame

    config = CONFIG.change(epochs=5, iterations=8, milestones=(2, 3), generator_epochs=4)
    plain, replayed = begin(tiny.double(), config), GraphedGame(tiny.double(), config)
    plain.optimizers["generator"].param_groups[0]["capturable"] = True  # which counts its steps in float32
    states = []
    for game in (plain, replayed):
        torch.cuda.manual_seed(5)
        while game.epoch < config.epochs:
            game.run_epoch(None)
        states.append(torch.cuda.get_rng_state())
    assert replayed.calls == config.iterations and torch.equal(*states)
    pd.testing.assert_frame_equal(pd.DataFrame(plain.rows), pd.DataFrame(replayed.rows), rtol=1e-6)
    for network in ("student", "generator"):
        pairs = zip(getattr(plain, network).parameters(), getattr(replayed, network).parameters(), strict=True)
        for one, other in pairs:
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
