"""For an environment of vLLM's CPU build: PyPI's torchvision is made for CUDA, and beside a CPU torch its import fails
for want of the operators that its own library would bring. Only their names are asked for.
"""

import importlib.util
import sys


class _BeforeTorchvision:
    """Names the operators when torchvision is first looked for: until then nobody pays for importing torch."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            sys.modules["_torchvision_operators"] = self  # who keeps the library alive
        return None


if importlib.util.find_spec("torchvision") is not None:
    sys.meta_path.insert(0, _BeforeTorchvision())
