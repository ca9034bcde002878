"""Counting what a forward dispatches: operations that reach a kernel, views left out."""

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode

VIEWS = {"aten::detach", "aten::_unsafe_view", "aten::alias", "aten::lift_fresh", "aten::_reshape_alias"}


class Counted(TorchDispatchMode):
    """Counts dispatched operations by name; `waits` are those that hand a device's number to the host."""

    def __init__(self):
        super().__init__()
        self.ops = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if not func.is_view and name not in VIEWS:
            self.ops[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self):
        return sum(self.ops.values())

    @property
    def waits(self):
        return self.ops["aten::_local_scalar_dense"] + self.ops["aten::nonzero"] + self.ops["aten::equal"]
