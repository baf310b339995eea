"""What measurements share: one walk over batches, running sums, decibels.

They stream: one batch is in memory at a time, and between batches only sums of fixed size are kept. The *activation of
a layer* is the tensor that enters it, which is what a quantizer in front of it sees. Its channels are dimension 1 of
(N, C, H, W), and the last of what a Linear reads.
"""

from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from tqdm.auto import tqdm

from granq.errors import UserError, one_of
from granq.graph import layer_names
from granq.hooks import Batch, eval_mode, images_of, watch

ACTIVATION_GRANULARITIES = ("per_tensor", "per_channel", "per_sample", "per_sample_channel")
BINS = 64
DEAD = 1e-7  # a constant channel has the smallest step there is, 1e-8 / (2^k - 1)


@torch.no_grad()
def run(
    model: nn.Module, batches: Iterable[Batch], text: str, names: Iterable[str] = (),
    visit: Callable[[str, Tensor, Any], Any] = lambda name, x, output: None,
    after: Callable[[Batch, Any], None] = lambda batch, output: None,
) -> int:  # fmt: skip
    """Forward every batch in eval mode, on the model's device, and return the number of images.

    Every call of a module in ``names`` is a ``visit(name, input, output)``, every batch an ``after(batch, output)``.
    The progress bar says ``text`` if this takes more than two seconds.
    """
    device, count = next(chain(model.parameters(), model.buffers()), torch.empty(0)).device, 0
    with eval_mode(model), watch(model, names, visit):
        for batch in tqdm(batches, desc=text, unit="batch", delay=2, leave=False):
            images = images_of(batch).to(device)
            if images.dim() != 4:  # such as one image, of a tensor in place of a list of batches
                raise UserError(f"batches must hold images (N, 3, H, W), got {tuple(images.shape)}")
            after(batch, model(images.clone()))  # a forward may change its images in place
            count += len(images)
    if not count:
        raise UserError("there is no image to measure: batches is empty")
    return count


def calls(model: nn.Module, batch: Batch, names: Iterable[str]) -> list[tuple[str, Tensor, Tensor]]:
    """Return name, input and output of the first call of each of ``names``; later layers do not change them."""
    found: dict[str, tuple[str, Tensor, Tensor]] = {}
    run(model, [batch], "activations", names, lambda n, x, out: found.setdefault(n, (n, x.clone(), out.clone())))
    if missing := {*names} - found.keys():
        raise UserError(f"the forward never calls {', '.join(sorted(missing))}")
    return [*found.values()]


def checked(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """Return ``layers``, each once. Raises UserError for one that is no Conv2d or Linear of ``model``."""
    known, names = layer_names(model), list(dict.fromkeys(layers))
    for name in names:
        one_of("layer", name, known)
    return names


def kept_rows(out: str | Path | None, known: dict[str, Any]) -> list[dict[Any, Any]]:
    """Return the rows of a CSV that is to be continued. Raises UserError if what is ``known`` was not so for them."""
    texts = dict.fromkeys(["layer", *(name for name, value in known.items() if isinstance(value, str))], str)
    how: Any = dict(dtype=texts, keep_default_na=False, na_values=[""])  # a layer "1.10" is no number
    rows = list[dict[Any, Any]]()
    if out and Path(out).is_file() and Path(out).stat().st_size:
        rows = pd.read_csv(out, **how).fillna(dict.fromkeys(texts, "")).to_dict("records")
    if rows and (lacking := known.keys() - rows[0].keys()):
        raise UserError(f"{out} lacks the columns {', '.join(sorted(lacking))}; choose another file")
    for name in known.keys() - {"torch", "device", "commit"} if rows else ():
        old, new = rows[0][name], known[name]
        if not (old == new if isinstance(new, str | int) else np.isclose(old, new, rtol=1e-3, equal_nan=True)):
            raise UserError(f"{out} was measured with {name} {old}, not {new}; choose another file")
    return rows


def merge(kept: dict[Any, Tensor], key: Any, new: Tensor, how: Callable[..., Tensor] = torch.add) -> None:
    """Add ``new`` to what is kept under ``key``, on the CPU; ``how`` may also be a minimum or maximum."""
    kept[key] = how(kept[key], new.cpu()) if key in kept else new.cpu()


def spread(count: int, wanted: int) -> np.ndarray:
    """Return ``wanted`` places, or as many as there are, evenly spaced from the first to the last of ``count``."""
    return np.linspace(0, count - 1, min(wanted, count)).round().astype(int)


def where_float64_is(x: Tensor) -> Tensor:
    """Return ``x``, on the CPU if its device, Apple's MPS, has no float64."""
    return x.cpu() if x.device.type == "mps" else x


def by_channel(x: Tensor, layer: nn.Module) -> Tensor:
    """Return what ``layer`` reads, (N, C, H, W), or of a Linear rows (N, F), where it can be summed in float64."""
    return where_float64_is(x.flatten(0, -2) if isinstance(layer, nn.Linear) or x.dim() != 4 else x)


def mean_and_interval(name: str, values: ArrayLike, counts: ArrayLike) -> dict[str, float]:
    """Return the mean of ``values``, of which there are ``counts``, and the ends of its 95 % bootstrap interval."""
    x, n = np.asarray(values, float), np.asarray(counts)
    # how often each value is drawn again is multinomial; the percentiles of 2,000 means
    means = np.random.default_rng(0).multinomial(int(n.sum()), n / n.sum(), 2000) @ x / n.sum()
    low, high = np.quantile(means, (0.025, 0.975))
    return {name: x @ n / n.sum(), f"{name}_low": low, f"{name}_high": high}


def decibel(signal: Any, noise: Any) -> Any:
    """Return the ratio of two energies in decibels; without noise it is infinity, and of two zeros NaN."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return 10 * np.log10(np.divide(signal, noise))


def sqnr_db(reference: Tensor, value: Tensor) -> float:
    """Return the signal to quantization noise ratio in decibels over all values, in float64; infinity where exact."""
    if reference.shape != value.shape:  # else they would be broadcast
        raise UserError(f"reference and value must have one shape, got {reference.shape} and {value.shape}")
    signal, noise = (where_float64_is(x).double().square().sum().item() for x in (reference, reference - value))
    return float(decibel(signal, noise))
