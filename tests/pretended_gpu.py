"""A GPU, pretended: `devices.Pretended` with waits that are seen, and CUDA graphs that replay what was captured.

A capture keeps each function that was called on tensors, with the tensors themselves, and a replay calls them again and
writes what they return into the same memory. What Python or the host computed between them is not there any more: a
number asked of a tensor, a tensor made of the host's numbers. As in CUDA, both are errors in a capture.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import torch
from devices import CPU, FIRST, Pretended, place, put
from torch.utils._pytree import tree_leaves, tree_map

ASKED = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__contains__", "cpu", "numpy", "equal"}
SHAPED = {"nonzero", "unique", "unique_consecutive", "masked_select", "argwhere", "bincount", "is_nonzero", "allclose"}
MADE = {"arange", "linspace", "full", "zeros", "ones", "empty"}
SIZED = {"view", "reshape", "expand", "repeat", "narrow", "unflatten", "split", "tensor_split", "one_hot"}
SIZED |= {"new_zeros", "new_ones", "new_empty", "new_full"}


def waits(name, func, args, kwargs, on_device):
    """Why a call on a GPU would have host and device wait for each other, or None."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    if name == "to":
        target = [x for x in (*args[1:], *kwargs.values()) if isinstance(x, (torch.device, torch.Tensor))]
        target = [x if isinstance(x, torch.device) else place(x) for x in target]
        crosses = bool(target) and target[0] != place(args[0])
        return f"{place(args[0])} to {target[0]}" if crosses else None
    if name in ("tensor", "as_tensor", "asarray"):
        at = place(args[0]) if isinstance(args[0], torch.Tensor) else CPU
        if isinstance(args[0], list) and not args[0]:
            return None
        return None if torch.device(kwargs.get("device") or at) == at else f"{name} on a device"
    if not on_device:
        return None
    if name in ASKED | SHAPED or (name == "where" and len(args) == 1):
        return name
    if name == "repeat_interleave" and len(tensors) > (0 if args[0] is tensors[0] and len(args) == 1 else 1):
        return None if kwargs.get("output_size") is not None else name
    if name in MADE | SIZED and any(place(x) != CPU and x.dim() == 0 for x in tensors[name in SIZED :]):
        return name
    if name in ("__getitem__", "__setitem__"):
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        filled = name == "__setitem__" and (not isinstance(args[2], torch.Tensor) or args[2].numel() == 1)
        bounds = [y for x in index if isinstance(x, slice) for y in (x.start, x.stop, x.step)]
        for x in (*index, *bounds):
            if isinstance(x, torch.Tensor) and place(x) != CPU and x.dim() == 0:
                return f"{name} by a number of the device"
            if isinstance(x, (list, range)) or (isinstance(x, torch.Tensor) and place(x) == CPU and x.dim() > 0):
                return f"{name} by numbers of the host"
            if isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8) and not filled:
                return f"{name} by a mask"
    if name == "copy_" and place(args[0]) != place(args[1]):
        return "copy_ between devices"
    return None


def _memory(x):
    """The memory that a tensor has now: what a graph reads and writes, whatever becomes of the tensor."""
    if not isinstance(x, torch.Tensor):
        return x
    with torch._C.DisableTorchFunction():
        return x.detach()


def _number(x):
    return x.item() if isinstance(x, torch.Tensor) and x.dim() == 0 else x


class Gpu(Pretended):
    """Attributes:
    waits: what waited, in order.
    mode: of `torch.cuda.set_sync_debug_mode`.
    tape: what is being captured.
    """

    def __init__(self):
        super().__init__()
        self.waits, self.mode, self.tape = [], 0, None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if func == torch.Tensor.is_cuda.__get__:
            return place(args[0]) != CPU
        if name in ("__get__", "__set__"):
            return super().__torch_function__(func, types, args, kwargs)
        if name == "cuda":
            name, func, args = "to", torch.Tensor.to, (args[0], FIRST)
        args = tuple(torch.device(x) if isinstance(x, str) and x.startswith(("cuda", "cpu")) else x for x in args)
        leaves = tree_leaves((args, kwargs))
        on_device = any(isinstance(x, torch.Tensor) and place(x) != CPU for x in leaves)
        why = waits(name, func, args, kwargs, on_device)
        if why is not None:
            self.waits.append(why)
            if self.mode == "error" or self.tape is not None:
                raise RuntimeError(f"called a synchronizing CUDA operation: {why}")
        if name in MADE | SIZED:  # a size may lie anywhere
            own = args[: name in SIZED]
            args = (*own, *tree_map(_number, args[len(own) :]))
        out = super().__torch_function__(func, types, args, kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        if self.tape is not None and (on_device or any(place(x) != CPU for x in made)):
            self.tape.append((func, *tree_map(_memory, (args, kwargs, made))))
        return out


def again(tape):
    """A replay: the same calls on the same memory."""
    for func, args, kwargs, made in tape:
        kwargs = {name: x for name, x in kwargs.items() if name != "device"}
        if getattr(func, "__name__", "") == "to":
            args = tuple(x for x in args if not isinstance(x, torch.device))
        found = func(*args, **kwargs) if len(args) > 1 or kwargs or func is not torch.Tensor.to else args[0].clone()
        for old, new in zip(made, (x for x in tree_leaves(found) if isinstance(x, torch.Tensor)), strict=True):
            if old.data_ptr() != new.data_ptr():
                old.copy_(new)


class Graph:
    """In the place of `torch.cuda.CUDAGraph`."""

    def __init__(self):
        self.tape = []

    def pool(self):
        return 0, 0

    def replay(self):
        with torch._C.DisableTorchFunction():
            again(self.tape)


@contextmanager
def pretended_gpu(monkeypatch, *models):
    """A pretended GPU, on which captures can be made, with these models on it."""
    gpu = Gpu()
    stream = SimpleNamespace(wait_stream=lambda x: None, wait_event=lambda x: None, record_event=lambda: "event")

    @contextmanager
    def capture(graph, stream, capture_error_mode):
        gpu.tape = graph.tape
        try:
            yield
        finally:
            gpu.tape = None

    @contextmanager
    def entered(stream_or_device):
        yield

    vmap = torch.vmap

    def vmapped(function, **options):
        """Its inner tensors are not those that lie anywhere: as one function."""

        def whole(*args):
            with torch._C.DisableTorchFunction():
                return vmap(function, **options)(*args)

        return lambda *args: gpu.__torch_function__(whole, (), args)

    monkeypatch.setattr(torch, "vmap", vmapped)
    for name, value in {
        "Stream": lambda device: stream,
        "current_stream": lambda device=None: stream,
        "stream": entered,
        "device": entered,
        "set_stream": lambda stream: None,
        "synchronize": lambda device=None: None,
        "get_sync_debug_mode": lambda: gpu.mode,
        "set_sync_debug_mode": lambda mode: setattr(gpu, "mode", mode),
        "CUDAGraph": Graph,
        "graph": capture,
        "memory_snapshot": list,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    monkeypatch.setattr("lp_patch.select._kernels", lambda device: None)  # Triton would build for it
    for model in models:
        moved(model)
    with gpu:
        yield gpu


def moved(model):
    """The model itself, its weights on the pretended GPU."""
    for x in (*model.parameters(), *model.buffers()):
        put(x, FIRST)
    return model


def made(build, *args, **kwargs):
    """What `build` returns, a model or models, made on the CPU and moved: copies, too, lie on the CPU first."""
    with torch._C.DisableTorchFunction():
        found = build(*args, **kwargs)
    for x in found if isinstance(found, (list, tuple)) else [found]:
        if isinstance(x, torch.nn.Module):
            moved(x)
    return found


def on_gpu(inputs):
    return {name: put(x.clone(), FIRST) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
