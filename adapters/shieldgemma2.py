"""ShieldGemma 2: Gemma 3 in all but name. Its image classifier holds it in `.model`: that one is to be patched."""

from dataclasses import replace

from .gemma3 import ADAPTER as GEMMA

ADAPTER = replace(GEMMA, model_type="shieldgemma2", family="ShieldGemma 2")
