"""transformers' ModelTesterMixin over our tiny families; `run.py` beside it says how and where it comes from.

LP_PATCH_HF_RATIO: every model of a family that a test builds or loads is patched with this budget; empty: stock.
"""

import os
import sys
import types
import unittest
from copy import deepcopy
from functools import wraps
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import families

import lp_patch

ROWS = 7  # what the mixin's comparisons of attention back-ends fill a batch up to, with ids that may be a placeholder's
RATIO = os.environ.get("LP_PATCH_HF_RATIO")

# the sdist holds tests/test_*.py alone: its mixin inherits two that are elsewhere
for name, mixin in (("exporters.test_export", "ExportTesterMixin"), ("generation.test_utils", "GenerationTesterMixin")):
    package, _, module = name.partition(".")
    sys.modules[f"tests.{package}"] = types.ModuleType(package)
    sys.modules[f"tests.{name}"] = stub = types.ModuleType(module)
    setattr(stub, mixin, type(mixin, (), {}))
from tests import test_modeling_common as common

# pictures first, where a mask of the mixin hides parts of one; and one image or video in every row, which it cuts apart
for prompts in (families.LLAVA, families.TILED, families.FRAMED, families.QWEN, families.MISTRAL, families.IDEFICS):
    prompts[0] = prompts[0][1:]
families.INTERNVL[0] = (("image", 1), 5)


class Tester:
    """What the mixin asks for a config and inputs."""

    __test__ = False
    batch_size = ROWS
    is_training = True

    def __init__(self, family):
        self.model, scene = families.make(family, dtype=torch.float32, which=(0,) * ROWS)
        if hasattr(self.model.config, "vision_feature_layer"):
            self.model.config.vision_feature_layer = -1  # every layer of the tower is used
        vision = self.model.config.vision_config.to_dict()
        self.vision_config = {"num_hidden_layers": vision.get("depth"), **vision}
        text, generator = self.model.config.get_text_config(), torch.Generator().manual_seed(0)
        self.inputs = {name: value for name, value in scene.forward().items() if name != "position_ids"}
        for name, value in self.inputs.items():  # make() repeats one row
            if value.is_floating_point():
                value = torch.randn(value.shape, generator=generator)
                # Qwen's patches of all rows follow one another, and it reads them in any shape
                self.inputs[name] = value.unflatten(0, (ROWS, -1)) if family.startswith("qwen") else value
        ids = self.inputs["input_ids"]
        drawn = torch.randint(7, text.vocab_size, ids.shape, generator=generator)
        self.inputs["input_ids"] = torch.where(ids < 7, ids, drawn)
        self.seq_length = ids.shape[1]
        self.hidden_size, self.num_attention_heads = text.hidden_size, text.num_attention_heads
        self.num_hidden_layers = text.num_hidden_layers

    def get_config(self):
        return type(self.model.config).from_dict(self.model.config.to_dict())

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), deepcopy(self.inputs)


def patch_all(classes):
    """Every model that is made on its own, and not as a part of another, comes patched."""
    depth = 0

    def patched(init):
        @wraps(init)
        def inner(self, *args, **kwargs):
            nonlocal depth
            depth += 1
            try:
                init(self, *args, **kwargs)
            finally:
                depth -= 1
            if depth == 0:
                lp_patch.apply(self, ratio=float(RATIO))

        return inner

    for cls in classes:
        cls.__init__ = patched(cls.__init__)


def suite(family):
    """The test class of one family."""
    tester = Tester(family)
    rows = [name for name in tester.inputs if name not in ("input_ids", "attention_mask")]

    class Suite(common.ModelTesterMixin, common.GenerationTesterMixin, unittest.TestCase):
        _is_composite = True
        model_tester = tester
        all_model_classes = (type(tester.model.base_model), type(tester.model))
        additional_model_inputs = rows
        skip_test_image_features_output_shape = skip_test_video_features_output_shape = family.startswith("qwen")
        test_all_params_have_gradient = False  # a tower's last norm may have none
        test_num_layers_is_small = None  # ours have six, so that both stages have some

        def setUp(self):
            common.set_seed(0)

    if RATIO:
        patch_all(Suite.all_model_classes)
    Suite.__name__ = Suite.__qualname__ = f"Test_{family}"
    return Suite


for family in os.environ["LP_PATCH_HF_FAMILIES"].split():
    globals()[f"Test_{family}"] = suite(family)
