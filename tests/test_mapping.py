"""Every model type that transformers maps to image-text-to-text is supported, or refused with a reason of its own."""

from importlib.metadata import version
from types import SimpleNamespace

import pytest
from torch import nn
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as MAPPING

import lp_patch
from lp_patch import registry
from lp_patch.unfit import UNFIT


def test_every_type_is_supported_or_refused_with_a_reason():
    new = sorted(set(MAPPING) - set(lp_patch.supported()) - set(UNFIT))
    assert not new, (
        f"transformers {version('transformers')} maps {', '.join(new)} to image-text-to-text: give each an adapter and "
        "a tiny model in tests/tiny_models (CONTRIBUTING.md), or its reason in lp_patch/unfit.py"
    )


def test_no_type_is_both():
    assert not set(lp_patch.supported()) & set(UNFIT)


def test_most_types_are_supported():
    count = len(set(MAPPING) & set(lp_patch.supported()))
    assert count > len(MAPPING) / 2
    if len(MAPPING) >= 100:  # those of 5.24
        assert count >= 60


def test_no_reason_is_for_a_type_that_nobody_knows():
    unknown = set(UNFIT) - set(MAPPING) - set(CONFIG_MAPPING_NAMES)
    older = len(MAPPING) < 100  # than 5.24, and knows fewer
    assert older or not unknown


def test_every_supported_type_has_a_tiny_model():
    from families import FAMILIES
    from tiny_models import TYPES

    tried = {key.partition(":")[0] for key in (*TYPES, *FAMILIES)}
    assert set(lp_patch.supported()) & set(CONFIG_MAPPING_NAMES) <= tried


def stand_in(model_type):
    """A model without weights whose config is that type's."""
    model = nn.Module()
    try:
        model.config = AutoConfig.for_model(model_type)
    except Exception:  # it needs arguments, or this transformers does not know it
        model.config = SimpleNamespace(model_type=model_type, vision_config=None)
    return model


@pytest.mark.parametrize("model_type", UNFIT)
def test_what_does_not_fit_is_refused_with_its_reason(model_type):
    model = stand_in(model_type)
    assert model.config.model_type == model_type
    with pytest.raises(lp_patch.UnsupportedModelError) as refusal:
        lp_patch.apply(model, tokens=4)
    said = str(refusal.value)
    assert said.startswith(f"Module (model type {model_type!r}) cannot be pruned: {UNFIT[model_type]}. ")
    assert "lp_patch.supported()" in said
    assert not lp_patch.is_applied(model)


@pytest.mark.parametrize("reason", sorted(set(UNFIT.values())))
def test_a_reason_is_one_clause(reason):
    assert reason[0].islower() and not reason.endswith(".") and len(reason) < 240


def test_older_transformers_are_refused_for_types_that_were_not_tried_there(monkeypatch):
    lp_patch.supported()
    model, old = SimpleNamespace(config=SimpleNamespace(model_type="gemma3")), SimpleNamespace()
    old.config = SimpleNamespace(model_type="llava")
    monkeypatch.setattr(registry, "installed", lambda: (5, 17))
    with pytest.raises(lp_patch.UnsupportedModelError, match=r"tried with transformers 5\.23 and later, installed is"):
        registry.adapter_for(model)
    assert registry.adapter_for(old).family == "LLaVA"
    monkeypatch.setattr(registry, "installed", lambda: (5, 23))
    assert registry.adapter_for(model).family == "Gemma 3"
