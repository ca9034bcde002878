"""The gate: a stock model in which a pruner's decisions count, against the model that does not see the tokens."""

import pytest
import torch
from tiny import WIDTH, N, batch, images, tiny_llava, tokens

import lp_patch
from lp_patch import ConfigError, LearnablePruner, PrunerError, UnsupportedInputError
from lp_patch.training import GatedModel, new_pruner
from lp_patch.training.gate import divergence, straight_through

CLOSE = {"rtol": 1e-4, "atol": 1e-4, "check_dtype": False}  # norms and rotary angles are float32
ROWS = [tokens(3, "image", 9), tokens(2, "image", 4, "image", 3, seed=1), tokens(1, "image", 5, seed=2)]


def halving(width, seed=0):
    """A pruner that keeps about half of random tokens."""
    torch.manual_seed(seed)
    pruner = LearnablePruner(width, 16).double()
    with torch.no_grad():
        pruner.fc2.weight.normal_()
        pruner.fc2.bias.zero_()
    return pruner


def gated(seed=0, pruner=None, dtype=torch.float64, **options):
    model = tiny_llava(seed=seed, dtype=dtype).requires_grad_(False)
    return GatedModel(model, halving(WIDTH).to(dtype) if pruner is None else pruner, **options)


def inputs(rows=ROWS, labels=True, dtype=torch.float64):
    made = batch(rows, images(sum(row.count(1) for row in rows) // N, dtype=dtype), side="right")
    if labels:
        made["labels"] = made["input_ids"].masked_fill((made["input_ids"] == 1) | (made["attention_mask"] == 0), -100)
    return made


def test_the_gate_is_what_pruning_does():
    training = gated()
    given = inputs(ROWS[:1], labels=False)
    with torch.no_grad():
        got = training.model(**given, use_cache=False).logits
    kept = int(training(**given, labels=given["input_ids"]).kept * N + 0.5)
    training.remove()
    options = {"tokens": kept, "stage_ratio": 1, "diversity": 0, "pruner": training.pruner}
    with lp_patch.applied(training.model, **options) as patch, torch.no_grad():
        want = training.model(**given).logits
        text = ~torch.isin(torch.arange(want.shape[1]), 3 + torch.arange(N))
        assert 0 < kept < N and len(patch.trace.stage1[0]) == kept
    torch.testing.assert_close(got[0, text], want[0, text], **CLOSE)


def test_the_loss_is_next_token_prediction_plus_the_budget():
    training = gated(weight=0.7, tau=0.2)
    given = inputs()
    out = training(**given)
    with torch.no_grad():
        logits = training.model(**{k: v for k, v in given.items() if k != "labels"}, use_cache=False).logits
    terms = [
        -logits[row, i].log_softmax(-1)[given["labels"][row, i + 1]]
        for row in range(3)
        for i in range(logits.shape[1] - 1)
        if given["labels"][row, i + 1] != -100
    ]
    task = torch.stack(terms).mean()
    kept = (training._gate.mask > 0.5).double().mean()
    assert len(training._gate.mask) == 4 * N
    torch.testing.assert_close(out.task_loss, task, **CLOSE)
    torch.testing.assert_close(out.kept, kept, **CLOSE)
    torch.testing.assert_close(out.budget_loss, 0.7 * (kept - 0.2) ** 2, **CLOSE)
    torch.testing.assert_close(out.loss.detach(), out.task_loss + out.budget_loss, **CLOSE)


def test_distillation_compares_with_the_open_model():
    training = gated(objective="distill")
    given = inputs()
    labels = given.pop("labels")
    with torch.no_grad(), training.opened():
        teacher = training.model(**given).logits.log_softmax(-1)
    with torch.no_grad():
        student = training.model(**given, use_cache=False).logits.log_softmax(-1)
    each = (teacher.exp() * (teacher - student)).sum(-1)
    assert (each[:, -1] > 1e-4).any(), "the gate changes nothing here"
    answers = [(row, i) for row in range(3) for i in range(labels.shape[1] - 1) if labels[row, i + 1] != -100]
    want = torch.stack([each[at] for at in answers]).mean()
    torch.testing.assert_close(training(**given, labels=labels).task_loss, want, **CLOSE)
    # without labels: the text after the last image
    lengths = given["attention_mask"].sum(1).tolist()
    after = [(row, i) for row, n in enumerate(lengths) for i in range(n - {0: 9, 1: 3, 2: 5}[row], n)]
    want = torch.stack([each[at] for at in after]).mean()
    torch.testing.assert_close(training(**given).task_loss, want, **CLOSE)


def test_full_precision_gradient_reaches_the_pruner_alone():
    training = gated().train()
    training(**inputs()).loss.backward()
    grads = {name: p.grad for name, p in training.named_parameters()}
    assert {name for name, g in grads.items() if g is not None} == {
        f"pruner.{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias")
    }
    assert all(g.abs().sum() > 0 for g in grads.values() if g is not None)


def test_straight_through_is_hard_forward_and_soft_backward():
    logits = torch.tensor([[0.0, 0.5], [3.0, -1.0], [1.0, 1.0]], requires_grad=True)
    mask = straight_through(logits)
    assert mask.tolist() == [1.0, 0.0, 0.0]
    (grad,) = torch.autograd.grad((mask * torch.tensor([1.0, 2.0, 3.0])).sum(), logits)
    p = torch.sigmoid(logits[:, 1] - logits[:, 0]).detach()
    want = (p * (1 - p) * torch.tensor([1.0, 2.0, 3.0]))[:, None] * torch.tensor([-1.0, 1.0])
    torch.testing.assert_close(grad, want)


def test_rows_of_a_batch_are_what_they_are_alone():
    training = gated(dtype=torch.float64)
    together = inputs(labels=False)
    with torch.no_grad():
        logits = training.model(**together, use_cache=False).logits
        first = 0
        for row, ids in enumerate(ROWS):
            count = ids.count(1) // N
            alone = batch([ids], together["pixel_values"][first : first + count])
            first += count
            got = training.model(**alone, use_cache=False).logits[0]
            torch.testing.assert_close(logits[row, : len(ids)], got, **CLOSE)


def test_checkpointed_layers_give_the_same_gradients():
    def grads(training):
        training(**inputs()).loss.backward()
        return [p.grad for p in training.pruner.parameters()]

    plain = gated().train()
    want = grads(plain)
    training = gated().train()
    training.activation_checkpointing_enable()
    calls = []
    layer = training.model.model.language_model.layers[1].input_layernorm
    layer.register_forward_hook(lambda *_: calls.append(1))
    training.train()
    got = grads(training)
    assert len(calls) == 2, "the layer was not run again in the backward pass"
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ConfigError, match="use_reentrant"):
        training.activation_checkpointing_enable({"use_reentrant": True})


def test_a_step_in_parts_has_the_gradient_of_the_whole():
    """Parts with other numbers of images and answers, so that no mean of means is right."""
    training = gated(weight=5.0, tau=0.1)
    whole = inputs()
    parts = [inputs(ROWS[:1]), inputs(ROWS[1:2]), inputs(ROWS[2:])]
    for part, first in zip(parts, (0, 1, 3), strict=True):
        part["pixel_values"] = whole["pixel_values"][first : first + len(part["pixel_values"])]
    parts[1]["labels"][:, ::2] = -100
    whole["labels"][1, : parts[1]["labels"].shape[1]] = parts[1]["labels"][0]
    want = training(**whole)
    want.loss.backward()
    expected = [p.grad for p in training.pruner.parameters()]
    items = (whole["labels"][:, 1:] != -100).sum()
    for frozen in (False, True):
        training.zero_grad()
        training.pruner.fc1.requires_grad_(not frozen)
        outputs, earlier = [], None
        for number, part in enumerate(parts, 1):
            outputs.append(training(**part, num_items_in_batch=items, part=number < len(parts), earlier=earlier))
            outputs[-1].loss.backward()
            earlier = outputs[-1].earlier
        for (name, p), value in zip(training.pruner.named_parameters(), expected, strict=True):
            if frozen and name.startswith("fc1"):
                assert p.grad is None
            else:
                torch.testing.assert_close(p.grad, value, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(sum(out.loss for out in outputs), want.loss, **CLOSE)
        torch.testing.assert_close(outputs[-1].kept, want.kept, **CLOSE)
        assert all(abs(float(out.kept) - float(want.kept)) > 0.005 for out in outputs[:-1]), "the parts are all alike"


def test_a_pruner_that_does_not_train_has_nothing_to_hand_on():
    training = gated()
    training.pruner.requires_grad_(False)
    whole, parts = inputs(ROWS[:2], labels=True), [inputs(ROWS[:1]), inputs(ROWS[1:2])]
    parts[1]["pixel_values"] = whole["pixel_values"][1:]
    first = training(**parts[0], part=True)
    last = training(**parts[1], earlier=first.earlier)
    torch.testing.assert_close(last.kept, training(**whole).kept)


@pytest.mark.parametrize("objective", ["ntp", "distill"])
def test_rows_without_a_label_take_no_part(objective):
    """The budget alone would only close their tokens."""
    training = gated(objective=objective)
    given, alone = inputs(ROWS), inputs(ROWS[:1])
    given["labels"][1:] = -100
    want, got = training(**alone), training(**given)
    for name in ("loss", "task_loss", "budget_loss", "kept", "tokens", "targets"):
        torch.testing.assert_close(got[name], want[name], **CLOSE)
    given["labels"][0, 1:] = -100  # what is left, the first, is predicted by nothing
    with pytest.raises(UnsupportedInputError, match="every label"):
        training(**given)
    with pytest.raises(UnsupportedInputError, match="sample 7: no answer"):
        training(skipped=["sample 7: no answer"])


@pytest.mark.parametrize("rows", [(ROWS[:1], ROWS[1:]), (ROWS[:1], [tokens(3, "image", 9, seed=5)])])
def test_two_forwards_before_one_backward(rows):
    """A layer that runs again in the backward pass needs the gate of its own forward, not of the latest one."""
    batches = [inputs(part) for part in rows]
    batches[1]["pixel_values"] = batches[1]["pixel_values"].flip(-1)
    training = gated().train()
    training.activation_checkpointing_enable()
    training.train()
    for given in batches:  # each alone: gradients add up
        training(**given).loss.backward()
    want = [p.grad for p in training.pruner.parameters()]
    training.zero_grad()
    sum(training(**given).loss for given in batches).backward()
    for got, expected in zip([p.grad for p in training.pruner.parameters()], want, strict=True):
        torch.testing.assert_close(got, expected)


def test_lora_heals_with_the_pruner():
    from peft import LoraConfig, get_peft_model

    model = tiny_llava(seed=0).requires_grad_(False)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).double()
    training = GatedModel(wrapped, halving(WIDTH), objective="distill").train()
    training(**inputs()).loss.backward()
    tuned = {name for name, p in training.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any("lora_B" in name for name in tuned) and any(name.startswith("pruner") for name in tuned)
    assert all("lora" in name or name.startswith("pruner") for name in tuned)


def test_the_teacher_has_no_lora():
    from peft import LoraConfig, get_peft_model

    model = tiny_llava(seed=0).requires_grad_(False)
    given = inputs()
    with torch.no_grad():
        want = model(**{k: v for k, v in given.items() if k != "labels"}).logits
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    training = GatedModel(wrapped.double(), halving(WIDTH), objective="distill")
    with torch.no_grad(), training.opened():
        got = wrapped(**{k: v for k, v in given.items() if k != "labels"}).logits
    torch.testing.assert_close(got, want, **CLOSE)


def test_what_is_refused():
    with pytest.raises(ConfigError, match="freeze"):
        GatedModel(tiny_llava(seed=0))
    model = tiny_llava(seed=0).requires_grad_(False)
    with pytest.raises(ConfigError, match="objective"):
        GatedModel(model, objective="kd")
    with pytest.raises(ConfigError, match="tau"):
        GatedModel(model, tau=1.5)
    with pytest.raises(ConfigError, match="weight"):
        GatedModel(model, weight=-1.0)
    with pytest.raises(PrunerError, match="wide"):
        GatedModel(model, LearnablePruner(WIDTH + 1))
    with lp_patch.applied(model), pytest.raises(ConfigError, match=r"lp_patch\.remove"):
        GatedModel(model)
    assert not lp_patch.is_applied(model)
    training = gated()
    with pytest.raises(UnsupportedInputError, match="images"):
        training(**batch([tokens(5)], None), labels=batch([tokens(5)], None)["input_ids"])
    given = inputs(labels=False)
    with pytest.raises(UnsupportedInputError, match="labels"):
        training(**given)
    with pytest.raises(UnsupportedInputError, match="distill"):
        divergence(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.bool))
    with pytest.raises(ConfigError, match="in training"):
        lp_patch.apply(training.model)
    training.remove()
    lp_patch.apply(training.model)


def test_an_exception_in_a_forward_leaves_the_next_one_right():
    training = gated()
    given = inputs()
    want = training(**given).loss
    broken = {**given, "pixel_values": given["pixel_values"][:2]}
    with pytest.raises(ValueError):
        training(**broken)
    torch.testing.assert_close(training(**given).loss, want)


def test_a_new_pruner_keeps_nearly_everything():
    torch.manual_seed(0)
    keep = new_pruner(64).score(torch.randn(200, 64))
    assert (keep > 0.5).float().mean() > 0.95
