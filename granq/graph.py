"""The traced graph (torch.fx): where activations are quantized, what a layer reads, and what stands after it."""

import copy
import warnings
from collections.abc import Iterator, Sequence
from inspect import signature

from torch import fx, nn
from torch.nn.utils import parametrize

from granq.errors import UserError
from granq.plain import LAYERS, changed_layers, is_plain, module_of, name_of, of_image, relu_ceiling, trace_plain

SHAPE = {"shape", "ndim", "size", "dim"}


def layer_names(model: nn.Module) -> list[str]:
    """Return the names of the Conv2d and Linear layers of ``model``, in the order of definition."""
    return [name for name, module in model.named_modules() if isinstance(module, LAYERS)]


def quantizable(model: nn.Module, skip: Sequence[str]) -> list[str]:
    """Return the names of the layers that ``skip`` does not name. Raises UserError if nothing can be quantized."""
    kind, names = type(model).__name__, layer_names(model)
    if model._forward_pre_hooks or model._forward_hooks:
        warnings.warn(f"hooks of {kind} itself are not in the quantized copy", stacklevel=3)
    if not any(names):  # "" is a network that is one layer itself
        raise UserError(f"{kind} has no Conv2d or Linear layer in it to quantize")
    for one in skip:
        below = [name for name in names if f"{name}.".startswith(f"{one}.")]
        if not below:
            raise UserError(f"scheme.skip names what holds no layer of the model: {one}")
        names = [name for name in names if name not in below]
    for name in names:
        if "weight" not in (layer := model.get_submodule(name))._parameters or parametrize.is_parametrized(layer):
            raise UserError(f"a parameter of {name} is parametrized already: remove that first")
    if hasattr(model, "act_quant"):
        raise UserError(f"{kind} has an act_quant of its own, the name of what quantizes activations: rename it")
    return names


def reader(root: nn.Module, node: fx.Node) -> fx.Node | None:
    """Return what alone reads the values of ``node``, not only their shape, if one does; an Identity is passed over."""
    users = [u for u in node.users if (u.args[1] if u.target is getattr else u.target) not in SHAPE]
    if len(users) == 1 and isinstance(module_of(root, users[0]), nn.Identity):
        return reader(root, users[0])
    return users[0] if len(users) == 1 else None


def norm_after(root: nn.Module, node: fx.Node) -> fx.Node | None:
    """Return the call of a plain BatchNorm2d with running statistics that alone reads ``node``, if there is one."""
    user = reader(root, node)
    module = user and module_of(root, user)
    fixed = isinstance(module, nn.BatchNorm2d) and is_plain(module) and module.running_mean is not None
    return user if fixed else None


def is_image(root: nn.Module, node: fx.Node) -> bool:
    """Say whether ``node`` is the image, or the image with a border around it."""
    padding = name_of(root, node) in ("pad", "pad_same", "ZeroPad2d")  # of torch or timm
    return node.op == "placeholder" or (padding and is_image(root, node.all_input_nodes[0]))


def trace(model: nn.Module) -> fx.Graph:
    """Trace ``model`` or raise UserError. Arguments of its forward with a default None, a bool or a text are fixed."""
    inner = "".join(f"; its .{name} may be the network" for name in ("module", "_orig_mod") if name in model._modules)
    if "forward" in vars(model):
        raise UserError(f"the forward of this {type(model).__name__} was replaced, which torch.fx does not see{inner}")
    rest = list(signature(model.forward).parameters.items())[1:]  # the first is the image
    # fixed: otherwise ``if mask is not None`` would be true
    fixed = {name: p.default for name, p in rest if isinstance(p.default, type(None) | bool | str)}
    try:
        graph = trace_plain(model, fixed)
    except Exception as error:  # tracing runs the model's own code, which may raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"torch.fx cannot trace {type(model).__name__} itself: {reason}{inner}") from error
    _read_changed_values(graph, model)
    return graph


def find_places(graph: fx.Graph, root: nn.Module, where: str, layers: set[str]) -> list[fx.Node]:
    """Return the nodes whose value is quantized: ReLUs, or what ``layers`` (names) read, each once."""
    if where == "relu":
        values = of_image(graph)  # a ReLU of a parameter is no activation
        return [node for node in graph.nodes if node.users and node in values and relu_ceiling(root, node) is not None]
    calls = [node for node in graph.nodes if node.op == "call_module" and node.target in layers]
    return list(dict.fromkeys(node.all_input_nodes[0] for node in calls))


def insert_call(graph: fx.Graph, node: fx.Node, name: str, where: str, layers: set[str]) -> None:
    """Call module ``name`` on the value of ``node``; who reads that value for quantization reads the result instead."""
    # a residual sum reads the original of what layers read quantized
    readers = [user for user in node.users if where == "relu" or (user.op == "call_module" and user.target in layers)]
    with graph.inserting_before(min(readers)):  # by then a view of the value has changed it, if one does
        call = graph.call_module(name, (node,))
    for user in readers:
        user.replace_input_with(node, call)


def to_module(root: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """Return a module that runs ``graph`` on the modules of ``root``, with all state-dict keys of ``root``."""
    module = fx.GraphModule(root, graph, class_name=type(root).__name__)
    extra = module._buffers.keys() - root._buffers.keys()  # fx makes buffers of plain tensors; they are no keys
    module._modules = root._modules  # all of them: fx takes only what the forward reaches
    module._parameters = root._parameters | module._parameters
    module._buffers = root._buffers | module._buffers
    module._non_persistent_buffers_set = root._non_persistent_buffers_set | extra
    return module


def plain_copy(model: nn.Module, traced: bool = False) -> nn.Module:
    """Return a copy in eval mode, whose layers are as plain as those of the quantized one, and traced if told so."""
    copied = copy.deepcopy(model).eval()
    return to_module(copied, trace(copied)) if traced or changed_layers(copied) else copied


def calls_of_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module | None]]:
    """Yield every call of a layer in a traced model: its name, and the module whose result it reads."""
    for node in model.graph.nodes if isinstance(model, fx.GraphModule) else ():
        if isinstance(module_of(model, node), LAYERS):
            yield str(node.target), module_of(model, node.all_input_nodes[0])


def _read_changed_values(graph: fx.Graph, root: nn.Module) -> None:
    """``F.relu_(x)`` changes ``x`` even if nobody takes its result: who reads ``x`` later now reads the result."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node, place in order.items():
        for value in node.all_input_nodes[:1] if _is_in_place(node, root) else ():
            for user in [user for user in value.users if order[user] > place]:
                user.replace_input_with(value, node)


def _is_in_place(node: fx.Node, root: nn.Module) -> bool:
    module, name = module_of(root, node), name_of(root, node)
    if module is not None:
        return getattr(module, "inplace", False) is True
    told = node.kwargs.get("inplace") is True or (name.endswith("_") and not name.endswith("__"))
    return told or (relu_ceiling(root, node) is not None and any(x is True for x in node.args))  # relu(x, True)
