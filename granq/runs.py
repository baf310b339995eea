"""One run, from settings to a result: claimed by one process, checkpointed after every epoch, resumed to the same bits.

In a run folder ``config.json`` says what the run is, ``checkpoint.pt`` holds its last epoch, ``history.csv`` its rows.
Nothing in it is ever executed: settings are JSON, checkpoints load with ``weights_only=True``.
"""

import hashlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from filelock import FileLock, Timeout
from torch import Tensor, fx, nn
from tqdm.auto import tqdm

from granq.config import QATConfig
from granq.data import DataSpec, dataset_name
from granq.devices import commit, own_random_state, resolve_device, versions
from granq.errors import UserError
from granq.files import read_checkpoint, save_atomically, to_json, write_csv
from granq.generator import Generator, build_generator
from granq.match import Match
from granq.models import build_network
from granq.qat import GDFQ, AdaDFQ, Evaluate, Game, quantized

RECIPES: dict[str, type[AdaDFQ]] = {"adadfq": AdaDFQ, "gdfq": GDFQ, "match": Match}
StudentLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
LOW_DIVERSITY, LOW_RECOGNITION = 0.1, 2.0  # share of the variance; times the accuracy of guessing, half way up at most
RISE = 5e-4  # of the student's loss, as a share of it; a generator that stopped let it rise by 1e-4
LEAVING = 1.5  # times the lowest bn_loss: four runs that broke down passed it, no other went above 1.3


@dataclass
class Result:
    """A finished run. ``best_top1`` is the best epoch *on the test split*, a selection; ``last_top1`` is not."""

    student: nn.Module = field(repr=False)
    generator: nn.Module = field(repr=False)
    config: QATConfig
    history: pd.DataFrame = field(repr=False)
    ptq_top1: float
    last_top1: float
    best_top1: float
    seconds: float

    def row(self, dataset: str, network: str, teacher_top1: float, test_images: int) -> dict[str, Any]:
        """Return what a results table keeps of a run: accuracies, every setting that repeats it, versions."""
        c, tops = self.config, ("ptq_top1", "last_top1", "best_top1")
        facts: dict[str, Any] = {"dataset": dataset, "network": network, "scheme": c.scheme}
        facts |= {"bits": c.bits, "recipe": c.recipe, "seed": c.seed, "teacher_top1": teacher_top1}
        facts |= {name: getattr(self, name) for name in tops} | {"seconds": round(self.seconds, 1)}
        settings = c.model_dump(exclude={*facts, "weight_bits", "act_bits", "device"})
        settings["layer_bits"] = json.dumps(c.layer_bits) if c.layer_bits else ""  # a cell of a table
        facts |= {"test_images": test_images} | settings
        return facts | versions(resolve_device(c.device)) | {"commit": commit()}


def train(
    teacher: nn.Module, config: QATConfig, *, evaluate: Evaluate | None = None, out: str | Path | None = None,
    resume: bool = False, facts: dict[str, Any] | None = None, generator: nn.Module | None = None,
    student_loss: StudentLoss | None = None, pixels: tuple[Tensor, Tensor] | None = None,
    after_epoch: Callable[[Game], None] | None = None,
) -> Result:  # fmt: skip
    """Quantize ``teacher`` without data and fine-tune the student on generated images.

    Args:
        teacher: network with BatchNorm2d layers, of which a copy is used.
        config: the settings.
        evaluate: student -> test accuracy in percent, after the warm-up and every later epoch.
        out: run folder, new or empty.
        resume: continue the run in ``out``; on the CPU it ends bit for bit as an uninterrupted run.
        facts: what ``config.json`` keeps besides the settings.
        generator: starts from a copy of this one: any module (noise (N, 100), labels (N,)) -> images (N, 3, H, W).
        student_loss: (teacher's logits, student's, labels) -> loss, instead of the recipe's; of match, its soft labels.
        pixels: black and white (1, 3, 1, 1), within which match refines its images; range of static ``image_bits``.
        after_epoch: called with the run after each epoch.

    Raises:
        UserError: ``out`` is in use, or not as ``resume`` says, or of another run; or the teacher cannot teach.
        FloatingPointError: a loss became NaN or infinite; the last checkpoint stays.
    """
    folder = RunFolder(out) if out else None
    if folder:
        folder.check_free(resume)
    with own_random_state(resolve_device(config.device)):  # a notebook draws on as if no run had been made
        # refuses before the folder is made
        game, size = begin(teacher, config, student_loss, generator=generator, pixels=pixels), config.image_size
        if (measured := (facts or {}).get("spec", {}).get("image_size", size)) != size:
            raise UserError(f"image_size is {size}, but the data are described with {measured} pixels")
        if folder is None:
            _run(game, evaluate, after_epoch)
        else:
            identity = _identity(game, facts or {}, generator, student_loss, pixels)
            here = versions(game.device)
            with folder.claimed(resume):
                if resume and (saved := folder.load(identity, game.device, config)):
                    game.restore(saved)
                    write_csv(folder.history, pd.DataFrame(game.rows))  # a kill may have come before its last row
                    if (began := folder.measured_alike(facts or {}).get("versions")) != here:
                        warnings.warn(f"{out} began with {began}, not {here}: the last bits may differ", stacklevel=2)
                else:  # nothing is trained yet: a config that is there may be of another teacher
                    folder.write_config(config, (facts or {}) | {"versions": here})
                _run(game, evaluate, after_epoch, folder, identity)
    history = pd.DataFrame(game.rows)
    tops = [*history.test_top1[~history.warmup.astype(bool)]] or [game.ptq_top1]
    best = max(tops, key=lambda top: (top == top, top))  # NaN: an epoch without evaluate
    return Result(game.student, game.generator, config, history, game.ptq_top1, tops[-1], best, game.seconds)


def _identity(game: Game, facts: dict[str, Any], generator: Any, student_loss: Any, pixels: Any) -> str:
    """Return a hash of all that a run must have in common with the one that it continues."""
    own = getattr(student_loss, "__qualname__", type(student_loss).__name__) if student_loss else ""
    spec = facts.get("spec", {})
    data = dataset_name(str(spec.get("name", "")))  # wherever they lie today
    bounds = [end.flatten().tolist() for end in pixels or () if game.config.recipe == "match"]
    images = str([data, *(spec.get(key) for key in ("classes", "image_size", "mean", "std")), *bounds])
    return fingerprint(game.config, own, images, game.teacher, generator)


def begin(teacher: nn.Module, config: QATConfig, student_loss: StudentLoss | None = None, **more: Any) -> Game:
    """Return the run of ``train`` before its first epoch, in memory; ``more`` is the generator and pixels."""
    recipe = RECIPES[config.recipe](config)
    if student_loss is not None:
        recipe.student_loss = student_loss  # type: ignore
    return Game(teacher, config, recipe, **more)


def _run(
    game: Game, evaluate: Evaluate | None, after_epoch: Callable[[Game], None] | None,
    folder: "RunFolder | None" = None, identity: str = "",
) -> None:  # fmt: skip
    """Run the epochs that are left, and keep each."""
    c, trouble = game.config, ""
    name = f"{c.scheme if isinstance(c.scheme, str) else 'own scheme'} {c.bits} seed {c.seed}"
    with tqdm(total=c.epochs, initial=game.epoch, desc=name, unit="epoch", leave=False) as progress:
        while game.epoch < c.epochs:
            row = game.run_epoch(evaluate)
            tested = {"test": f"{row['test_top1']:.1f}%"} if evaluate else {}
            progress.set_postfix(tested, recognized=f"{row['teacher_top1']:.0f}%")
            progress.update()
            before, trouble = trouble, generator_trouble(game.rows, game.classes)
            if trouble[:20] not in before:  # said when it begins, not in every epoch, whatever its numbers are
                progress.write(f"epoch {game.epoch}: {trouble}", file=sys.stderr)
            if folder:
                folder.save(game.state() | {"fingerprint": identity}, game.rows)
            if after_epoch:
                with own_random_state(game.device):
                    after_epoch(game)


def generator_trouble(rows: list[dict[str, float]], classes: int) -> str:
    """Say what is wrong with the generator after the last of ``rows``; empty if nothing is (docs/reliability.md)."""
    row, guess, said = rows[-1], 100 / classes, ""
    losses = [row["student_loss"] for row in rows if not row["warmup"]]
    seen = [row["bn_loss"] for row in rows if not row["warmup"] and "bn_loss" in row]
    if row["diversity"] < LOW_DIVERSITY:
        said = f"the generator has collapsed: only {row['diversity']:.0%} of the variance is between its images; "
        said += "lower generator_lr or take another seed"
    elif seen and seen[-1] > LEAVING * min(seen):
        said = f"the generator leaves the teacher's BatchNorm statistics (bn_loss {seen[-1]:.3g}, before "
        said += f"{min(seen):.3g}): its images teach the student wrong; generator_epochs stops the generator"
    elif losses and row["teacher_top1"] < min(LOW_RECOGNITION * guess, (100 + guess) / 2):
        said = f"the teacher gives only {row['teacher_top1']:.0f} % of its images the label they were drawn for "
        said += f"(guessing: {guess:.0f} %); train the generator longer (warmup_epochs, iterations)"
    elif losses and losses[-1] > losses[0] + RISE * abs(losses[0]) and "generator_loss" in row:  # both play
        said = "the student's loss is above that of its first epoch: the generator draws what it cannot follow, and "
        said += "its accuracy may fall (docs/results.md); generator_epochs stops the generator"
    return said


class RunFolder:
    """One run on disk; the folder need not exist yet."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config, self.checkpoint = self.path / "config.json", self.path / "checkpoint.pt"
        self.history, self.lock = self.path / "history.csv", FileLock(self.path / ".lock")

    def check_free(self, resume: bool = False) -> None:
        """Raise UserError if a run started here would overwrite something, or if there is no run to resume."""
        # a hidden file is the lock, or half a file of a process that was killed
        found = self.path.is_file() or any(self.path.glob("[!.]*"))
        if found and not resume:
            raise UserError(f"{self.path} is no empty folder; choose another --out, or --resume a run")
        if resume and not self.config.is_file() and (found or not self.path.exists()):
            raise UserError(f"{self.path} holds no run to resume")

    def in_use(self) -> bool:
        """Say whether another process holds the folder."""
        try:
            with self.lock.acquire(timeout=0) if self.path.exists() else nullcontext():
                return False
        except Timeout:
            return True

    @contextmanager
    def claimed(self, resume: bool = True) -> Iterator[None]:
        """Hold the folder within the block. Raises UserError if another process holds it, or filled it meanwhile."""
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            held = self.lock.acquire(timeout=1)  # not 0: ``in_use`` holds it for an instant
        except Timeout:
            raise UserError(f"{self.path} is in use by another process; wait for it or choose another --out") from None
        with held:
            self.check_free(resume)
            for torn in self.path.glob(".[ch]*.tmp"):  # of a process that was killed while it saved
                torn.unlink(missing_ok=True)
            yield

    def write_config(self, config: QATConfig, facts: dict[str, Any]) -> None:
        text = to_json({"config": config.model_dump(mode="json")} | facts, indent=2)
        save_atomically(self.config, lambda path: path.write_text(text))

    def read_config(self) -> dict[str, Any]:
        """Read what ``write_config`` wrote, the settings as QATConfig. Raises UserError if it is missing or damaged."""
        try:
            facts = json.loads(self.config.read_text())
            return facts | {"config": QATConfig.model_validate_json(json.dumps(facts["config"]))}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.config} is missing or damaged ({error}); the run cannot be read") from error

    def measured_alike(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Return what ``read_config`` does. Raises UserError if the run had another teacher or other images."""
        told = self.read_config()
        for name in {"test_images", "teacher_top1"} & told.keys() & facts.keys():
            if abs(told[name] - facts[name]) > 0.5:  # another machine may see an image otherwise
                said = f"{self.path} had another teacher or was measured on other images"
                raise UserError(f"{said}: {name} {told[name]}, now {facts[name]}")
        return told

    def save(self, state: dict[str, Any], rows: list[dict[str, float]]) -> None:
        save_atomically(self.checkpoint, lambda path: torch.save(state, path))
        write_csv(self.history, pd.DataFrame(rows))

    def load(
        self, identity: str | None = None, device: str = "cpu", config: QATConfig | None = None
    ) -> dict[str, Any] | None:
        """Read the checkpoint; None if no epoch was finished. Raises UserError if it is damaged or of another run."""
        if not self.checkpoint.is_file():
            return None
        state = read_checkpoint(self.checkpoint, device)
        if identity and state.get("fingerprint") != identity:
            old, new = dict(self.read_config()["config"]), dict(config or ())
            other = "".join(f"; {name} was {old[name]}" for name in new if old[name] != new[name])
            raise UserError(f"{self.path} belongs to another teacher or other settings or images{other}")
        return state


def fingerprint(*parts: Any) -> str:
    """Return the SHA-256 of what tells runs apart: settings, texts, and weights of networks, if there are any."""
    digest = hashlib.sha256()
    for part in (part for part in parts if part is not None):
        network = isinstance(part, nn.Module)
        digest.update(b"" if network else part.encode() if isinstance(part, str) else part.model_dump_json().encode())
        for name, x in part.state_dict().items() if network else ():
            if type(x) is not Tensor or x.is_quantized:  # of torch.ao: types and packed weights
                digest.update(f"{name}{x}".encode())
                continue
            digest.update(name.encode() + x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class SavedRun(NamedTuple):
    """What ``load_run`` reads: the student, and where it comes from."""

    student: fx.GraphModule  #: in eval mode
    config: QATConfig  #: its settings
    spec: DataSpec  #: the data that measured it, and the normalization of its images
    facts: dict[str, Any]  #: ``config.json``: network, data, teacher, its accuracy, versions; the student's ``top1``
    epoch: int  #: finished epochs


def load_run(run: str | Path, device: str = "cpu", network: str = "") -> SavedRun:
    """Load the student of a folder that ``granq quantize`` or ``granq sweep`` wrote.

    A network ``FILE.py:FUNCTION`` must be named again: a folder of others runs no code. Raises UserError if it is not,
    or if the folder is no such run with a finished epoch.
    """
    state, facts = _read_run(run)
    if missing := {"network", "spec", "data", "teacher_top1"} - facts.keys():
        told = "; it is not of granq quantize, nor were these given to granq.train as facts"
        raise UserError(f"{run}/config.json lacks {', '.join(sorted(missing))}{told}")
    spec = DataSpec.model_validate(facts["spec"])
    student = student_of(run, facts["network"], network, facts["config"], spec)
    load_weights(student, state["student"], run)
    facts["top1"] = state["rows"][-1]["test_top1"]
    return SavedRun(student.to(device), facts["config"], spec, facts, state["epoch"])


def student_of(source: str | Path, own: str, named: str, config: QATConfig, spec: DataSpec) -> fx.GraphModule:
    """Return a student of network ``own``, with other weights. Raises UserError if that is code which nobody named."""
    if not same_network(own, named or own) or (".py:" in own and not named):
        raise UserError(f"{source} is of network {own}; name it with --network (in Python: network=)")
    return quantized(build_network(named or own, spec.classes), config)


def load_weights(student: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Load a student's state. Raises UserError if it is of a network of other layers."""
    try:
        student.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{source} is of another network: {' '.join(str(error).split())[:250]}") from error


def same_network(one: str, other: str) -> bool:
    """Say whether two names mean one network: a file of networks may lie elsewhere today."""
    return one == other or (".py:" in one and ".py:" in other and one.rpartition(":")[2] == other.rpartition(":")[2])


def load_generator(run: str | Path, device: str = "cpu") -> Generator:
    """Load the generator of a run folder. Raises UserError if it holds no finished epoch, or one of your own."""
    state, facts = _read_run(run)
    sizes = [len(v) for k, v in state["generator"].items() if k in ("embedding.weight", "norm0.weight.weight")]
    if not sizes:
        raise UserError(f"{run} has a generator of its own kind: load checkpoint.pt, state 'generator', into yours")
    generator = build_generator(sizes[0], facts["config"].image_size).to(device)
    generator.load_state_dict(state["generator"])
    return generator


def _read_run(run: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    if not (state := RunFolder(run).load()):
        raise UserError(f"{run} holds no run with a finished epoch; make one with granq quantize --out {run}")
    return state, RunFolder(run).read_config()
