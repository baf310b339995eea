"""A sweep is a list on disk: executed once, continued after anything, told in a table."""

import json
import os
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import pandas as pd
import pytest
import torch

import granq
from granq.app import jobs, sweep
from granq.app.cli import main
from granq.runs import RunFolder

TINY = "--epochs 2 --warmup-epochs 1 --iterations 1 --batch-size 4 --device cpu"


def planned(out, folder, teacher, schemes=("layerwise",), seeds=(0,), options=TINY):
    given = [*options.split(), "--data", folder]
    runs = sweep.combine(out, ["resnet20_cifar10"], [teacher], schemes, ["3,3"], ["adadfq"], seeds, given)
    sweep.write_plan(out, runs)
    return [run.out.name for run in runs]


def test_every_combination_is_planned_once_and_first_seeds_come_first(folder, teacher, tmp_path):
    names = planned(tmp_path, folder, teacher, ("layerwise", "granq"), (0, 1))
    assert names == [f"resnet20_cifar10_adadfq_{s}_w3a3_s{k}" for k in (0, 1) for s in ("layerwise", "granq")]
    assert [run.out.name for run in sweep.read_plan(tmp_path)] == names
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert len(lines) == 4 and json.loads(lines[0])["epochs"] == 2  # one JSON a line, flat


def test_every_seed_may_start_from_a_generator_of_its_own(tmp_path, capsys):
    command = "sweep --data digits --network resnet20_cifar10 --schemes strict --bits 3,3 --seeds 0 7 --status"
    options = ["--generator", "runs/warm_{seed}", "--image-bits", "6", "--out", str(tmp_path / "sweep")]
    assert main([*command.split(), *options]) == 0
    plan = sweep.read_plan(tmp_path / "sweep")
    assert [run.generator for run in plan] == [Path("runs/warm_0"), Path("runs/warm_7")]
    assert all(run.image_bits == 6 and run.warmup_epochs == 0 for run in plan)


def test_a_scheme_of_ones_own_goes_into_a_plan(tmp_path):
    scheme = granq.Scheme(weights="per_kernel", activations="per_sample", skip=("fc",))
    job = jobs.Job(data="digits", network="resnet20_cifar10", out=tmp_path / "mine", scheme=scheme)
    sweep.write_plan(tmp_path, [job])
    assert sweep.read_plan(tmp_path) == [job]


def test_sweep_runs_fails_and_continues(folder, teacher, tmp_path):
    (good,) = planned(tmp_path, folder, teacher)
    broken = sweep.read_plan(tmp_path)[0].model_copy(update={"network": "nope", "out": tmp_path / "broken"})
    sweep.write_plan(tmp_path, [broken])
    assert set(sweep.status(tmp_path).state) == {"waiting"}
    status = sweep.run_sweep(tmp_path, jobs=2).set_index("run")
    assert status.state[good] == "done" and status.epoch[good] == 2
    assert status.state["broken"] == "failed" and "nope" in status.said["broken"]
    assert "Traceback" in (tmp_path / "broken.error").read_text()
    before = (tmp_path / good / "checkpoint.pt").stat().st_mtime_ns
    sweep.run_sweep(tmp_path)
    assert (tmp_path / good / "checkpoint.pt").stat().st_mtime_ns == before  # a finished run is left alone
    table = pd.read_csv(tmp_path / "results.csv")
    assert len(table) == 1 and table.scheme[0] == "layerwise" and table.test_images[0] == 6


def test_a_stopped_run_is_continued_from_its_checkpoint(folder, teacher, tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    (name,) = planned(whole, folder, teacher)
    sweep.execute(sweep.read_plan(whole)[0])
    planned(stopped, folder, teacher)
    save = RunFolder.save

    def stops(self, *args):
        save(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patches, pytest.raises(KeyboardInterrupt):
        patches.setattr(RunFolder, "save", stops)
        sweep.execute(sweep.read_plan(stopped)[0])
    assert sweep.status(stopped).state[0] == "stopped"
    with RunFolder(stopped / name).claimed():
        assert sweep.run_sweep(stopped).state[0] == "running" and not list(stopped.glob("*.error"))
    assert not (stopped / "results.csv").exists()
    sweep.execute(sweep.read_plan(stopped)[0])
    assert sweep.status(stopped).state[0] == "done" and len(pd.read_csv(stopped / "results.csv")) == 1
    assert "1 threads" in RunFolder(stopped / name).read_config()["versions"]["device"]
    assert (stopped / name / "history.csv").read_bytes() == (whole / name / "history.csv").read_bytes()


@pytest.mark.filterwarnings("ignore")  # dask's own, about a worker that went away
def test_a_cluster_loses_a_worker_and_no_row(folder, teacher, tmp_path):
    distributed = pytest.importorskip("distributed", reason="extra: pip install 'granq[cluster]'")
    names = planned(tmp_path, folder, teacher, ("layerwise", "granq"), (0,), TINY.replace("--epochs 2", "--epochs 4"))
    killed = []
    with distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster:

        def kill():
            while not (begun := [n for n in names if (tmp_path / n / "history.csv").exists()]):
                time.sleep(0.01)
            worker = next(w for w in cluster.workers.values() if w.status == distributed.Status.running)
            os.kill(worker.pid, 9)
            killed.extend(name for name in begun if not (tmp_path / name / "result.json").exists())

        thread = threading.Thread(target=kill)
        thread.start()
        status = sweep.run_sweep(tmp_path, cluster=cluster.scheduler_address)
        thread.join()
    assert killed and list(status.state) == ["done"] * 2  # the worker had a run: none in this process
    assert sorted(pd.read_csv(tmp_path / "results.csv").out) == sorted(str(tmp_path / name) for name in names)
    for name in names:
        assert list(pd.read_csv(tmp_path / name / "history.csv").epoch) == [*range(1, 5)]


def test_workers_with_several_threads_are_refused(folder, teacher, tmp_path):
    distributed = pytest.importorskip("distributed", reason="extra: pip install 'granq[cluster]'")
    planned(tmp_path, folder, teacher)
    options = dict(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=":0")
    with distributed.LocalCluster(**options) as cluster, pytest.raises(granq.UserError, match="several threads"):
        sweep.run_sweep(tmp_path, cluster=cluster.scheduler_address)


def test_a_plan_grows_but_never_changes(folder, teacher, tmp_path):
    planned(tmp_path, folder, teacher)
    planned(tmp_path, folder, teacher, seeds=(0, 1))
    assert len(sweep.read_plan(tmp_path)) == 2
    with pytest.raises(granq.UserError, match="other settings"):
        planned(tmp_path, folder, teacher, options=TINY.replace("--epochs 2", "--epochs 9"))
    name = sweep.read_plan(tmp_path)[0].out.name
    (tmp_path / "of_another_command" / name).mkdir(parents=True)
    (tmp_path / "of_another_command" / name / "result.json").write_text("{}")
    with pytest.raises(granq.UserError, match="other settings"):
        planned(tmp_path / "of_another_command", folder, teacher)


def test_command(folder, teacher, tmp_path, capsys):
    out = ["--out", str(tmp_path / "s")]
    given = f"--data {folder} --network resnet20_cifar10 --teacher {teacher} --schemes granq --bits 3,3 {TINY}".split()
    assert main(["sweep", *out, *given, "--status", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [row["state"] for row in shown.pop("rows")] == ["waiting"]
    assert shown == {"out": out[1], "runs": 1, "waiting": 1}
    assert main(["sweep", *out, "--json"]) == 0  # alone, it continues
    assert json.loads(capsys.readouterr().out)["done"] == 1
    for bad, message in (
        (["--out", str(tmp_path / "none")], "holds no sweep"),
        ([*out, "--data", folder], "needs --data, --network"),
        ([*given, "--teacher", "a", "b"], "a file for each network"),
        ([*given, "--schemes", "nope"], "known: granq"),
        # what quantize would refuse, and a plan must not hold
        ([*given, "--epochs", "0"], "epochs should be"),
        ([*given, "--seeds", "0", "-1"], "seed should be"),
        ([*given, "--data", "nope"], "known: digits"),
        ([*given, "--bits", "3,9"], "from 2 to 8"),
    ):
        assert main(["sweep", "--out", str(tmp_path / "t"), *bad]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("option", ["--seed 7", "--scheme strict", "--recipe=match", "--from_row t.csv 1", "--resume"])
def test_what_a_plan_sets_cannot_be_set_for_all_runs(option, tmp_path, capsys):
    command = (
        f"sweep --data digits --network resnet20_cifar10 --schemes granq --bits 3,3 {option} --out {tmp_path / 's'}"
    )
    assert main(command.split()) == 2
    assert "a sweep sets --" in capsys.readouterr().err and not (tmp_path / "s").exists()


def test_the_same_command_may_be_given_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # a relative folder
    command = "sweep --data digits --network resnet20_cifar10 --schemes granq --bits 3,3 --out s --status".split()
    assert main(command) == main([*command, "--seeds", "0", "1"]) == 0
    assert len(sweep.read_plan(Path("s"))) == 2
    assert main(["sweep", "--out", "s", "--seeds", "3", "--status"]) == 2  # alone it would be ignored
    assert "a plan needs" in capsys.readouterr().err


def test_code_in_a_plan_runs_if_it_is_named_again(own, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = f"sweep --data {folder} --network net.py:make --teacher t.pth --schemes strict --bits 3,3 {TINY} --mean "
    planned = [*command.split(), "0.1,0.2,0.3", "--std", "0.4,0.5,0.6", "--out", "sweep"]
    assert main([*planned, "--status"]) == 0
    (run,) = sweep.read_plan(tmp_path / "sweep")
    assert (run.data, run.network, run.teacher) == (folder, "net.py:make", Path("t.pth"))
    assert (run.mean, run.std) == ("0.1,0.2,0.3", "0.4,0.5,0.6")
    assert main(["sweep", "--out", "sweep"]) == 2  # a plan of others may name any code
    assert "net.py:make: give the command that planned it again" in capsys.readouterr().err
    status = sweep.run_sweep(tmp_path / "sweep", networks=["net.py:make"])
    assert set(status.state) == {"done"}


def test_what_a_network_prints_is_no_answer(tmp_path, capsys):
    """Workers of joblib share the standard output, on which --json promises one object."""
    job = Mock(out=tmp_path / "run")
    job.model_copy().run = lambda: print("hello")
    sweep.execute(job)
    assert capsys.readouterr() == ("", "hello\n")


def test_a_notebook_keeps_its_threads(folder, teacher, tmp_path):
    planned(tmp_path, folder, teacher)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        sweep.run_sweep(tmp_path)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
