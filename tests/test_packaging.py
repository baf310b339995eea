"""pyproject.toml is the only list of dependencies; the other build files point to it."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

import pytest

import granq
from granq.errors import UserError, require

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
        "make lint", "make test", "make wheel", "make notebooks", "make browser",
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
    wanted = "help demo test lowest lint notebooks figures lab browser docs wheel gpu gpu-bundle".split()
    assert [line.split()[0] for line in shown.splitlines()] == wanted


def test_licence_is_mit() -> None:
    assert read("LICENSE").startswith("MIT License\n")
    assert project()["license"] == "MIT"


def test_lab_keeps_its_token_whatever_the_user_configured(tmp_path: Path) -> None:
    (tmp_path / "jupyter_server_config.py").write_text("c.IdentityProvider.token = ''\nc.ServerApp.ip = '0.0.0.0'\n")
    (line,) = [line.strip() for line in read("Makefile").splitlines() if "jupyter lab" in line]
    line = line.replace("$(BIN)/jupyter", f"exec {sys.executable} -m jupyter").replace("$(AS_ROOT)", "--allow-root")
    command = line + " --no-browser --port=0"
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


def test_one_version_and_one_paper_everywhere() -> None:
    version, citation, readme = project()["version"], read("CITATION.cff"), read("README.md")
    assert (
        granq.__version__ == version and f"\nversion: {version}\n" in citation and f"version = {{{version}}}" in readme
    )
    assert f"({version})" in read("CHANGELOG.md") or f"## {version}" in read("CHANGELOG.md")
    preferred = citation[citation.index("preferred-citation:") : citation.index("references:")]
    names = re.findall(r"family-names: (\w+), given-names: (\w+)", preferred)
    assert names and " and ".join(f"{family}, {given}" for family, given in names) in readme
    assert "2503.18339" in preferred and "2503.18339" in readme


def test_extras_hold_what_not_everybody_needs() -> None:
    extras = project()["optional-dependencies"]
    named = {name: {requirement_name(r) for r in requirements} for name, requirements in extras.items()}
    assert {"jupyterlab", "ipywidgets"} <= named["lab"] and {"onnx", "onnxscript"} <= named["export"]
    assert f"granq[{','.join(sorted(extras.keys() - {'dev'}))}]" in extras["dev"]
    needed = {requirement_name(r) for r in project()["dependencies"]}
    assert not needed & set.union(*named.values())


def test_a_missing_extra_is_named_with_its_command() -> None:
    require("torch", "lab")
    with pytest.raises(UserError, match=r"^onyx is not installed; this installs it: pip install 'granq\[export\]'$"):
        require("onyx", "export")
    text = "".join(path.read_text() for path in (ROOT / "granq").rglob("*.py"))
    used = re.findall(r'require\("(\w+)", "(\w+)"\)', text)
    extras = {name: {requirement_name(r) for r in rs} for name, rs in project()["optional-dependencies"].items()}
    provided = {"distributed": "dask"}
    assert used and all(provided.get(module, module) in extras[extra] for module, extra in used)


def lesson_start(notebook: Path) -> str:
    """The code cells of a lesson in front of the first one that trains."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    trains = next(i for i, text in enumerate(code) if re.search(r"train\(|zero_shot|quantize\(\)", text))
    assert trains >= 3, "nothing happens before the first training"
    return "\n\n".join(re.sub(r"^[%!].*$", "", text, flags=re.MULTILINE) for text in code[:trains])


@pytest.mark.wheel
def test_the_wheel_alone_works(tmp_path: Path) -> None:
    """Built, installed into a fresh environment that borrows torch and the rest, and used outside of the checkout."""
    source, dist = tmp_path / "source", tmp_path / "dist"
    shutil.copytree(ROOT / "granq", source / "granq", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE.md"):
        shutil.copy(ROOT / name, source)

    def pip(*arguments: object) -> None:
        command = [sys.executable, "-m", "pip", *map(str, arguments), "--no-deps", "--quiet"]
        subprocess.run(command, check=True, timeout=120)

    pip("wheel", source, "--no-build-isolation", "--wheel-dir", dist)
    (wheel,) = dist.iterdir()
    assert wheel.stat().st_size < 12e6
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("granq/")}
    assert held == {str(path.relative_to(source)) for path in (source / "granq").rglob("*") if path.is_file()}

    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True, timeout=60)
    paths = sysconfig.get_paths("posix_prefix", {"base": str(tmp_path / "env"), "platbase": str(tmp_path / "env")})
    # a path in a .pth file lends its packages, but not what their own .pth files add: not the checkout
    (Path(paths["purelib"]) / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    pip("--python", tmp_path / "env/bin/python", "install", wheel, "--no-index")

    empty = tmp_path / "empty"
    empty.mkdir()
    environment = {"PATH": f"{tmp_path}/env/bin:/usr/bin:/bin", "HOME": str(tmp_path), "MPLBACKEND": "agg"}
    environment |= {name: os.environ[name] for name in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT") if name in os.environ}

    def run(*command: str) -> str:
        options: dict[str, Any] = dict(cwd=empty, env=environment, capture_output=True, text=True, timeout=120)
        done = subprocess.run(command, **options)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "Quantize the digits" in run("granq", "demo", "--help")
    audit = json.loads(run("granq", "audit", "--network", "resnet20_cifar10", "--scheme", "strict", "--json"))
    assert audit["weights_low_bit"] == pytest.approx(100)
    where = "import granq, sys; print(granq.__file__); assert granq.digits_teacher().is_file()"
    assert str(tmp_path / "env") in run("python", "-c", where)
    for helper in (ROOT / "notebooks").glob("*.py"):
        shutil.copy(helper, empty)
    (empty / "first.py").write_text(lesson_start(ROOT / "notebooks/00_start_here.ipynb"))
    assert "teacher" in run("python", "first.py")
    assert not any(empty.glob("runs")), "a lesson's first cells write nothing"
