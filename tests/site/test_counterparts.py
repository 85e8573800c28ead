"""Every key, command and name that the tables of docs/from/ give as a counterpart is there, and the
pages show the tables.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re

import pytest

import toolkit
from tests.site.counterparts import KINDS, TABLES, Flag, Table, read_table, with_table
from tests.site.reference import commands
from toolkit.config.deepspeed_table import KEYS
from toolkit.config.describe import keys, section_model
from toolkit.config.load import parse_config

READ = {path.stem: read_table(path) for path in TABLES}
FLAGS = [(name, flag) for name, table in READ.items() for flag in table.flags]
SHAPE = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
DOTTED = r"\b(?:run|model|parallel|zero|train|optimizer|data|checkpoint|log)\.[a-z_]+(?:\.[a-z_]+)*"


def schema() -> set[str]:
    """Every key of the YAML, with those within a mapping that has keys of its own."""
    found = set()
    for dotted, field in keys():
        inner = section_model(field)
        found |= {dotted, *(f"{dotted}.{name}" for name in inner.model_fields)} if inner else {dotted}
    return found


def check_key(text: str) -> None:
    """text: a key, or section.key=value that must be a legal one."""
    dotted, _, value = text.partition("=")
    assert dotted in schema(), f"{dotted} is no key"
    if value:
        section, key = dotted.split(".")
        family = "gpt" if value.startswith("gelu") else "llama"
        raw = (
            {"model": {**SHAPE, "family": family}, section: {key: value}} if section != "model" else {"model": {**SHAPE, "family": family}}
        )
        raw[section][key] = {"true": True, "false": False}.get(value, value)
        parse_config(raw)


def check_command(text: str) -> None:
    """text: a command with or without one of its options."""
    name = re.split(r" --| \[", text)[0]
    found = dict(commands()).get(name)
    assert found is not None, f"{name} is no command"
    options = {o for p in found.params for o in (*p.opts, *p.secondary_opts)}
    assert set(re.findall(r"--[a-z-]+", text)) <= options, text


@pytest.mark.parametrize(("name", "flag"), FLAGS, ids=[f"{name} {flag.name}" for name, flag in FLAGS])
def test_counterpart_is_there(name: str, flag: Flag) -> None:
    if flag.kind == "key":
        check_key(flag.what)
        if flag.also:
            check_key(flag.also)
    elif flag.kind == "json":
        assert flag.what in KEYS and KEYS[flag.what].state in ("honoured", "passed"), flag.what
    elif flag.kind == "cli":
        check_command(flag.what)
    elif flag.kind == "api":
        assert flag.what in toolkit.__all__
    own = {other.name for other in READ[name].flags}
    for mentioned in re.findall(DOTTED, f"{flag.note} {flag.what if flag.kind in ('unneeded', 'absent') else ''}"):
        if mentioned not in own and not mentioned.startswith("model.fit"):
            assert mentioned in schema(), f"{mentioned} in the remark on {flag.name} is no key"


@pytest.mark.parametrize("name", READ)
def test_page_shows_its_table(name: str) -> None:
    page = READ[name].page.read_text(encoding="utf-8")
    assert page == with_table(page, READ[name]), "run: python -m tests.site.counterparts"


def test_tables_are_long_enough() -> None:
    assert len(READ["megatron-lm"].flags) >= 120
    assert all(sum(flag.kind == kind for _, flag in FLAGS) for kind in KINDS)


def test_every_training_argument_of_transformers_is_in_the_table() -> None:
    transformers = pytest.importorskip("transformers")
    table: Table = READ["hf-trainer"]
    stated = re.search(r"transformers (\d+\.\d+)", table.flags_of)
    if stated is None or not importlib.metadata.version("transformers").startswith(stated[1] + "."):
        pytest.skip("the table is of another transformers")
    listed = {flag.name for title, group in table.groups.items() if not title.startswith("accelerate") for flag in group}
    assert listed == {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
