"""Plain layers: a Conv2d, Linear or BatchNorm2d that computes what torch's own class does, whatever its class is called.

A subclass may do more: pad, standardize its weight, apply an activation. Where that can be shown it becomes a plain
layer, and what it does besides becomes nodes of the traced graph; otherwise it stays as it is.
"""

import copy
import operator
from collections.abc import Collection
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.overrides import handle_torch_function, has_torch_function_unary

LAYERS = (nn.Conv2d, nn.Linear)
_CONV = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "padding_mode": "zeros"}
#: of a function of torch: its class, the names of its arguments, and attributes of a layer with default arguments
_FUNCTIONS: dict[Any, tuple[type[nn.Module], str, dict[str, Any]]] = {
    F.conv2d: (nn.Conv2d, "input weight bias stride padding dilation groups", _CONV),
    F.linear: (nn.Linear, "input weight bias", {}),
    F.batch_norm: (nn.BatchNorm2d, "input running_mean running_var weight bias training momentum eps", {"eps": 1e-5}),
}
_OWN = ("weight", "bias", "running_mean", "running_var")


def is_plain(module: nn.Module | None) -> bool:
    """Say whether ``module`` is a Conv2d, Linear or BatchNorm2d without a forward of its own."""
    base, kind = _base(module), type(module)
    names = [name for name in ("forward", "_conv_forward") if hasattr(base, name)]
    changed = any(name in vars(module) or getattr(kind, name) is not getattr(base, name) for name in names)
    return base is not None and not changed


def trace_plain(model: nn.Module, fixed: dict[str, Any] | None = None) -> fx.Graph:
    """Trace ``model`` and make its layers plain where they can be; arguments of its forward in ``fixed`` are constants.

    A layer whose forward fx can follow to one call of torch's function, with the parameters as they are, becomes the
    nodes of this forward. Any other is compared on random inputs with a plain layer, and with one after ``same_pad``.
    """
    modules = list(model.modules())
    others = [m for m in modules if _base(m) and not is_plain(m) and not parametrize.is_parametrized(m)]
    opened = {m for m in others if _opens(m)}
    padded = {m for m in others if m not in opened and _turns_plain(m)}
    graph = _trace(model, opened, fixed)
    for node in list(graph.nodes):
        call = _layer_call(model, node)
        with graph.inserting_before(node):
            if call and call.layer in opened:
                node.replace_all_uses_with(graph.call_module(call.name, (call.input,)))
                _make_plain(call.layer, call.settings)
                for unused in (node, *(own for own in call.own if len(own.users) == 1)):
                    graph.erase_node(unused)
            elif node.op == "call_module" and (conv := model.get_submodule(node.target)) in padded:
                node.args = (graph.call_function(same_pad, (node.args[0], *_sizes(conv))),)
    return graph


def same_pad(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]) -> Tensor:
    """Pad (N, C, H, W) with zeros as TensorFlow's "same": a convolution then has ceil(size / stride) outputs."""
    if has_torch_function_unary(x):  # fx sees one function, which needs the size
        return handle_torch_function(same_pad, (x,), x, kernel, stride, dilation)
    ends: list[int] = []
    for n, k, s, d in zip(*(reversed(sizes) for sizes in (x.shape[2:], kernel, stride, dilation)), strict=True):
        missing = max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
        ends += [missing // 2, missing - missing // 2]
    return F.pad(x, ends)


class _Tracer(fx.Tracer):
    """Follows the forward of layers that are ``opened``; all others are leaves, subclasses too."""

    def __init__(self, opened: Collection[nn.Module] = ()) -> None:
        super().__init__()
        self.opened = opened

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self.opened and (_base(m) is not None or super().is_leaf_module(m, module_qualified_name))


def _base(module: nn.Module | None) -> type[nn.Module] | None:
    return next((base for base, *_ in _FUNCTIONS.values() if isinstance(module, base)), None)


def _trace(model: nn.Module, opened: Collection[nn.Module] = (), fixed: dict[str, Any] | None = None) -> fx.Graph:
    with patch.object(nn.BatchNorm2d, "_check_input_dim", lambda *_: None):  # its ``if`` would end the trace
        return _Tracer(opened).trace(model, fixed)


class _Call(NamedTuple):
    """A call of torch's function on all parameters of one layer."""

    name: str
    layer: nn.Module
    input: fx.Node
    own: list[fx.Node]  #: parameters
    settings: dict[str, Any]  #: attributes that a plain layer needs to compute the same


def _layer_call(root: nn.Module, node: fx.Node) -> _Call | None:
    base, names, settings = _FUNCTIONS.get(node.target, (None, "", {}))
    given = dict(zip(names.split(), node.args, strict=False)) | node.kwargs
    tensors = {name: given.get(name) for name in names.split() if name in _OWN}
    own = [value for value in tensors.values() if isinstance(value, fx.Node)]
    if not own or any(value.op != "get_attr" for value in own) or {*node.all_input_nodes} - {given["input"], *own}:
        return None
    name = str(own[0].target).rpartition(".")[0]
    layer: Any = root.get_submodule(name)
    read = {key: value and operator.attrgetter(value.target)(root) for key, value in tensors.items()}
    if _base(layer) is not base or any(getattr(layer, key) is not value for key, value in read.items()):
        return None
    if "running_mean" in tensors and given.get("training", False) == (layer.running_mean is not None):
        return None
    pairs = {key: (value, value) if base is nn.Conv2d and isinstance(value, int) else value for key, value in given.items()}
    return _Call(name, layer, given["input"], own, settings | {key: pairs[key] for key in settings.keys() & pairs.keys()})


def _opens(layer: nn.Module) -> bool:
    """Say whether fx follows the forward to calls of torch's function, all alike, that alone read the parameters."""
    layer = copy.deepcopy(layer)
    try:
        graph = _trace(layer)
    except Exception:  # tracing runs code that is not ours, which may raise anything
        return False
    calls = {node: call for node in graph.nodes if (call := _layer_call(layer, node)) and call.layer is layer}
    readers = {user for node in graph.nodes if node.op == "get_attr" and node.target in _OWN for user in node.users}
    hooks = layer._forward_hooks or layer._forward_pre_hooks  # they would see another input or output
    settings = [call.settings for call in calls.values()]
    return bool(calls) and not hooks and readers <= calls.keys() and all(s == settings[0] for s in settings)


@torch.no_grad()
def _turns_plain(layer: nn.Module) -> bool:
    """Make ``layer`` plain if it then gives the same numbers on random inputs; say whether only after ``same_pad``."""
    for same in (False, True) if isinstance(layer, nn.Conv2d) else (False,):
        plain = copy.copy(layer)
        _make_plain(plain, {"padding": (0, 0), "padding_mode": "zeros"} if same else {})
        try:
            old = copy.deepcopy(layer)
            pairs = [(old(x), plain(same_pad(x, *_sizes(layer)) if same else x)) for x in _inputs(layer)]
            alike = all(a.shape == b.shape and torch.allclose(a, b, 1e-4, 1e-5) for a, b in pairs)
        except Exception:  # likewise
            continue
        if alike:
            _make_plain(layer, vars(plain))
            return same
    return False


def _make_plain(layer: nn.Module, settings: dict[str, Any]) -> None:
    layer.__class__ = _base(layer)  # type: ignore[assignment]
    vars(layer).pop("forward", None)
    vars(layer).update(settings)


def _sizes(conv: Any) -> tuple[tuple[int, ...], ...]:
    return conv.kernel_size, conv.stride, conv.dilation


def _inputs(layer: Any) -> list[Tensor]:
    """Return inputs of several sizes, which differ in their remainder of a stride, and of several magnitudes."""
    generator = torch.Generator().manual_seed(0)  # the global random state stays
    if isinstance(layer, nn.Linear):
        shapes = [(3, layer.in_features), (2, 3, layer.in_features)]
    elif isinstance(layer, nn.Conv2d):
        reach = max(d * (k - 1) + 1 for k, _, d in zip(*_sizes(layer), strict=True))
        shapes = [(2, layer.in_channels, reach + i, reach + 6 - i) for i in range(4)]
    else:
        shapes = [(2, layer.num_features, 5, 7)]
    like = layer.running_mean if isinstance(layer, nn.BatchNorm2d) else layer.weight
    return [(torch.randn(shape, generator=generator) * 10 ** (i - 1)).to(like) for i, shape in enumerate(shapes)]
