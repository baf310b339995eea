"""Wrong arguments of public functions get one sentence before any work starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from inspect import signature
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

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
    except (RuntimeError, TypeError, IndexError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{type(model).__name__} cannot take images of {tuple(images.shape)}: {reason}") from error


def check_batches(batches: object) -> None:
    """Raise TypeError unless this can be gone through batch by batch; a tensor would fall apart into single images."""
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        raise TypeError(f"batches must be batches of images, such as [images], got {type(batches).__name__}")


def check_images(images: object) -> None:
    """Raise TypeError or ValueError unless these are floating-point images (N, ...)."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        said = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images must be a floating-point tensor (N, 3, H, W), got {said}")
    if images.dim() < 2:
        raise ValueError(f"images must be (N, 3, H, W), got shape {tuple(images.shape)}")


def distinct(data: pd.DataFrame, *columns: str) -> None:
    """Raise ValueError unless ``columns`` tell all rows apart."""
    if data.duplicated(list(columns)).any():
        raise ValueError(f"several rows have the same {', '.join(columns)}: the data mix what belongs to several plots")


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


def takes_model(function: Callable[P, R]) -> Callable[P, R]:
    """The first argument is a network. Raises TypeError if it is not."""
    first = next(iter(signature(function).parameters))

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        given = args[0] if args else kwargs.get(first)
        if not isinstance(given, nn.Module):
            raise TypeError(f"{function.__name__}: {first} must be a torch.nn.Module, got {type(given).__name__}")
        return function(*args, **kwargs)

    return checked
