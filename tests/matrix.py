"""The README's table of tested modes, from what the tests said under each version of transformers.

`python -m pytest --matrix` notes every test's outcome in `tests/matrix/<version>.json`; `examples/tables.py` puts this
table into the README. A row is "yes" only where all its tests passed, and a cell names what an old version cannot do.
"""

import json
from pathlib import Path

FOLDER = Path(__file__).parent / "matrix"
FORWARD, GENERATE, LIFE, WRAP = "test_forward.py", "test_generate.py", "test_lifecycle.py", "test_wrappers.py"
ROWS = {
    "Every number equal to the oracle, SDPA and eager, MHA, GQA, MQA": [f"{FORWARD}::test_one_row"],
    "Padded batches, left and right; rows with 0, 1, 2 images": [f"{FORWARD}::test_padded_rows_equal_themselves_alone"],
    "Full budget, text-only prompts: bit for bit": [
        f"{FORWARD}::test_full_budget_is_untouched_bit_for_bit",
        f"{FORWARD}::test_text_only_prompts_are_untouched_bit_for_bit",
    ],
    "Labels and loss, `logits_to_keep`, tuples, gradients": [
        f"{FORWARD}::test_loss_is_that_of_the_kept_tokens",
        f"{FORWARD}::test_logits_to_keep_and_tuples",
        f"{FORWARD}::test_gradients_flow_through_the_survivors",
    ],
    "`output_hidden_states` of the input's length, `output_attentions` as run": [
        f"{FORWARD}::test_hidden_states_have_the_inputs_length",
        f"{GENERATE}::test_attentions_are_those_of_the_tokens_that_ran",
    ],
    "Greedy generation, every step": [f"{GENERATE}::test_greedy"],
    "Beams and padded batches": [f"{GENERATE}::test_padded_batch"],
    "Sampling, `num_return_sequences`": [f"{GENERATE}::test_sampling_several_sequences"],
    "`use_cache=False`": [f"{GENERATE}::test_without_cache_every_step_is_a_prefill"],
    "Multi-turn with `generate` on a kept cache, new images too": [f"{GENERATE}::test_second_turn_on_a_kept_cache"],
    "Multi-turn with forward calls, padded, new images": [f"{GENERATE}::test_manual_turns_of_a_padded_batch"],
    "Prompt look-up and assisted decoding": [f"{GENERATE}::test_assisted_decoding_equals_greedy"],
    "Encoded features from the caller": [f"{GENERATE}::test_features_from_the_caller"],
    "`inputs_embeds` with placeholders": [f"{GENERATE}::test_inputs_embeds_with_placeholders"],
    "Streaming; several threads on one model": [
        f"{GENERATE}::test_streaming_from_a_thread",
        f"{GENERATE}::test_two_threads_get_their_own_answers",
    ],
    "After an exception in the middle": [f"{GENERATE}::test_an_exception_in_the_middle_leaves_the_next_call_right"],
    "Quantised cache (quanto)": [f"{GENERATE}::test_quantised_cache_gives_a_near_answer"],
    "Cache: crop, reorder, repeat, select, copy, pickle": [f"{LIFE}::test_cache_operations_on_short_layers"],
    "Static cache": [
        f"{GENERATE}::test_static_cache",
        f"{GENERATE}::test_static_cache_is_free_at_full_budget_and_refused_where_it_cannot_be_right",
    ],
    "Chunked prefill with images: refused with the reason": [
        f"{GENERATE}::test_chunked_prefill_is_refused_with_images_and_free_without"
    ],
    "FlashAttention's inputs: no gap, masks of the right length": [
        f"{WRAP}::test_flash_attention_is_never_shown_a_gap"
    ],
    "bf16, fp16": [f"{WRAP}::test_low_precision"],
    "PEFT before and after, `modules_to_save`, disable, merge": [
        f"{WRAP}::test_peft",
        f"{WRAP}::test_peft_modules_to_save_in_the_projector",
        f"{WRAP}::test_peft_patch_then_modules_to_save",
    ],
    "DDP": [f"{WRAP}::test_ddp"],
    "FSDP2, 1 and 2 processes": [f"{WRAP}::test_fsdp2"],
    "`torch.compile`, patched before and after (graph breaks)": [
        f"{WRAP}::test_compiled_module_patched_before_and_after",
        f"{LIFE}::test_compile_does_not_miss_a_later_patch",
    ],
    "Gradient checkpointing, both kinds": [f"{WRAP}::test_gradient_checkpointing_gives_the_same_gradients"],
    "accelerate: weights offloaded to CPU or disk": [f"{WRAP}::test_accelerate_offloading"],
    "bitsandbytes 4-bit (CPU)": [f"{WRAP}::test_bitsandbytes_4_bit"],
    "Trainer": [f"{WRAP}::test_trainer"],
    '`pipeline("image-text-to-text")`': [f"{WRAP}::test_pipeline_with_the_trained_testbed"],
    "`deepcopy`, pickle, `torch.save`, `save_pretrained`": [
        f"{LIFE}::test_a_copy_of_a_patched_model_is_a_patched_model_of_its_own",
        f"{LIFE}::test_pickle_and_torch_save_of_a_patched_model",
        f"{LIFE}::test_save_pretrained_of_a_patched_model_loads_unpatched",
    ],
    "Removal leaves nothing, bit for bit": [
        f"{LIFE}::test_nothing_is_left_behind",
        f"{LIFE}::test_forty_rounds_leave_it_as_new",
    ],
}


def note(outcomes: dict[str, list[str]], version: str) -> None:
    """Write what each test function (its parameters together) came to under one version."""
    FOLDER.mkdir(exist_ok=True)
    wanted = {test for tests in ROWS.values() for test in tests}
    content = {name: sorted(set(found)) for name, found in sorted(outcomes.items()) if name in wanted}
    (FOLDER / f"{version}.json").write_text(json.dumps(content, indent=1) + "\n")


def cell(outcomes: dict[str, list[str]], tests: list[str]) -> str:
    """One row under one version: yes, no, the version's own limit, or not tried."""
    found = {outcome for test in tests for outcome in outcomes.get(test, ["not tried"])}
    if "failed" in found:
        return "**no**"
    if "passed" in found:
        return "yes" if found <= {"passed", "skipped"} else "partly tried"
    return "not in this version" if found == {"skipped"} else "not tried"


def table() -> str:
    """Markdown, newest version first."""
    files = sorted(FOLDER.glob("*.json"), key=lambda p: [int(x) for x in p.stem.split(".")], reverse=True)
    versions = [(path.stem, json.loads(path.read_text())) for path in files]
    lines = [
        "| mode | " + " | ".join(f"transformers {name}" for name, _ in versions) + " |",
        "|---|" + "---|" * len(files),
    ]
    for row, tests in ROWS.items():
        lines.append(f"| {row} | " + " | ".join(cell(outcomes, tests) for _, outcomes in versions) + " |")
    return "\n".join(lines)
