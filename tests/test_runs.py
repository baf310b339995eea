"""Runs that survive: kills, torn and foreign files, full disks. ``docs/reliability.md`` is made of what is seen here.

``GRANQ_WRITE_DOCS=1 pytest tests/test_runs.py`` writes the page anew.
"""

import errno
import gc
import math
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

from granq import QATConfig, cli, files, models, train
from granq import runs as runs_module
from granq.data import describe_data, load_split
from granq.models import top1_on, train_teacher
from granq.qat import Trainer, diversity, generator_trouble
from granq.runs import RunFolder, fingerprint

TINY = QATConfig(epochs=8, warmup_epochs=2, iterations=3, batch_size=4, image_size=8, device="cpu", student_lr=0.1)
PAGE = Path(__file__).parent.parent / "docs/reliability.md"


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    ).eval()


def same_bits(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def score(student: nn.Module) -> float:
    """A metric in which every bit of the student shows; it draws, as a DataLoader does."""
    with torch.no_grad():
        return student(torch.linspace(-2, 2, 768).view(4, 3, 8, 8) + 0 * torch.rand(1)).sum().item()


def run_child(out: Path, ready) -> None:
    torch.set_num_threads(1)
    ready.set()
    train(network(), TINY, evaluate=score, out=out, resume=out.exists())


@pytest.mark.timeout(900)  # 25 processes: long where other work shares the cores
def test_twenty_kills_at_random_moments_change_nothing(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["granq.qat"])
    moments, out, whole = random.Random(0), tmp_path / "run", tmp_path / "whole"

    def start(folder):
        ready = context.Event()
        child = context.Process(target=run_child, args=(folder, ready))
        child.start()
        ready.wait()
        return child, time.perf_counter()

    child, began = start(whole)
    child.join()
    duration = time.perf_counter() - began
    assert child.exitcode == 0
    killed = 0
    for kill in range(20):
        child, _ = start(out)
        time.sleep(moments.random() * min(1, 0.1 + kill / 10) * duration)  # early ones before the first checkpoint
        child.kill()
        child.join()
        killed += child.exitcode == -9
        if RunFolder(out).load() and RunFolder(out).load()["epoch"] == TINY.epochs:
            for file in out.iterdir():  # finished between two kills: start over, there are kills left
                file.unlink()
    child, _ = start(out)
    child.join()
    assert child.exitcode == 0 and killed >= 10
    ours, reference = RunFolder(out).load(), RunFolder(whole).load()
    for part in ("student", "generator"):
        assert same_bits(ours[part], reference[part])
    for name in ("student_optimizer", "generator_optimizer"):
        for i, values in reference[name]["state"].items():
            for key, value in values.items():
                assert torch.equal(torch.as_tensor(ours[name]["state"][i][key]), torch.as_tensor(value))
    assert torch.equal(ours["rng"], reference["rng"]) and ours["ptq_top1"] == reference["ptq_top1"]
    assert reference["rows"][-1]["test_top1"] not in (0, reference["ptq_top1"])
    assert (out / "history.csv").read_bytes() == (whole / "history.csv").read_bytes()


# ---- the fault table: every row is provoked, and the page shows the sentences that came out


def full_disk(folder, monkeypatch):
    def write(path, data):
        with open(path, "wb") as file:
            file.write(bytes(data[: len(data) // 2]))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write)


def read_only(folder, monkeypatch):
    def refuse(*_, **__):  # root ignores permission bits, so the refusal is made here
        raise PermissionError(errno.EACCES, "Permission denied", str(folder.path))

    monkeypatch.setattr(Path, "write_bytes", refuse)


def nan_loss(folder, monkeypatch):
    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, t: step(self, t) | {"student_loss": torch.tensor(float("nan"))})


def out_of_memory(folder, monkeypatch):
    def step(self, train_student):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Trainer, "step", step)


def torn(folder, monkeypatch):
    data = folder.checkpoint.read_bytes()
    folder.checkpoint.write_bytes(data[: len(data) // 2])


def flipped(folder, monkeypatch):
    data = bytearray(folder.checkpoint.read_bytes())
    data[len(data) // 2] ^= 0xFF
    folder.checkpoint.write_bytes(bytes(data))


def foreign(folder, monkeypatch):
    state = torch.load(folder.checkpoint, weights_only=True)
    torch.save(state | {"fingerprint": "another"}, folder.checkpoint)


class Bomb:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return Path.touch, (self.proof,)


def malicious(folder, monkeypatch):
    torch.save({"epoch": 1, "student": Bomb(folder.path.parent / "proof"), "rows": []}, folder.checkpoint)


def both_torn(folder, monkeypatch):
    torn(folder, monkeypatch)
    folder.previous.write_bytes(b"")


def in_use(folder, monkeypatch):
    lock = runs_module.FileLock(folder.path / ".lock", is_singleton=False)
    lock.acquire()
    monkeypatch.setattr(folder, "held", lock, raising=False)  # kept alive until the end of the test


def not_empty(folder, monkeypatch):
    pass


# fault, what is done to a run with 3 of 8 epochs, exception (None: it goes on), what is kept
FAULTS = [
    ("disk full while a checkpoint is written", full_disk, OSError, "the last checkpoint"),
    ("folder not writable", read_only, OSError, "everything"),
    ("a loss becomes NaN", nan_loss, FloatingPointError, "the last checkpoint"),
    ("out of memory", out_of_memory, RuntimeError, "the last checkpoint"),
    ("newest checkpoint torn in half", torn, None, "the epoch before, and the run goes on from it"),
    ("one byte of the newest checkpoint changed", flipped, None, "the epoch before, and the run goes on from it"),
    ("checkpoint of another run", foreign, None, "the epoch before, and the run goes on from it"),
    ("checkpoint that would run a program", malicious, None, "the epoch before; the program is not run"),
    ("both checkpoints torn", both_torn, ValueError, "all files, as they are"),
    ("another process works in the folder", in_use, ValueError, "everything"),
    ("started again without --resume", not_empty, ValueError, "everything"),
]


def provoke(fault, path, monkeypatch):
    """A run stopped after three of eight epochs meets the fault; returns its folder, the sentence, the exit code."""
    _, harm, expected, _ = fault

    class Stop(Exception):
        pass

    def stop(_, calls=[]):  # noqa: B006
        calls.append(1)
        if len(calls) % 3 == 0:  # measured after epochs 2 (the last of the warm-up), 3 and 4
            raise Stop
        return 0.0

    with pytest.raises(Stop):
        train(network(), TINY, evaluate=stop, out=path)
    folder = RunFolder(path)
    harm(folder, monkeypatch)
    if expected is None:
        with pytest.warns(UserWarning, match="continuing from checkpoint.previous.pt") as caught:
            train(network(), TINY, evaluate=lambda _: 0.0, out=path, resume=True)
        return folder, str(caught[0].message), 0
    with pytest.raises(expected) as error:
        train(network(), TINY, evaluate=lambda _: 0.0, out=path, resume=harm is not not_empty)

    def fails(_):
        raise error.value

    monkeypatch.setattr(cli, "_audit", fails)  # any command: what main makes of the error
    return folder, str(error.value), cli.main(["audit", "--network", "any"])


@pytest.fixture(scope="module")
def uninterrupted():
    return train(network(), TINY, evaluate=lambda _: 0.0)


@pytest.mark.parametrize("fault", FAULTS, ids=[f[0] for f in FAULTS])
def test_fault(fault, tmp_path, monkeypatch, uninterrupted):
    with monkeypatch.context() as patches:
        folder, sentence, code = provoke(fault, tmp_path / "run", patches)
    assert "\n" not in sentence and len(sentence) > 20 and (code == 0) == (fault[2] is None)
    assert not (tmp_path / "proof").exists()
    assert not list(folder.path.glob("*.tmp"))
    if fault[1] is both_torn:
        return
    state = folder.load()
    assert state["epoch"] == (TINY.epochs if fault[2] is None else 3)
    if hasattr(folder, "held"):
        folder.held.release()
    # and what is kept leads to the same end as if nothing had happened
    result = train(network(), TINY, evaluate=lambda _: 0.0, out=folder.path, resume=True)
    assert same_bits(result.student.state_dict(), uninterrupted.student.state_dict())
    assert result.history.equals(uninterrupted.history)


def test_the_page_shows_what_users_see(tmp_path, monkeypatch):
    lines = ["| fault | what the user sees | exit code | what is kept |", "|---|---|---|---|"]
    for i, fault in enumerate(FAULTS):
        with monkeypatch.context() as patches:
            folder, sentence, code = provoke(fault, tmp_path / str(i), patches)
            if hasattr(folder, "held"):
                folder.held.release()
        said = re.sub(r"archive/data/\d+", "archive/data/N", sentence.replace(str(folder.path), "RUN"))
        lines.append(f"| {fault[0]} | {said} | {code} | {fault[3]} |")
    table = "\n".join(lines)
    start, end = "<!-- made by tests/test_runs.py -->\n", "\n<!-- end -->"
    page = PAGE.read_text()
    head, rest = page.split(start)
    if os.environ.get("GRANQ_WRITE_DOCS"):
        PAGE.write_text(head + start + table + end + rest.split(end)[1])
    else:
        assert rest.split(end)[0] == table, "run with GRANQ_WRITE_DOCS=1 to write docs/reliability.md anew"


def test_lock_is_free_after_the_run(tmp_path):
    train(network(), TINY, out=tmp_path)
    with RunFolder(tmp_path).claimed():
        pass


def test_fingerprint_knows_teacher_and_settings():
    a = network()
    b = network()
    assert fingerprint({"x": 1}, a) == fingerprint({"x": 1}, b) != fingerprint({"x": 2}, a)
    with torch.no_grad():
        b[0].weight[0, 0, 0, 0] += 1e-6
    assert fingerprint({"x": 1}, a) != fingerprint({"x": 1}, b)


def test_history_is_the_rows(tmp_path):
    result = train(network(), TINY, out=tmp_path)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "history.csv"), result.history)


# ---- long runs, interruptions, what the loop says of itself


def test_interrupt_leaves_a_usable_run(folder, teacher, tmp_path, capfd):
    common = f"--data {folder} --network resnet20_cifar10 --teacher {teacher} --scheme release --bits 3,3"
    budget = "--epochs 40 --warmup-epochs 1 --iterations 1 --batch-size 4 --device cpu"
    out = tmp_path / "run"
    command = [sys.executable, "-m", "granq.cli", "quantize", *common.split(), *budget.split(), "--out", str(out)]
    again = ["quantize", *common.split(), *budget.split(), "--out", str(out), "--resume"]
    listens = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a job in the background inherits deafness to it
    pipes = dict(stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=listens)
    with subprocess.Popen(command, **pipes) as process:
        while not (out / "history.csv").is_file():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGSTOP)  # it stays where it is, and holds the folder
        assert cli.main(again) == 2
        assert f"{out} is in use by another process" in capfd.readouterr().err
        process.send_signal(signal.SIGINT)  # Ctrl-C
        process.send_signal(signal.SIGCONT)
        _, said = process.communicate()
    assert process.returncode == 130
    assert said.splitlines()[-1] == "granq: interrupted; the last checkpoint is kept, --resume continues"
    epochs = RunFolder(out).load()["epoch"]
    assert 1 <= epochs < 40
    assert cli.main(["evaluate", str(out), "--data", folder, "--device", "cpu"]) == 0
    assert cli.main(again) == 0
    assert len(pd.read_csv(out / "history.csv")) == 40


LACKS_MEAN = '{"config": {"image_size": 8}, "network": "a", "data": "b", "teacher_top1": 1, "spec": {"name": "digits"}}'


@pytest.mark.parametrize("text", ["", "{", "[]", '{"config": 3}', '{"config": {}}', '{"config": {"a": 1}}', LACKS_MEAN])
def test_damaged_config_is_one_sentence(tmp_path, text, capsys):
    train(network(), replace(TINY, epochs=2), out=tmp_path / "run")
    (tmp_path / "run/config.json").write_text(text)
    capsys.readouterr()
    assert cli.main(["evaluate", str(tmp_path / "run"), "--data", "digits"]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "config.json" in said


def test_a_teacher_continues_bit_for_bit(tmp_path, monkeypatch):
    few = torch.utils.data.Subset(load_split(describe_data("digits"), "train"), range(40))
    monkeypatch.setattr(models, "load_split", lambda *_: few)
    learn = partial(train_teacher, "resnet20_cifar10", describe_data("digits"), epochs=3, batch_size=16)
    whole, write, path = learn()[0], models.write_checkpoint, tmp_path / "t.partial"

    def stops(*args):
        write(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patches, pytest.raises(KeyboardInterrupt):
        patches.setattr(models, "write_checkpoint", stops)
        learn(checkpoint=path)
    good = path.read_bytes()
    for harm, message in ((good[:999], "not a whole file"), (good, "other settings"), (good, None)):
        path.write_bytes(harm)
        if message:
            with pytest.raises(ValueError, match=f"cannot continue from .*{message}.*; remove it to start again"):
                learn(checkpoint=path, seed=int(harm is good))
    assert same_bits(learn(checkpoint=path)[0].state_dict(), whole.state_dict())


def test_two_processes_do_not_train_one_teacher(tmp_path, capsys):
    out = tmp_path / "t.safetensors"
    with files.hold(out, tmp_path / "t.safetensors.lock"):
        assert cli.main(["teacher", "--data", "digits", "--network", "resnet20_cifar10", "--out", str(out)]) == 2
    assert "is in use by another process" in capsys.readouterr().err


def test_a_diverged_teacher_is_not_saved(tmp_path, monkeypatch, capsys):
    few = torch.utils.data.Subset(load_split(describe_data("digits"), "train"), range(256))  # two steps
    monkeypatch.setattr(models, "load_split", lambda *_: few)
    command = "teacher --data digits --network resnet20_cifar10 --lr 1e30 --epochs 1 --device cpu --out"
    assert cli.main([*command.split(), str(tmp_path / "t.safetensors")]) == 1
    assert "the learning rate 1e+30 is too high" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())  # no lock either


@pytest.mark.parametrize(
    ("channels", "norm", "message"),
    [
        (1, nn.BatchNorm2d(4), r"generated images have 3 channels, but .* cannot take images of \(1, 3, 8, 8\)"),
        (3, nn.Identity(), "no BatchNorm2d layer with running statistics"),
        (3, nn.BatchNorm2d(4, track_running_stats=False), "no BatchNorm2d layer with running statistics"),
    ],
)
def test_a_teacher_that_cannot_teach_leaves_the_folder_free(tmp_path, channels, norm, message):
    teacher = network()
    teacher[0], teacher[1] = nn.Conv2d(channels, 4, 3), norm
    with pytest.raises(ValueError, match=message):
        train(teacher, TINY, out=tmp_path)
    train(network(), replace(TINY, epochs=2), out=tmp_path)


def images_of(kind: str) -> torch.Tensor:
    one = torch.randn(1, 3, 8, 8)
    return torch.randn(64, 3, 8, 8) if kind == "noise" else one.expand(64, -1, -1, -1)


def test_diversity_by_hand():
    assert diversity(images_of("noise")).item() == pytest.approx(1 - 1 / 64, abs=0.03)
    assert diversity(images_of("same")).item() == pytest.approx(0, abs=1e-6)
    two = torch.zeros(2, 1, 1, 2)
    two[0, 0, 0] = torch.tensor([1.0, 3.0])  # pixel variances 1/4 and 9/4, mean 5/4; all four values: mean 1, var 1.5
    assert diversity(two).item() == pytest.approx(1.25 / 1.5)


def test_collapse_and_a_teacher_that_disagrees_are_said_once(monkeypatch, capsys):
    step = Trainer.step
    shown = {"diversity": torch.tensor(0.01)}
    monkeypatch.setattr(Trainer, "step", lambda self, t: step(self, t) | shown)
    train(network(), replace(TINY, epochs=3))
    assert capsys.readouterr().err.count("the generator has collapsed: only 1% of the variance") == 1
    shown = {"teacher_top1": torch.tensor(40.0)}
    train(network(), replace(TINY, epochs=4))
    said = capsys.readouterr().err
    assert said.count("gives only 40 % of the generated images the label") == 1 and "epoch 3:" in said  # after warm-up


def test_memory_and_open_files_stay_flat():
    trainer = Trainer(network(), replace(TINY, scheme="layerwise"))

    def load(steps: int) -> tuple[int, int, float]:
        for _ in range(steps):
            trainer.step(True)
        gc.collect()
        tensors = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
        return tensors, len(os.listdir("/proc/self/fd")), resident

    if not Path("/proc/self/statm").exists():
        pytest.skip("reads /proc: runs on Linux")
    before, after = load(50), load(300)
    # a leak is one object in every step, 300 here; a few may be other tests' that are not collected yet
    assert after[0] < before[0] + 30 and after[1] < before[1] + 5
    assert after[2] - before[2] < 5  # MB


def test_evaluation_keeps_no_graph():
    spec = describe_data("digits")
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    outputs = []
    model.register_forward_hook(lambda *args: outputs.append(args[2]))
    top1_on(model, load_split(spec, "test"), spec)
    assert outputs and not any(o.requires_grad for o in outputs)


def losses(threads: int, config: QATConfig = TINY) -> pd.DataFrame:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return train(network(), config).history
    finally:
        torch.set_num_threads(before)


def test_what_holds_across_thread_counts():
    """Same count: bit for bit. Another count: sums are split elsewhere, so the last bits of float32 may differ."""
    pd.testing.assert_frame_equal(losses(2), losses(2), check_exact=True)
    one, two = losses(1), losses(2)
    first = ["generator_loss", "student_loss", "bn_loss"]
    assert two[first].iloc[0].to_numpy() == pytest.approx(one[first].iloc[0].to_numpy(), rel=1e-4)


def test_going_on_elsewhere_is_said(tmp_path):
    train(network(), replace(TINY, epochs=2), out=tmp_path)
    facts = RunFolder(tmp_path).read_config()
    RunFolder(tmp_path).write_config(facts.pop("config"), facts | {"versions": facts["versions"] | {"torch": "1.0"}})
    with pytest.warns(UserWarning, match="began with .*'1.0'.* and goes on with .*: the last bits may differ"):
        train(network(), replace(TINY, epochs=2), out=tmp_path, resume=True)


def test_measuring_leaves_the_run_as_it_is():
    results = [train(network(), replace(TINY, epochs=3), evaluate=f) for f in (None, score)]
    assert same_bits(*(r.student.state_dict() for r in results))


def test_deterministic_switch_is_on_during_the_run_only():
    during = []
    train(
        network(),
        replace(TINY, epochs=1, warmup_epochs=1, deterministic=True),
        evaluate=lambda _: during.append(torch.are_deterministic_algorithms_enabled()) or 0.0,
    )
    assert during == [True] and not torch.are_deterministic_algorithms_enabled()


class Answers(nn.Module):
    """A network whose answer is ``change`` of its logits (N, 3)."""

    def __init__(self, change):
        super().__init__()
        self.net, self.change = network(), change

    def forward(self, x):
        return self.change(self.net(x))


def seen_in_place(x):
    y = x
    y += 1
    return x


class SeenLater(nn.Module):
    """A cut of a tensor is changed in place between two layers that read the tensor: one quantizer is not enough."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.left, self.right = nn.Conv2d(4, 3, 3), nn.Conv2d(4, 3, 3)

    def forward(self, x):
        x = self.norm(self.first(x))
        y = self.left(x)
        nn.functional.relu(x[:, :2], inplace=True)
        return (y + self.right(x)).mean((2, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: (x, x), "one tensor of logits .* got tuple"),
        (lambda x: x[:, 0], r"one tensor of logits .* got \(1,\)"),
        (lambda x: x * math.nan, "logits are not finite"),
        (seen_in_place, "computes something else even without quantization"),
    ],
)
def test_a_teacher_without_plain_logits_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        train(Answers(change), TINY)


def test_files_of_others_are_not_swept_away(tmp_path):
    (tmp_path / "important.tmp").write_text("mine")
    with pytest.raises(ValueError, match="already holds files"):
        train(network(), TINY, out=str(tmp_path))
    assert (tmp_path / "important.tmp").read_text() == "mine"


def test_a_run_killed_before_its_first_epoch_belongs_to_whoever_continues(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run_epoch", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(network(), TINY, out=tmp_path, facts={"teacher": "a"})
    train(network(), TINY, out=tmp_path, facts={"teacher": "b"}, resume=True)
    assert RunFolder(tmp_path).read_config()["teacher"] == "b"


def test_a_teacher_who_knows_two_classes_well_is_no_trouble():
    row = dict(diversity=0.5, warmup=False, teacher_top1=99.0)
    assert generator_trouble(row, 2) == generator_trouble(row | dict(teacher_top1=100.0), 1) == ""
    assert "gives only 60 %" in generator_trouble(row | dict(teacher_top1=60.0), 2)


def test_four_steps_of_a_teacher():
    """OneCycleLR divides by the rise less one step."""
    spec = describe_data("digits", "resnet20_cifar10")
    train_teacher("resnet20_cifar10", spec, epochs=4, batch_size=1347)


def test_a_teacher_that_one_quantizer_cannot_serve_is_refused():
    with pytest.raises(ValueError, match="computes something else even without quantization"):
        train(SeenLater().eval(), replace(TINY, scheme="strict"))
