"""The tables of families and modes in docs, from what the tests said under each version of transformers.

`python -m pytest --matrix` notes the outcomes in `tests/matrix/<version>.json`, also of single test functions (whole
ones, with all their parameters); `examples/tables.py` puts the tables into the pages. A cell is "yes" only where all
its tests that ran passed, and says what a version or a family cannot do.
"""

import json
from pathlib import Path

from tiny import ORIGINAL_CANNOT

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
    "Offloaded caches: need CUDA, patched or not": [f"{WRAP}::test_offloaded_caches_need_cuda"],
    "Chunked prefill with images: refused with the reason": [
        f"{GENERATE}::test_chunked_prefill_is_refused_with_images_and_free_without"
    ],
    "FlashAttention's inputs: no gap, masks of the right length": [
        f"{WRAP}::test_flash_attention_is_never_shown_a_gap"
    ],
    "Flex attention, forward (on a CPU)": [f"{WRAP}::test_flex_attention"],
    "bf16, fp16": [f"{WRAP}::test_low_precision"],
    "PEFT before and after, `modules_to_save`, disable, merge": [
        f"{WRAP}::test_peft",
        f"{WRAP}::test_peft_modules_to_save_in_the_projector",
        f"{WRAP}::test_peft_patch_then_modules_to_save",
    ],
    "DDP": [f"{WRAP}::test_ddp"],
    "FSDP2, 1 and 2 processes": [f"{WRAP}::test_fsdp2"],
    "`torch.compile` of a forward, patched before and after (graph breaks)": [
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


FAMILY, QWEN, INTERNVL = "test_families.py", "test_qwen.py", "test_internvl.py"
RELATIVES, OTHERS, ORIGINAL = "test_llava_family.py", "test_other_families.py", "test_original_llava.py"
FORWARDS = [
    *(f"{file}::test_forward" for file in (QWEN, INTERNVL, OTHERS, ORIGINAL)),
    f"{RELATIVES}::test_padded_rows_equal_the_oracle_alone",
]
# what a family is asked -> its tests, each of those that is run for that family
ASKED = {
    "forward": [f"{FAMILY}::test_forward", f"{FORWARD}::test_one_row", *FORWARDS],
    "several images": [
        f"{FAMILY}::test_several_inputs", f"{FORWARD}::test_padded_rows_equal_themselves_alone", *FORWARDS
    ],
    "padded batch": [
        f"{FAMILY}::test_padded_batch", f"{FORWARD}::test_padded_rows_equal_themselves_alone", *FORWARDS
    ],
    "eager": [f"{FAMILY}::test_eager", f"{RELATIVES}::test_options_and_eager_attention"],
    "generate, beams": [
        f"{FAMILY}::test_generate", f"{GENERATE}::test_greedy", f"{GENERATE}::test_padded_batch",
        *(f"{file}::test_generate" for file in (QWEN, INTERNVL, OTHERS, ORIGINAL)),
        f"{RELATIVES}::test_greedy", f"{RELATIVES}::test_beams", f"{ORIGINAL}::test_beams_and_several_answers",
    ],
    "later turns": [
        *(f"{file}::test_second_turn_on_a_kept_cache" for file in (GENERATE, INTERNVL, OTHERS)),
        f"{QWEN}::test_second_text_turn_on_a_kept_cache", f"{QWEN}::test_second_turn_with_a_new_image",
        f"{RELATIVES}::test_text_turn_on_the_kept_cache", f"{RELATIVES}::test_turn_with_pictures_on_the_kept_cache",
        f"{ORIGINAL}::test_text_turn_on_the_kept_cache",
    ],
    "static cache": [f"{FAMILY}::test_static_cache"],
    "untouched at full budget, after removal": [
        f"{FORWARD}::test_full_budget_is_untouched_bit_for_bit", f"{LIFE}::test_nothing_is_left_behind",
        *(f"{file}::test_nothing_to_prune_and_removal_bit_for_bit" for file in (QWEN, INTERNVL, OTHERS)),
        f"{RELATIVES}::test_full_budget_and_text_alone_are_untouched_bit_for_bit", f"{RELATIVES}::test_remove_restores",
        f"{ORIGINAL}::test_full_budget_text_and_removal_bit_for_bit",
    ],
    "compact positions": [f"{FAMILY}::test_compact_positions"],
    '`scorer="cls"`': [
        f"{FAMILY}::test_cls_is_refused", f"{GENERATE}::test_greedy", f"{ORIGINAL}::test_cls_reads_the_tower"
    ],
    "bf16, fp16": [f"{FAMILY}::test_low_precision"],
    "processor, pipeline": [
        f"{OTHERS}::test_from_text_and_pictures_to_an_answer", f"{RELATIVES}::test_processor_to_generate",
        f"{WRAP}::test_pipeline_with_the_trained_testbed",
    ],
    "PEFT": [f"{FAMILY}::test_peft"],
    "DDP, FSDP2": [f"{FAMILY}::test_ddp", f"{FAMILY}::test_fsdp2", f"{FAMILY}::test_two_processes"],
    "compiled forward": [f"{FAMILY}::test_compile"],
    "checkpointing": [f"{FAMILY}::test_gradient_checkpointing"],
    "device map": [f"{FAMILY}::test_device_map", f"{FAMILY}::test_two_devices"],
    "all weights offloaded": [f"{FAMILY}::test_all_weights_offloaded"],
    "Trainer": [f"{FAMILY}::test_trainer"],
    "copies, saving": [f"{FAMILY}::test_copies", f"{FAMILY}::test_saved_models_load_unpatched"],
}  # fmt: skip
NOT_ASKED = {
    ("llava_llama", "processor, pipeline"): "not applicable: the package has no processor",
    ("llava_llama", "later turns"): ORIGINAL_CANNOT,
    ("llava_llama", "later turn"): ORIGINAL_CANNOT,
}
TYPES = "test_types.py"
# what every model type is asked: the families above by tests of their own, the others by one set of checks
TYPES_ASKED = {
    "padded batch": [f"{TYPES}::test_forward", *ASKED["padded batch"]],
    "eager": [f"{TYPES}::test_eager", *ASKED["eager"]],
    "generation": [f"{TYPES}::test_generate", f"{FAMILY}::test_generate", f"{GENERATE}::test_greedy"],
    "beams": [f"{TYPES}::test_beams", *(x for x in ASKED["generate, beams"] if not x.endswith("test_greedy"))],
    "later turn": [f"{TYPES}::test_second_text_turn", *ASKED["later turns"]],
    "static cache": [f"{TYPES}::test_static_cache", *ASKED["static cache"]],
    "untouched at full budget": [f"{TYPES}::test_nothing_to_prune", *ASKED["untouched at full budget, after removal"]],
}
MEASURED = {
    "forward, float64": [
        f"{TYPES}::test_forward", *(f"{FAMILY}::test_{name}" for name in ("forward", "several_inputs", "padded_batch"))
    ],
    "forward, float32, eager": [f"{TYPES}::test_eager", f"{FAMILY}::test_eager"],
    "generate": [f"{TYPES}::test_generate", f"{FAMILY}::test_generate"],
}  # fmt: skip  # largest difference of a logit to the oracle


def family_of(item) -> str | None:
    """Whose model a test runs: a parameter says it, or the file."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    alone = {INTERNVL: "internvl", ORIGINAL: "llava_llama", **dict.fromkeys((FORWARD, GENERATE, LIFE, WRAP), "llava")}
    family = parameters.get("family", parameters.get("kind", alone.get(item.path.name)))
    return family.partition(":")[0] if family and item.path.name == TYPES else family  # a type's variants count for it


def note(results: list[tuple[str, str, dict]], version: str) -> None:
    """Write what each test function came to under one version: all its parameters together, and by family.

    What did not run this time stays as it was noted, unless no table asks for it any more.

    `results`: the test, its outcome, and what it recorded: its family; "cell", where the answer is no plain yes, with
    the reason; "difference", the largest to the oracle.
    """
    modes = {test for tests in ROWS.values() for test in tests}
    asked = {test for tests in (*ASKED.values(), *TYPES_ASKED.values()) for test in tests}
    path = FOLDER / f"{version}.json"
    content: dict = json.loads(path.read_text()) if path.exists() else {"modes": {}, "families": {}}
    ran = {(test, properties["family"]) for test, _, properties in results}
    content["modes"] = {x: v for x, v in content["modes"].items() if x in modes - {test for test, _ in ran}}
    for family, found in content["families"].items():
        content["families"][family] = {x: v for x, v in found.items() if x in asked and (x, family) not in ran}
    for test, outcome, properties in sorted(results, key=lambda x: x[0]):
        if test in modes:
            found = content["modes"].setdefault(test, [])
            found[:] = sorted({*found, outcome})
        if test in asked and properties["family"]:
            one = content["families"].setdefault(properties["family"], {}).setdefault(test, {"outcomes": []})
            one["outcomes"] = sorted({*one["outcomes"], outcome})
            if "cell" in properties:
                one["cell"] = properties["cell"]
            if "difference" in properties:
                one["difference"] = max(properties["difference"], one.get("difference", 0.0))
    FOLDER.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def versions() -> list[tuple[str, dict]]:
    """What was noted, newest version first."""
    files = sorted(FOLDER.glob("*.json"), key=lambda p: [int(x) for x in p.stem.split(".")], reverse=True)
    return [(path.stem, json.loads(path.read_text())) for path in files]


def cell(outcomes: dict[str, list[str]], tests: list[str]) -> str:
    """One row under one version: yes, no, the version's own limit, or not tried."""
    found = {outcome for test in tests for outcome in outcomes.get(test, ["not tried"])}
    if "failed" in found:
        return "**no**"
    if "passed" in found:
        return "yes" if found <= {"passed", "skipped"} else "partly tried"
    return "not in this version" if found == {"skipped"} else "not tried"


def table() -> str:
    """Modes by version, as Markdown."""
    found = versions()
    lines = [
        "| mode | " + " | ".join(f"transformers {name}" for name, _ in found) + " |",
        "|---|" + "---|" * len(found),
    ]
    for row, tests in ROWS.items():
        lines.append(f"| {row} | " + " | ".join(cell(content["modes"], tests) for _, content in found) + " |")
    return "\n".join(lines)


def answer(found: dict[str, dict], tests: list[str]) -> tuple[str, str | None]:
    """What one family's tests say to one question, and the reason where that is no plain yes."""
    run = [found[test] for test in tests if found.get(test, {"outcomes": ["skipped"]})["outcomes"] != ["skipped"]]
    outcomes = {outcome for one in run for outcome in one["outcomes"]}
    if "failed" in outcomes:
        return "**no**", None
    if "passed" not in outcomes:
        return "not tried", None
    reasons = [one["cell"] for one in run if "cell" in one]
    word = reasons[0].split(":")[0] if len(reasons) == len(run) else "yes"
    return word, reasons[0] if reasons else None


def _rows(content: dict, names: dict[str, str], asked: dict[str, list[str]], reasons: list[str]) -> list[list[str]]:
    """A row of answers for each model type of `names`; reasons are numbered in the order of their appearance."""
    rows = []
    for model_type, family in sorted(names.items(), key=lambda x: (x[1].lower(), x[0])):
        cells = []
        for question, tests in asked.items():
            word, why = answer(content["families"].get(model_type, {}), tests)
            if (model_type, question) in NOT_ASKED:
                why = NOT_ASKED[model_type, question]
                word = why.split(":")[0]
            if why is not None and why not in reasons:
                reasons.append(why)
            cells.append(word if why is None else f"{word} ({reasons.index(why) + 1})")
        rows.append([family, f"`{model_type}`", *cells])
    return rows


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in [head, *rows]]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def types(supported: dict[str, str]) -> str:
    """Every model type by what all are asked, as Markdown, with the largest difference of a logit to the oracle."""
    version, content = next(x for x in versions() if x[1]["families"])
    reasons: list[str] = []
    rows = _rows(content, supported, TYPES_ASKED, reasons)
    for row in rows:
        found = content["families"].get(row[1].strip("`"), {})
        measured = [
            found[x]["difference"] for tests in MEASURED.values() for x in tests if "difference" in found.get(x, {})
        ]
        row.append(f"{max(measured):.0e}" if measured else "")
    return "\n".join(
        [
            _table([f"transformers {version}", "model type", *TYPES_ASKED, "largest difference"], rows),
            "",
            *(f"({i}) {why}  " for i, why in enumerate(reasons, 1)),
        ]
    )


def families(supported: dict[str, str]) -> str:
    """Families by everything that some are asked, as Markdown; the reasons follow."""
    version, content = next(x for x in versions() if x[1]["families"])
    own = {x: family for x, family in supported.items() if f"{FAMILY}::test_forward" in content["families"].get(x, {})}
    reasons: list[str] = []
    rows = _rows(content, own, ASKED, reasons)
    return "\n".join(
        [
            _table([f"transformers {version}", "model type", *ASKED], rows),
            "",
            *(f"({i}) {why}  " for i, why in enumerate(reasons, 1)),
            "",
            f"Largest difference of a logit to the oracle: {differences(content['families'])}.",
        ]
    )


def differences(content: dict[str, dict]) -> str:
    """The largest of all families for each thing that is measured."""
    largest = []
    for what, tests in MEASURED.items():
        value, family = max(
            (found[test]["difference"], family)
            for family, found in content.items()
            for test in tests
            if "difference" in found.get(test, {})
        )
        largest.append(f"{what} {value:.1e}" + (f" (`{family}`)" if value else ""))
    return "; ".join(largest)
