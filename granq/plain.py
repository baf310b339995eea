"""What layers and nodes of a traced graph compute, whatever their classes are called.

A subclass of Conv2d, Linear or BatchNorm2d may do more than torch's own: pad, standardize its weight, apply an
activation. Where that can be shown it becomes a *plain* layer, and the rest nodes of the graph around it.
"""

import copy
import math
import operator
import sys
from collections.abc import Collection
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

LAYERS = (nn.Conv2d, nn.Linear)
_PAIRS = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
#: of a function of torch: its class, the names of its arguments, and what a layer has where they are not given
_FUNCTIONS: dict[Any, tuple[type[nn.Module], str, dict[str, Any]]] = {
    F.conv2d: (nn.Conv2d, "input weight bias stride padding dilation groups", _PAIRS | {"padding_mode": "zeros"}),
    F.linear: (nn.Linear, "input weight bias", {}),
    F.batch_norm: (nn.BatchNorm2d, "input running_mean running_var weight bias training momentum eps", {"eps": 1e-5}),
}
_OWN = ("weight", "bias", "running_mean", "running_var")
#: values that tell a ReLU from other functions
_PROBE = torch.tensor([-1e6, -99, -8, -6, -4, -3, -2, -1, -0.3, -1e-3, 0, 1e-3, 0.3, 1, 2, 3, 4, 5.9, 6.1, 8, 99, 1e6])


def is_plain(module: nn.Module | None) -> bool:
    """Say whether ``module`` is a Conv2d, Linear or BatchNorm2d without a forward of its own."""
    base, kind = _base(module), type(module)
    names = [name for name in ("forward", "_conv_forward") if hasattr(base, name)]
    changed = any(name in vars(module) or getattr(kind, name) is not getattr(base, name) for name in names)
    return base is not None and not changed


def changed_layers(model: nn.Module) -> list[nn.Module]:
    """Return the Conv2d, Linear and BatchNorm2d that are not plain; a parametrized one keeps its class."""
    return [m for m in model.modules() if _base(m) and not is_plain(m) and not parametrize.is_parametrized(m)]


def trace_plain(model: nn.Module, fixed: dict[str, Any]) -> fx.Graph:
    """Trace ``model`` and make its layers plain where possible; arguments of its forward in ``fixed`` are constants.

    A layer whose forward leads fx to torch's own function on its own parameters becomes the nodes of its forward.
    """
    tracer = _Tracer([m for m in changed_layers(model) if _opens(m)])
    graph = tracer.trace(model, fixed or None)
    for layer in tracer.opened:
        layer.__class__ = _base(layer)  # type: ignore[assignment]
        vars(layer).pop("forward", None)
        vars(layer).update(tracer.settings.get(layer, {}))
    for node in graph.find_nodes(op="call_method", target="view"):  # maps in channels_last have none
        if not any(isinstance(value, torch.dtype) for value in node.args):
            node.target = "reshape"
    graph.eliminate_dead_code(lambda node: node.op != "get_attr")  # parameters that nobody reads any more
    return graph


class _Tracer(fx.Tracer):
    """Follows the forward of layers that are ``opened``; all others are leaves, subclasses too."""

    def __init__(self, opened: Collection[nn.Module]) -> None:
        same = sys.modules.get("timm.layers.padding")  # fx would not follow its padding, which needs the size
        super().__init__(autowrap_functions=(same.pad_same,) if same else (), param_shapes_constant=True)
        self.opened, self.settings = opened, dict[nn.Module, dict[str, Any]]()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self.opened and (_base(m) is not None or super().is_leaf_module(m, module_qualified_name))

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        with patch.object(nn.BatchNorm2d, "_check_input_dim", lambda *_: None):  # its ``if`` would end the trace
            return super().trace(root, concrete_args)

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *names: Any, **more: Any) -> fx.Node:
        """Record torch's function on the parameters of an opened layer as a call of this layer."""
        base, arguments, settings = _FUNCTIONS.get(target, (None, "", {}))
        given = dict(zip(arguments.split(), args, strict=False)) | kwargs
        own = {key: given.get(key) for key in _OWN if key in arguments.split()}
        reads = [str(node.target) for node in own.values() if isinstance(node, fx.Node) and node.op == "get_attr"]
        name = reads[0].rpartition(".")[0] if reads else ""
        layer = self.root.get_submodule(name)
        settings = settings | {key: given[key] for key in settings.keys() & given.keys()}
        settings |= {key: (settings[key],) * 2 for key in _PAIRS if isinstance(settings.get(key), int)}
        computed: list[fx.Node] = []  # settings, such as a padding for the size of the image
        paths = [f"{name}.{key}".strip(".") for key in own if getattr(layer, key, None) is not None]
        of_batch = given.get("training", False) != (getattr(layer, "running_mean", layer) is None)
        fx.node.map_arg(settings, computed.append)
        if computed or layer not in self.opened or _base(layer) is not base or reads != paths or of_batch:
            return super().create_node(kind, target, args, kwargs, *names, **more)
        assert self.settings.setdefault(layer, settings) == settings, "two calls that differ"
        return super().create_node("call_module", name, (given["input"],), {}, *names, **more)


def _opens(layer: nn.Module) -> bool:
    """Say whether fx follows the forward to calls of torch's function, all alike, that alone read the parameters."""
    layer = copy.deepcopy(layer)
    tracer = _Tracer([layer])
    try:
        graph = tracer.trace(nn.Sequential(layer))  # of a root fx would take the forward of its class
    except Exception:  # tracing runs code that is not ours, which may raise anything
        return False
    read = any(node.op == "get_attr" and node.target[2:] in _OWN and node.users for node in graph.nodes)
    return bool(tracer.settings) and not (read or layer._forward_hooks or layer._forward_pre_hooks)


def _base(module: nn.Module | None) -> type[nn.Module] | None:
    return next((base for base, *_ in _FUNCTIONS.values() if isinstance(module, base)), None)


_CHANNELS = nn.Linear | nn.LayerNorm | nn.GroupNorm | _ConvNd | _NormBase
_MOVES, _SHAPES = {"transpose", "permute", "movedim", "swapaxes"}, {"view", "reshape", "unflatten", "unsqueeze"}


def module_of(root: nn.Module, node: fx.Node) -> nn.Module | None:
    """Return the module that ``node`` calls, if it calls one."""
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


def name_of(root: nn.Module, node: fx.Node) -> str:
    """Return the name of what ``node`` calls: the class of a module, or a function."""
    module = module_of(root, node)
    return type(module).__name__ if module else str(getattr(node.target, "__name__", node.target))


def of_image(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes whose value depends on an input of the network, not on parameters alone."""
    values = set[fx.Node]()
    for node in graph.nodes:
        if node.op == "placeholder" or values.intersection(node.all_input_nodes):
            values.add(node)
    return values


def is_rows(root: nn.Module, node: fx.Node) -> bool | None:
    """Say whether the last dimension of a value holds its features, by who reads or made it; else ``None``."""
    made, passed, values = node, set[str](), of_image(node.graph)
    while (read := [n for n in made.all_input_nodes if n in values]) and (
        not (module := module_of(root, made)) or isinstance(module, nn.PReLU) or not module.state_dict()
    ):  # an LSTM or attention makes features of its own
        widens = made.target is operator.getitem and isinstance(made.args[1], tuple) and None in made.args[1]
        passed.add("unsqueeze" if widens else name_of(root, made))
        made = read[0]
    last, joined, moved = node, False, False
    while last.users and not isinstance(module_of(root, last), _CHANNELS):
        last = next(iter(last.users))
        joined |= not moved and _joins_maps(root, last)
        moved |= name_of(root, last) in _MOVES
    users = sorted(node.users, key=lambda user: not isinstance(module_of(root, user), LAYERS))
    for maker in (*users, made, last):  # whose layout is another one, is passed over
        if isinstance(layer := module_of(root, maker), _CHANNELS):
            rows = isinstance(layer, nn.Linear | nn.LayerNorm)
            whole = isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) > 1  # it normalizes maps
            if whole or (rows and maker is last and joined):  # the second is a classifier of pooled maps
                continue
            if maker is not made or not passed & (_MOVES | _SHAPES if rows else _MOVES):
                return rows
    return None


def _joins_maps(root: nn.Module, node: fx.Node) -> bool:
    """Say whether ``node`` pools or flattens maps: a Linear after it says nothing of what was before."""
    module, name = module_of(root, node), name_of(root, node)
    if name in ("mean", "sum", "max", "amax", "logsumexp"):
        dims = node.kwargs.get("dim", (*node.args, None, None)[1])
        return not {3, -1}.isdisjoint(dims if isinstance(dims, list | tuple) else [dims])
    if name == "flatten":
        given = dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False)) | node.kwargs
        return (given.get("start_dim"), given.get("end_dim", -1)) == (1, -1)
    return "pool" in name.lower() or (isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1))


def relu_ceiling(root: nn.Module, node: fx.Node) -> float | None:
    """Return ``c`` if ``node``, tried on a few values, computes ``clamp(x, 0, c)``: a ReLU (infinity) or a ReLU6."""
    module, method = module_of(root, node), node.op == "call_method"
    if len(node.all_input_nodes) != 1 or node.op == "output" or (module and module.state_dict()):
        return None
    x = _PROBE.view(1, 1, -1, 1)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda _: x.clone())
    try:
        call: Any = getattr(Tensor, str(node.target)) if method else module.forward if module else node.target
        with torch.random.fork_rng([]):  # a function may draw
            y = call(*args, **kwargs)
        ceiling = float(y.max())
        same = ceiling > 0 and torch.equal(y, x.clamp(0, ceiling))
    except Exception:  # it takes tensors of another shape, or gives something else than one
        return None
    return None if not same else math.inf if ceiling == x.max() else ceiling
