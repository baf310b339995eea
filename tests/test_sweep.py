"""A sweep is a list on disk: executed once, continued after anything, told in a table."""

import json
import os

import pandas as pd
import pytest

from granq import runs
from granq.cli import main
from granq.generator import build_generator
from granq.runs import RunFolder
from granq.sweep import ENGINES, plan_sweep, read_plan, run_sweep, sweep_results, sweep_status, write_plan

TINY = ["--epochs", "2", "--warmup-epochs", "1", "--iterations", "1", "--batch-size", "4", "--device", "cpu"]


def plan(folder, teacher, schemes=("layerwise",), seeds=(0,)):
    options = ["--data", folder, *TINY]
    return plan_sweep({"resnet20_cifar10": teacher}, schemes, ["3,3"], seeds, options=options)


def test_every_combination_is_planned_once_and_first_seeds_come_first(folder, teacher):
    runs = plan(folder, teacher, ("layerwise", "release"), (0, 1))
    assert [name.split("_", 3)[3] for name in runs] == [
        f"{s}_w3a3_s{k}" for k in (0, 1) for s in ("layerwise", "release")
    ]


def test_every_seed_may_start_from_a_generator_of_its_own(tmp_path, capsys, monkeypatch):
    found = []
    monkeypatch.setattr(runs, "load_generator", lambda run, _: found.append(run.name) or build_generator(10, 32))
    command = "sweep --data digits --network resnet20_cifar10 --schemes strict --bits 3,3 --seeds 0 7 --status"
    options = ["--generator", "runs/warm_{seed}", "--reestimate-batchnorm", "--out", str(tmp_path / "sweep")]
    assert main([*command.split(), *options]) == 0 and capsys.readouterr()
    plans = list(read_plan(tmp_path / "sweep").values())
    assert [p[p.index("--generator") + 1] for p in plans] == ["runs/warm_0", "runs/warm_7"]
    assert found == ["warm_0", "warm_7"]
    assert all("--reestimate-batchnorm" in p for p in plans)


@pytest.mark.parametrize("engine", ENGINES)
def test_sweep_runs_fails_and_continues(folder, teacher, tmp_path, engine):
    if engine == "submitit":
        pytest.importorskip("submitit", reason="extra: pip install 'granq[cluster]'")
    runs = plan(folder, teacher) | {"broken": ["--data", folder, "--network", "nope", "--scheme", "release"]}
    runs["broken"] += ["--bits", "3,3"]
    write_plan(tmp_path / "sweep", runs)
    assert set(sweep_status(tmp_path / "sweep").state) == {"waiting"}
    status = run_sweep(tmp_path / "sweep", jobs=2, engine=engine).set_index("run")
    good = next(iter(runs))
    assert status.state[good] == "done" and status.epoch[good] == 2
    assert status.state["broken"] == "failed" and "unknown network" in status.said["broken"]
    before = (tmp_path / "sweep" / good / "checkpoint.pt").stat().st_mtime_ns
    run_sweep(tmp_path / "sweep", jobs=1)
    assert (tmp_path / "sweep" / good / "checkpoint.pt").stat().st_mtime_ns == before  # a finished run is left alone
    table = pd.read_csv(tmp_path / "sweep" / "results.csv")
    assert len(table) == 1 and table.scheme[0] == "layerwise" and table.test_images[0] == 6


def test_a_stopped_run_is_continued_from_its_checkpoint(folder, teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # wins over what --jobs leaves to each run
    runs = plan(folder, teacher)
    (name,) = runs
    write_plan(tmp_path, runs)
    run_sweep(tmp_path)
    whole = (tmp_path / name / "history.csv").read_bytes()
    os.remove(tmp_path / name / "result.json")  # as if killed before its last lines
    os.replace(tmp_path / name / "checkpoint.previous.pt", tmp_path / name / "checkpoint.pt")
    assert sweep_status(tmp_path).state[0] == "stopped"
    with RunFolder(tmp_path / name).claimed():
        assert sweep_status(tmp_path).state[0] == "running"
        assert run_sweep(tmp_path).state[0] == "running" and "in use" not in (tmp_path / f"{name}.log").read_text()
    assert sweep_results(tmp_path).empty
    assert run_sweep(tmp_path, jobs=2).state[0] == "done"
    assert "1 threads" in RunFolder(tmp_path / name).read_config()["versions"]["device"]
    assert (tmp_path / name / "history.csv").read_bytes() == whole


def test_a_plan_grows_but_never_changes(folder, teacher, tmp_path):
    write_plan(tmp_path, plan(folder, teacher))
    write_plan(tmp_path, plan(folder, teacher, seeds=(0, 1)))
    assert len(read_plan(tmp_path)) == 2
    changed = {name: [*arguments, "--epochs", "9"] for name, arguments in plan(folder, teacher).items()}
    with pytest.raises(ValueError, match="other settings"):
        write_plan(tmp_path, changed)


def test_command(folder, teacher, tmp_path, capsys):
    given = f"--data {folder} --network resnet20_cifar10 --teacher {teacher} --schemes release --bits 3,3".split()
    assert main(["sweep", "--out", str(tmp_path / "s"), *given, *TINY, "--status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"out": str(tmp_path / "s"), "runs": 1, "waiting": 1}
    assert main(["sweep", "--out", str(tmp_path / "s"), "--json"]) == 0  # alone, it continues
    assert json.loads(capsys.readouterr().out)["done"] == 1
    for label in ("cat", "dog"):
        (tmp_path / "broken/test" / label).mkdir(parents=True)
        (tmp_path / "broken/test" / label / "0.jpg").write_text("not an image")
    broken = f"folder:{tmp_path / 'broken'}"
    for bad, message in (
        (["--out", str(tmp_path / "none")], "holds no sweep"),
        (["--out", str(tmp_path / "s"), "--data", folder], "needs --data, --network"),
        (["--out", str(tmp_path / "s"), "--engine", "pbs"], "unknown engine"),
        (["--out", str(tmp_path / "t"), *given, "--teacher", "a", "b"], "1 networks need as many teachers"),
        (["--out", str(tmp_path / "t"), *given, "--schemes", "nope"], "known: release"),
        # what quantize would refuse, and a plan must not hold
        (["--out", str(tmp_path / "t"), *given, "--recipes", "nope"], "known: adadfq"),
        (["--out", str(tmp_path / "t"), *given, "--epochs", "1"], "warmup_epochs must be from 0 to epochs = 1, got 4"),
        (["--out", str(tmp_path / "t"), *given, "--seeds", "0", "-1"], "seed must be from 0"),
        (["--out", str(tmp_path / "t"), *given, "--data", "nope"], "known: digits"),
        (["--out", str(tmp_path / "t"), *given, "--data", "digits"], "does not fit"),
        (["--out", str(tmp_path / "t"), *given, "--network", "nope"], "known are pytorchcv"),
        (["--out", str(tmp_path / "t"), *given, "--teacher", "/nope.pt"], "does not exist"),
        (["--out", str(tmp_path / "t"), *given, "--generator", "/nope"], "holds no run"),
        (["--out", str(tmp_path / "t"), *given, "--image-size", "64"], "was trained at 32 pixels"),
        (["--out", str(tmp_path / "t"), *given, "--engine", "pbs"], "unknown engine"),
        (["--out", str(tmp_path / "t"), *given, "--device", "nope"], "unknown device"),
        (["--out", str(tmp_path / "t"), *given, "--data", broken], "cat/0.jpg is not a usable image"),
    ):
        assert main(["sweep", *bad]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "t").exists()
