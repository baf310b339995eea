"""Wrong arguments of public functions get one sentence before any work starts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial, wraps
from inspect import signature
from numbers import Integral, Real
from types import UnionType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import pandas as pd

P = ParamSpec("P")
R = TypeVar("R")


def one_of(name: str, value: object, known: Iterable[str]) -> None:
    """Raise ValueError if ``value`` is none of the ``known`` ones."""
    if value not in (names := list(known)):
        raise ValueError(f"unknown {name} {value!r}; known: {', '.join(names)}")


def forward(model: nn.Module, images: Tensor) -> Any:
    """``model(images)``. Raises TypeError or ValueError if these are no images, or none the model can take."""
    check_images(images)
    try:
        return model(images)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, IndexError, ValueError, AssertionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{type(model).__name__} cannot take images of {tuple(images.shape)}: {reason}") from error


def resolve_device(device: str) -> str:
    """``auto`` becomes cuda, mps or cpu, whichever is there first. Raises ValueError for one that is not there."""
    if device != "auto":
        try:
            parsed = torch.device(device)
        except RuntimeError:
            parsed = torch.device("meta")
        counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
        if parsed.type not in counts:
            raise ValueError(f"unknown device {device!r}; known: auto, cpu, cuda, mps")
        if (parsed.index or 0) >= counts[parsed.type]:
            raise ValueError(f"there is no device {device!r} here; auto takes what is there")
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def has_bfloat16(device: str) -> bool:
    """Whether ``device`` computes in bfloat16: GPUs do, of x86 processors those with AVX512."""
    if not device.startswith("cpu"):
        return True
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def expect_bfloat16(device: str) -> None:
    """Warn where bfloat16 costs time instead of saving it; 7 times as long was measured (docs/speed.md)."""
    if not has_bfloat16(device):
        warnings.warn("this processor cannot compute in bfloat16: without bf16 it will be faster", stacklevel=3)


def check_batches(batches: object) -> None:
    """Raise TypeError unless this can be gone through batch by batch; a tensor would fall apart into single images."""
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        raise TypeError(f"batches must be batches of images, such as [images], got {type(batches).__name__}")


def check_image_size(size: int) -> None:
    """Raise ValueError for sides that no generator draws."""
    if size < 4 or size % 4:
        raise ValueError(f"image_size must be a multiple of 4, got {size}")


def check_images(images: object) -> None:
    """Raise TypeError or ValueError unless these are floating-point images (N, ...)."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        said = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images must be a floating-point tensor (N, 3, H, W), got {said}")
    if images.dim() < 2:
        raise ValueError(f"images must be (N, 3, H, W), got shape {tuple(images.shape)}")


def distinct(data: pd.DataFrame, *columns: str, hint: str = "the data mix what belongs to several plots") -> None:
    """Raise ValueError unless ``columns`` tell all rows apart."""
    if data.duplicated(list(columns)).any():
        raise ValueError(f"several rows have the same {', '.join(columns)}: {hint}")


def needs(columns: str, option: str = "") -> Callable[[Callable[P, R]], Callable[P, R]]:
    """The first argument is a data frame with rows and ``columns``, and with the column the keyword ``option`` names.

    Args:
        columns: their names, separated by blanks.
        option: keyword of the function.

    Raises:
        TypeError: it is no data frame.
        ValueError: it has no rows, or lacks columns.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        name, parameters = function.__name__, signature(function).parameters

        @wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            import pandas as pd

            data: Any = args[0] if args else kwargs.get("data")
            if not isinstance(data, pd.DataFrame):
                raise TypeError(f"{name} takes a pandas DataFrame, got {type(data).__name__}")
            chosen: list[Any] = [kwargs.get(option, parameters[option].default)] if option else []
            if missing := [column for column in (*columns.split(), *chosen) if column not in data]:
                lacks, every = ", ".join(map(repr, missing)), columns.replace(" ", ", ")
                raise ValueError(f"{name} needs the columns {every}; the data lack {lacks}")
            if data.empty:
                raise ValueError(f"{name} got a table without rows")
            return function(*args, **kwargs)

        return checked

    return decorate


def typed(function: Callable[P, R]) -> Callable[P, R]:
    """Every argument is of the type its annotation names. Raises TypeError if one is not."""
    form = signature(function)
    hints = cache(partial(get_type_hints, function))  # at the first call, when every name exists

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name, value in form.bind(*args, **kwargs).arguments.items():
            if not _fits(value, hint := hints()[name]):
                wanted = getattr(hint, "__qualname__", hint)
                raise TypeError(f"{function.__name__}: {name} must be {wanted}, got {type(value).__name__}")
        return function(*args, **kwargs)

    return checked


def _fits(value: Any, hint: Any) -> bool:
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if hint is Any or kind is Callable:
        return True
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if kind is Sequence or (kind is tuple and inner[1:] == (...,)):
        series = isinstance(value, kind) and not isinstance(value, str | bytes)
        return series and all(_fits(v, inner[0]) for v in value)
    return isinstance(value, kind)
