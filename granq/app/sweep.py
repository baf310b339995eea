"""Many runs: a list on disk, executed by joblib on this machine or by the workers of a Dask cluster.

A sweep is a folder: ``runs.jsonl`` has a line for every run, with everything ``granq quantize`` needs, and every run
has a folder next to it. A sweep that was stopped anywhere goes on when it is started again.
"""

from __future__ import annotations

import json
import re
import sys
import traceback
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from itertools import product, zip_longest
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from joblib import Parallel, delayed

from granq.app.jobs import Job, from_arguments
from granq.errors import UserError, require
from granq.files import save_atomically, write_csv
from granq.runs import RunFolder


def combine(
    out: Path, networks: Sequence[str], teachers: Sequence[Path], schemes: Sequence[str], bits: Sequence[str],
    recipes: Sequence[str], seeds: Sequence[int], options: Sequence[str],
) -> list[Job]:  # fmt: skip
    """Return a run for every combination; seeds vary slowest, so that every row has its n = 1 early.

    ``{seed}`` in one of the ``options``, which all runs share, becomes the seed of the run.
    """
    if not (networks and schemes and bits) or len(teachers) not in (0, len(networks)):
        raise UserError("a plan needs --data, --network, --schemes and --bits, and --teacher a file for each network")
    asked = {part.partition("=")[0].replace("_", "-") for part in options}
    if planned := asked & {"--seed", "--scheme", "--recipe", "--out", "--resume", "--from-row"}:
        raise UserError(f"a sweep sets {min(planned)} of each run itself; --seeds, --schemes and --recipes list them")
    if missing := [file for file in teachers if not file.is_file()]:
        raise UserError(f"the teacher file {missing[0]} does not exist")
    pairs, jobs = list(zip_longest(networks, teachers)), []
    for seed, recipe, (network, teacher), width, scheme in product(seeds, recipes, pairs, bits, schemes):
        name = re.sub(r"[^\w.-]+", "_", f"{network} {recipe} {scheme} w{width.replace(',', 'a')} s{seed}")
        argv = ["--network", network, "--recipe", recipe, "--scheme", scheme, "--bits", width, "--seed", str(seed)]
        argv += ["--out", str(out / name), *(["--teacher", str(teacher)] if teacher else [])]
        jobs.append(from_arguments([*argv, *(part.replace("{seed}", str(seed)) for part in options)]))
    return jobs


def write_plan(out: Path, jobs: Iterable[Job]) -> None:
    """Add ``jobs`` to the plan in ``out``. Raises UserError if a run of that name is there with other settings."""
    plan = {job.out.name: job for job in (read_plan(out) if (out / "runs.jsonl").exists() else [])}
    for job in jobs:
        foreign = job.out.name not in plan and (job.out / "result.json").exists()
        if foreign or plan.setdefault(job.out.name, job) != job:
            raise UserError(f"{out} has {job.out.name} of another command or with other settings; choose another --out")
    text = "".join(f"{job.model_dump_json()}\n" for job in plan.values())
    save_atomically(out / "runs.jsonl", lambda path: path.write_text(text, encoding="utf-8"))


def read_plan(out: Path) -> list[Job]:
    """Return what ``write_plan`` wrote. Runs lie in ``out``, wherever that was moved to."""
    if not (out / "runs.jsonl").is_file():
        raise UserError(f"{out} holds no sweep; plan one with --data, --network, --schemes and --bits")
    jobs = map(Job.model_validate_json, (out / "runs.jsonl").read_text(encoding="utf-8").splitlines())
    return [job.model_copy(update={"out": out.resolve() / job.out.name}) for job in jobs]  # for workers elsewhere


def status(out: Path) -> pd.DataFrame:
    """Write the rows of finished runs to ``results.csv``, and return how far each run is.

    Columns are run, state (waiting, stopped, running, failed, done), epoch, test_top1 after it, what failed is said,
    and of finished runs the points lost against the teacher.
    """
    rows, results = [], []
    for job in read_plan(out):
        history, result, error = job.out / "history.csv", job.out / "result.json", Path(f"{job.out}.error")
        row: dict[str, Any] = {"run": job.out.name, "state": "waiting", "epoch": 0}
        if result.is_file():
            results.append(found := json.loads(result.read_text()))
            row |= {"state": "done", "lost": found["teacher_top1"] - found["last_top1"]}
        elif RunFolder(job.out).in_use():
            row["state"] = "running"
        elif error.is_file():
            row |= {"state": "failed", "said": error.read_text(encoding="utf-8").splitlines()[-1]}
        elif history.is_file():
            row["state"] = "stopped"
        if history.is_file():
            row |= dict(pd.read_csv(history)[["epoch", "test_top1"]].iloc[-1])
        rows.append(row)
    if results:
        write_csv(out / "results.csv", pd.DataFrame(results))
    return pd.DataFrame(rows).astype({"epoch": int})


def execute(job: Job) -> None:
    """Start or continue one run in this process. What keeps it from its end goes to ``NAME.error``."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # runs share the cores; and with another number of threads the last bits may differ
    error = Path(f"{job.out}.error")
    error.unlink(missing_ok=True)
    try:
        with redirect_stdout(sys.stderr):  # which --json keeps free
            job.model_copy(update={"resume": job.out.exists()}).run()
    except Exception:
        error.write_text(traceback.format_exc(), encoding="utf-8")
    finally:
        torch.set_num_threads(threads)  # a notebook goes on with its own


def run_sweep(out: Path, jobs: int = 1, cluster: str = "", networks: Sequence[str] = ()) -> pd.DataFrame:
    """Execute what the plan lacks, and return the status. Code runs only if ``networks`` names it."""
    states = status(out).state
    left = [job for job, state in zip(read_plan(out), states, strict=True) if state not in ("done", "running")]
    if code := {job.network for job in left if ".py:" in job.network} - {*networks}:
        raise UserError(f"the plan in {out} runs the code {min(code)}: give the command that planned it again")
    if cluster:
        require("distributed", "cluster")
        from distributed import Client

        with Client(cluster) as client:
            if {*client.nthreads().values()} - {1}:  # threads would share torch's random numbers
                raise UserError(f"workers of {cluster} have several threads: start them with --nthreads 1")
            client.gather(client.map(execute, left, pure=False))
    else:
        Parallel(n_jobs=jobs, backend="loky", batch_size=1)(delayed(execute)(job) for job in left)
    return status(out)
