"""The one way to look into a network: watch calls of its modules during a forward."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from granq.errors import UserError

Batch = Tensor | Sequence[Tensor]  #: images (N, 3, H, W), or a pair (images, labels)


def images_of(batch: Batch) -> Tensor:
    return batch if isinstance(batch, Tensor) else batch[0]


def labels_of(batch: Batch) -> Tensor | None:
    """Return the labels of a batch, (N,), if it has some; (N, 1) are taken, too. Raises UserError for others."""
    if isinstance(batch, Tensor) or len(batch) < 2:
        return None
    if batch[1].numel() != len(batch[0]):
        raise UserError(f"labels are one number for each image, got {tuple(batch[1].shape)} for {len(batch[0])}")
    return batch[1].flatten()


@contextmanager
def temporarily(objects: Iterable[Any], **values: Any) -> Iterator[None]:
    """Give every object these attributes within the block; afterwards it has those of before."""
    before = [(one, name, getattr(one, name)) for one in objects for name in values]
    try:
        for one, name, _ in before:
            setattr(one, name, values[name])  # not vars(one): the mode of a ScriptModule lies in C++
        yield
    finally:
        for one, name, old in before:
            setattr(one, name, old)


def eval_mode(*models: nn.Module) -> AbstractContextManager[None]:
    """Put networks into eval mode within a block; afterwards every module has the mode it had before."""
    return temporarily([module for model in models for module in model.modules()], training=False)


@contextmanager
def watch(
    model: nn.Module, names: Iterable[str], visit: Callable[[str, Any, Any], None], *, before: bool = False
) -> Iterator[None]:
    """Call ``visit(name, input, output)`` at every call of the modules ``names``, or ``before`` it, without output.

    A later layer may change the output in place: clone what you keep.
    """
    with ExitStack() as hooks:
        for name in names:

            def hook(_: nn.Module, args: Any, named: Any, output: Any = None, name: str = name) -> None:
                visit(name, args[0] if args else named.get("input"), output)

            module: Any = model.get_submodule(name)
            register = module.register_forward_pre_hook if before else module.register_forward_hook
            hooks.callback(register(hook, with_kwargs=True).remove)
        yield
