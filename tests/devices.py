"""Several devices, pretended: tensors of the CPU that say they lie elsewhere, and refuse to meet those of another.

Inside `Pretended()`, `tensor.device`, moves and factories keep up the pretence. Any other function whose tensors lie on
different devices raises, as CUDA's do; a CPU tensor may index, and one without dimensions may go anywhere.
"""

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from tiny import CACHE
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CPU, FIRST, SECOND = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)


def place(tensor):
    return getattr(tensor, "_pretended", CPU)


def put(tensor, device):
    tensor._pretended = device
    return tensor


class Pretended(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func == torch.Tensor.device.__get__:
            return place(args[0])
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        given = kwargs.pop("device", None)
        if name == "to":
            found = [x if isinstance(x, torch.device) else place(x) for x in args[1:] if not isinstance(x, torch.dtype)]
            args = tuple(x for x in args if not isinstance(x, torch.device))
            target = given or (found or [place(args[0])])[0]
            if len(args) == 1 and not kwargs:
                return args[0] if target == place(args[0]) else put(args[0].clone(), target)
        elif name == "cpu":
            target = CPU
        elif name == "copy_":
            target = place(args[0])
        elif given is not None:
            target, kwargs["device"] = torch.device(given), CPU
        else:
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            indexing = name in ("__getitem__", "__setitem__")
            places = {place(x) for x in tensors if place(x) != CPU or (x.dim() > 0 and not indexing)}
            if len(places) > 1:
                raise RuntimeError(f"tensors on different devices: {name} of {sorted(map(str, places))}")
            target = next(iter(places), CPU)
        out = func(*args, **kwargs)
        if name in ("to", "cpu") and out is args[0] and target != place(out):
            out = out.clone()  # a move makes a new tensor
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and not isinstance(x, torch.nn.Parameter):
                put(x, target)
        return out


class Move(ModelHook):
    """What accelerate does before a module's forward, and after its hooks: all arguments go to the module's device."""

    def __init__(self, device):
        self.device = device

    def pre_forward(self, module, *args, **kwargs):
        def moved(x):
            return tree_map(lambda y: y.to(self.device) if isinstance(y, torch.Tensor) else y, x)

        return moved(args), {name: x if name == CACHE else moved(x) for name, x in kwargs.items()}


def spread(model, layers, first):
    """The model on the first device, its decoder layers from `first` on on the second."""
    for x in (*model.parameters(), *model.buffers()):
        put(x, FIRST)
    for layer in layers[first:]:
        for x in (*layer.parameters(), *layer.buffers()):
            put(x, SECOND)
        add_hook_to_module(layer, Move(SECOND))
    add_hook_to_module(model.get_decoder().norm, Move(FIRST))
