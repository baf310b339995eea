"""pyproject.toml is the only list of dependencies; the other build files point to it."""

import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib

ROOT = Path(__file__).resolve().parents[1]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def project() -> dict[str, Any]:
    if sys.version_info < (3, 11):
        pytest.skip("tomllib needs Python 3.11")
    return tomllib.loads(read("pyproject.toml"))["project"]


def requirement_name(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match, requirement
    return match.group().lower()


def environment_entries() -> list[str]:
    lines = [line.split(" #")[0].strip() for line in read("environment.yml").splitlines()]
    listed = lines[lines.index("dependencies:") + 1 :]
    return [line.removeprefix("- ").strip().strip("'\"") for line in listed if line]


def test_every_requirement_has_a_lower_bound() -> None:
    metadata = project()
    requirements = metadata["dependencies"] + sum(metadata["optional-dependencies"].values(), [])
    others = [r for r in requirements if not r.startswith("granq[")]  # an extra may include another
    assert all(">=" in requirement for requirement in others), others


def test_every_lower_bound_becomes_an_exact_version() -> None:
    made = subprocess.run(["make", "-f", "-", "bounds"], cwd=ROOT, capture_output=True, text=True, check=True,
                          input="include Makefile\nbounds:\n\t@$(BOUNDS)\n").stdout.split()  # fmt: skip
    metadata = project()
    requirements = metadata["dependencies"] + sum(metadata["optional-dependencies"].values(), [])
    exact = {re.sub(r"\[.*\]", "", r).replace(">=", "==") for r in requirements if not r.startswith("granq[")}
    assert exact <= set(made) and not any(">" in r for r in made)


def test_environment_defers_to_pyproject() -> None:
    metadata = project()
    assert environment_entries() == [f"python{metadata['requires-python']}", "pip", "pip:", "-e .[dev]"]
    assert "dev" in metadata["optional-dependencies"]
    assert f"name: {metadata['name']}" in read("environment.yml").splitlines()


def test_no_second_dependency_list() -> None:
    assert not list(ROOT.glob("requirements*.txt"))
    assert not (ROOT / "setup.py").exists()
    assert not (ROOT / "setup.cfg").exists()


@pytest.mark.parametrize("name", ["Makefile", ".ci/run"])
def test_build_files_install_no_named_dependency(name: str) -> None:
    """Tools may be run by name; nothing but the project itself may be installed."""
    metadata = project()
    text = read(name)
    installs = re.findall(r"(?:pip3?|conda|mamba|uv)\s+(?:pip\s+)?install\s+(.*)", text)
    ours = "-q -e '.[dev]'"
    assert installs == ([ours, ours + " -c .venv-lowest/bounds.txt"] if name == "Makefile" else [])
    for requirement in metadata["dependencies"] + metadata["optional-dependencies"]["dev"]:
        dependency = re.escape(requirement_name(requirement))
        assert not re.search(rf"(?<![\w-]){dependency}\s*(\[.*\])?\s*[=<>~!]=", text), requirement


def test_ci_runs_make_test() -> None:
    lines = read(".ci/run").splitlines()
    assert "set -euo pipefail" in lines
    assert [line for line in lines if line.startswith("make ")] == [
        "make lint", "make test", "make notebooks", "make browser",
    ]  # fmt: skip
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_every_folder_and_file_is_shipped() -> None:
    """A wheel holds every module, and what is no module: the stub, styles, tables, a teacher."""
    config = tomllib.loads(read("pyproject.toml")) if project() else {}
    shipped = {
        path
        for package, globs in config["tool"]["setuptools"]["package-data"].items()
        for glob in globs
        for path in (ROOT / package.replace(".", "/")).glob(glob)
    }
    others = [p for p in (ROOT / "granq").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert {p for p in others if p.suffix != ".py"} == shipped
    assert all((p.parent / "__init__.py").is_file() for p in others if p.suffix == ".py")


def test_every_target_says_what_it_does() -> None:
    command = ["make", "--no-print-directory", "help"]  # as it is inside another make, too
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    wanted = "help demo test lowest lint notebooks figures lab browser docs gpu gpu-bundle".split()
    assert [line.split()[0] for line in shown.splitlines()] == wanted


def test_licence_is_mit() -> None:
    assert read("LICENSE").startswith("MIT License\n")
    assert project()["license"] == "MIT"


def test_lab_keeps_its_token_whatever_the_user_configured(tmp_path: Path) -> None:
    (tmp_path / "jupyter_server_config.py").write_text("c.IdentityProvider.token = ''\nc.ServerApp.ip = '0.0.0.0'\n")
    (line,) = [line.strip() for line in read("Makefile").splitlines() if "jupyter lab" in line]
    command = (
        line.replace("$(BIN)/jupyter", f"exec {sys.executable} -m jupyter") + " --no-browser --allow-root --port=0"
    )
    environment = os.environ | {"JUPYTER_CONFIG_DIR": str(tmp_path)}
    with subprocess.Popen(command, shell=True, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as lab:
        try:
            assert lab.stderr
            shown = next(line for line in lab.stderr if "/lab" in line and "http://" in line)
            address = re.search(r"http://127\.0\.0\.1:\d+(?=/lab\S*token=\w{48})", shown)
            assert address, shown
            answer = None
            for _ in range(60):  # it says so shortly before it listens
                try:
                    answer = urllib.request.urlopen(f"{address[0]}/api/contents", timeout=30).status
                except urllib.error.HTTPError as error:
                    answer = error.code
                except OSError:
                    time.sleep(0.5)
                    continue
                break
            assert answer == 403
        finally:
            lab.kill()
