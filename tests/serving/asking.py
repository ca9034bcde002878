"""The same prompts to vLLM with the plugin and to transformers with `lp_patch.apply`: tokens and log-probabilities."""

import gc
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import lp_patch
import lp_patch.vllm

TESTBED = Path(__file__).resolve().parents[2] / "examples" / "testbed"


def serve(folder, options, rounds, new, stop=True, **engine):
    """What a vLLM of this process, in float32, answers in each round of prompts, (text, pictures) each.

    Returns a list of [(generated ids, log-probability of each, prompt tokens found in the cache)]. Nothing of it
    outlives the call, also where it fails.
    """
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    given = {"dtype": "float32", "enforce_eager": True, "distributed_executor_backend": "uni", "max_num_seqs": 16}
    if options is not None:
        given["hf_overrides"] = lp_patch.vllm.overrides(folder, **options)
    sampling = SamplingParams(max_tokens=new, temperature=0, logprobs=1, ignore_eos=not stop)
    engines = []
    try:
        engines.append(LLM(str(folder), **{**given, **engine}))
        return [
            [read(x) for x in engines[0].generate([written(x) for x in prompts], sampling, use_tqdm=False)]
            for prompts in rounds
        ]
    finally:
        engines.clear()
        gc.collect()
        cleanup_dist_env_and_memory()


def written(prompt):
    """A prompt as vLLM takes it."""
    text, images = prompt
    return {"prompt": text, **({"multi_modal_data": {"image": images}} if images else {})}


def read(output):
    """(generated ids, log-probability of each, prompt tokens found in the cache) of what vLLM gave."""
    (choice,) = output.outputs
    ids = list(choice.token_ids)
    chances = [chances[i].logprob for i, chances in zip(ids, choice.logprobs, strict=True)]
    return ids, chances, output.num_cached_tokens


def expect(folder, options, prompts, new, stop=True):
    """The same of transformers and `apply`, prompt by prompt."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    with nullcontext() if options is None else lp_patch.applied(model, stage_ratio=1, **options):
        for text, images in prompts:
            inputs = processor(text=text, images=images or None, return_tensors="pt")
            output = model.generate(
                **inputs,
                max_new_tokens=new,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
                eos_token_id=model.generation_config.eos_token_id if stop else None,
            )
            ids = output.sequences[:, inputs["input_ids"].shape[1] :]
            chances = torch.stack(output.logits, dim=1).log_softmax(dim=2).gather(2, ids[..., None])[..., 0]
            answers.append((ids.squeeze(0).tolist(), chances.squeeze(0).tolist()))
    return answers


def compare(ours, theirs):
    """(how many answers differ, the largest difference of log-probabilities where they do not)."""
    unequal = [a for (a, *_), (b, _) in zip(ours, theirs, strict=True) if a != b]
    same = [(x, y) for (a, x, _), (b, y) in zip(ours, theirs, strict=True) if a == b]
    return len(unequal), max((abs(p - q) for x, y in same for p, q in zip(x, y, strict=True)), default=0.0)
