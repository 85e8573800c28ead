"""All families, and the formats that they are kept in elsewhere."""

from __future__ import annotations

from toolkit.arch.families.gpt import GPT
from toolkit.arch.families.llama import LLAMA
from toolkit.arch.families.mistral import MISTRAL
from toolkit.arch.families.qwen2 import QWEN2
from toolkit.arch.families.qwen3 import QWEN3
from toolkit.arch.family import Family, Format

FAMILIES: dict[str, Family] = {f.name: f for f in (GPT, LLAMA, MISTRAL, QWEN2, QWEN3)}
FORMATS: dict[str, tuple[Family, Format]] = {form.name: (f, form) for f in FAMILIES.values() for form in f.formats}
