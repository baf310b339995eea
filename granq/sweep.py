"""Many independent runs: a list on disk, executed by joblib or submitit, with a status table that survives restarts.

A sweep is a folder: ``sweep.json`` lists what ``granq quantize`` is called with for every run, and every run has its
own folder beside it. Nothing else is remembered: a sweep that was stopped anywhere goes on when it is started again.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd

from granq.checks import one_of
from granq.files import save_atomically, write_csv
from granq.runs import RunFolder

ENGINES = ("joblib", "submitit")


def plan_sweep(
    teachers: dict[str, Path | None],
    schemes: Sequence[str],
    bits: Sequence[str],
    seeds: Sequence[int],
    recipes: Sequence[str] = ("adadfq",),
    options: Sequence[str] = (),
) -> dict[str, list[str]]:
    """Run name -> arguments of ``granq quantize``; seeds vary slowest, so that every row has its n = 1 early.

    Args:
        teachers: network name -> teacher file, None for downloaded weights.
        schemes: names in ``granq.SCHEMES``.
        bits: such as ``3,3``.
        seeds: one run each.
        recipes: names in ``granq.config.RECIPES``.
        options: arguments common to all runs, such as ``["--data", "digits", "--epochs", "40"]``; ``{seed}`` in one
            becomes the seed of the run.
    """
    runs = {}
    for seed, recipe, (network, teacher), bit, scheme in itertools.product(
        seeds, recipes, teachers.items(), bits, schemes
    ):
        weight_bits, act_bits = bit.split(",")
        name = f"{network.replace(':', '_')}_{recipe}_{scheme}_w{weight_bits}a{act_bits}_s{seed}"
        runs[name] = ["--network", network, *(("--teacher", str(teacher)) if teacher else ()), "--scheme", scheme]
        runs[name] += ["--bits", bit, "--recipe", recipe, "--seed", str(seed)]
        runs[name] += [part.replace("{seed}", str(seed)) for part in options]
    return runs


def write_plan(out: Path, runs: dict[str, list[str]]) -> None:
    """Add ``runs`` to the plan in ``out``. Raises ValueError if a name is there with other arguments."""
    known = read_plan(out) if (out / "sweep.json").exists() else {}
    if changed := [name for name in runs if known.get(name, runs[name]) != runs[name]]:
        raise ValueError(f"{out} plans {changed[0]} with other settings; choose another --out for these")
    out.mkdir(parents=True, exist_ok=True)
    save_atomically(out / "sweep.json", lambda path: path.write_text(json.dumps(known | runs, indent=1)))


def read_plan(out: Path) -> dict[str, list[str]]:
    """What ``write_plan`` wrote. Raises ValueError if there is none."""
    try:
        return dict(json.loads((out / "sweep.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{out} holds no sweep ({error}); plan one with --schemes, --bits and --seeds") from error


def sweep_status(out: Path) -> pd.DataFrame:
    """One row per run: run, state (waiting, stopped, running, failed, done), epoch, last_top1, best_top1, said."""
    rows: list[dict[str, Any]] = []
    for name in read_plan(out):
        folder, result, log = RunFolder(out / name), out / name / "result.json", out / f"{name}.log"
        row: dict[str, Any] = {"run": name, "state": "waiting", "epoch": 0}
        history = folder.path / "history.csv"
        if history.is_file():
            table = pd.read_csv(history)
            row |= {"state": "stopped", "epoch": int(table.epoch.iloc[-1])}
            row |= {"last_top1": table.test_top1.iloc[-1], "best_top1": table.test_top1.max()}
        if result.is_file():
            row["state"] = "done"
        elif folder.in_use():
            row["state"] = "running"
        elif log.is_file() and (said := [line for line in log.read_text().splitlines() if line.startswith("granq: ")]):
            row |= {"state": "failed", "said": said[-1].removeprefix("granq: ")}
        rows.append(row)
    return pd.DataFrame(rows, columns=["run", "state", "epoch", "last_top1", "best_top1", "said"])


def sweep_results(out: Path) -> pd.DataFrame:
    """One row per finished run, with everything ``granq quantize`` says of it; also kept as ``results.csv``."""
    found = [out / name / "result.json" for name in read_plan(out)]
    table = pd.DataFrame([json.loads(path.read_text()) for path in found if path.is_file()]).drop(
        columns="out", errors="ignore"
    )
    write_csv(out / "results.csv", table)
    return table


def run_one(out: Path, name: str, arguments: Sequence[str], threads: int) -> int:
    """Start or continue one run in a process of its own; its output goes to ``<name>.log``. Returns the exit code.

    ``OMP_NUM_THREADS`` of the caller wins over ``threads``: results are the same bit for bit at the same count only.
    """
    folder = out / name
    resume = ["--resume"] if RunFolder(folder).config.is_file() else []
    command = [sys.executable, "-m", "granq.cli", "quantize", *arguments, "--out", str(folder), *resume]
    with open(out / f"{name}.log", "w") as log:
        return subprocess.run(
            command, stdout=log, stderr=log, env={"OMP_NUM_THREADS": str(threads)} | os.environ, check=False
        ).returncode


def check_engine(engine: str) -> None:
    """Raise ValueError if ``engine`` is unknown or not installed."""
    one_of("engine", engine, ENGINES)
    if engine == "submitit" and not find_spec("submitit"):
        raise ValueError("engine submitit needs the package submitit: pip install 'granq[cluster]'")


def run_sweep(out: Path, jobs: int = 1, engine: str = "joblib", **slurm: Any) -> pd.DataFrame:
    """Execute what the plan lacks, ``jobs`` runs at once, and return the status.

    Args:
        out: folder of ``write_plan``.
        jobs: runs at once; the processor's threads are shared among them.
        engine: ``joblib`` on this machine, ``submitit`` for Slurm (locally where there is no Slurm).
        slurm: parameters of submitit's executor, such as ``timeout_min`` and ``slurm_partition``.
    """
    check_engine(engine)
    status = sweep_status(out)
    open_names = set(status.run[~status.state.isin(["done", "running"])])  # running: in another sweep of this folder
    open_runs = [(n, a) for n, a in read_plan(out).items() if n in open_names]
    threads = max(1, (os.cpu_count() or 1) // jobs)
    if engine == "joblib":
        from joblib import Parallel, delayed

        # every run is a process of its own, so threads that wait for them are enough
        Parallel(n_jobs=jobs, backend="threading")(delayed(run_one)(out, n, a, threads) for n, a in open_runs)
    else:
        import submitit

        executor = submitit.AutoExecutor(folder=out / "submitit")
        executor.update_parameters(**({"slurm_array_parallelism": jobs, "timeout_min": 24 * 60} | slurm))
        with executor.batch():
            waiting = [executor.submit(run_one, out, n, a, threads) for n, a in open_runs]
        for job in waiting:
            job.result()
    sweep_results(out)
    return sweep_status(out)
