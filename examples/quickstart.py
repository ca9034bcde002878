"""Prune the visual tokens of a checkpoint: ``python examples/quickstart.py [MODEL] [IMAGE] [QUESTION]``.

MODEL is a folder or a Hub id of a supported family (see ``lp_patch.supported()``). The defaults need no network.
"""

import json
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import lp_patch

testbed = Path(__file__).resolve().parent / "testbed"
asked = json.loads((testbed / "demo.json").read_text())["questions"][0]["question"]
defaults = [testbed / "model", testbed / "demo.png", asked]
checkpoint, picture, question = [*sys.argv[1:], *defaults[len(sys.argv) - 1 :]]

model = AutoModelForImageTextToText.from_pretrained(checkpoint).to("cuda" if torch.cuda.is_available() else "cpu")
processor = AutoProcessor.from_pretrained(checkpoint)

patch = lp_patch.apply(model)  # the one line; everything around it is plain transformers

image = Image.open(picture).convert("RGB")
content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
)
inputs = inputs.to(model.device, model.dtype)
output = model.generate(**inputs, max_new_tokens=64)

print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(patch.report())
