"""Prompts in, text out: files, chat templates, characters that come in pieces, and what cannot be a
prompt.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from toolkit.config.schema import ModelSection
from toolkit.data.tokenizer import BytesTokenizer, load_tokenizer
from toolkit.errors import ConfigError, DataError
from toolkit.inference.request import Sampling
from toolkit.inference.source import Model
from toolkit.inference.text import Text, TextStream, read_prompts

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ bos_token if loop.first else '' }}<{{ m['role'] }}>{{ m['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def word_tokenizer(**model: Any) -> str:
    """A tokenizer.json of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[UNK]", "<s>", "</s>", "the", "cat", "sat"]
    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, **model))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    tok.add_special_tokens(["[UNK]"])
    return str(tok.to_str())


def model_of(tmp_path: Path, files: dict[str, bytes], *, vocab: int = 6) -> Model:
    section = ModelSection.model_validate({"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "vocab_size": vocab})
    return Model(tmp_path, section, "fp32", True, files, None, weights=lambda _: None)


def text_of(tmp_path: Path, *, vocab: int = 6, **files: Any) -> Text:
    named = {k.replace("__", "."): v.encode() if isinstance(v, str) else json.dumps(v).encode() for k, v in files.items()}
    return Text(model_of(tmp_path, {"tokenizer.json": word_tokenizer(unk_token="[UNK]").encode(), **named}, vocab=vocab))


def refused(call: Any, *words: str, kind: type[Exception] = DataError) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_text_without_a_token_is_named(tmp_path: Path) -> None:
    text = text_of(tmp_path)
    assert text.encode("the cat sat", name="the prompt") == [3, 4, 5]
    refused(lambda: text.encode("the dog sat", name="prompt 2"), "prompt 2", "'dog'", "character 5")
    refused(lambda: text.encode("", name="the prompt"), "the prompt is empty")
    assert text.encode("[UNK]", name="the prompt") == [0]  # written by name, it is a token like any other


def test_ids_beyond_the_model_are_refused(tmp_path: Path) -> None:
    refused(lambda: text_of(tmp_path, vocab=5).encode("the sat", name="the prompt"), "token id 5", "5 ids", "--tokenizer")


def test_stop_tokens_are_those_that_transformers_takes(tmp_path: Path) -> None:
    assert text_of(tmp_path, generation_config__json={"eos_token_id": [2, 4]}, config__json={"eos_token_id": 3}).stop == {2, 4}
    assert text_of(tmp_path, config__json={"eos_token_id": 3}).stop == {3}
    assert text_of(tmp_path, tokenizer_config__json={"eos_token": "sat"}).stop == {5}


def test_chat_template_renders_as_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    settings = {"chat_template": TEMPLATE, "bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer.json").write_text(word_tokenizer(unk_token="[UNK]"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = text_of(tmp_path, tokenizer_config__json=settings)
    talk = [{"role": "user", "content": " the cat "}, {"role": "assistant", "content": "sat"}, {"role": "user", "content": "the"}]
    assert text.render(talk) == theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    refused(lambda: text.render([{"role": "tool", "content": "x"}]), "no tools")
    refused(lambda: text_of(tmp_path).render(talk), "no chat template", "--chat")


@pytest.mark.parametrize("answer", ["plain", "π ≈ 3,14 – naïve 猫🐈‍⬛!", "half \ud83d".encode("utf-8", "surrogatepass").decode("latin-1")])
def test_stream_shows_whole_characters(answer: str) -> None:
    tokenizer = BytesTokenizer()
    stream = TextStream(tokenizer)
    pieces = [stream.push(b) for b in answer.encode()]
    assert "".join([*pieces, stream.rest()]) == answer and all("\ufffd" not in p for p in pieces)


def test_stream_shows_what_was_never_completed() -> None:
    stream = TextStream(BytesTokenizer())
    assert stream.push(ord("a")) == "a" and stream.push("é".encode()[0]) == "" and stream.rest() == "\ufffd"


def test_prompt_files(tmp_path: Path) -> None:
    plain, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    plain.write_bytes("eins\r\nzwei π\n".encode())
    assert read_prompts(plain) == ["eins", "zwei π"]
    lines.write_text('"one\\ntwo"\n{"prompt": "three"}\n')
    assert read_prompts(lines) == ["one\ntwo", "three"]
    plain.write_bytes(b"good\nbad \xff\n")
    refused(lambda: read_prompts(plain), "line 2", "0xff", "UTF-8")
    plain.write_bytes(b"good\n\nmore")
    refused(lambda: read_prompts(plain), "line 2 is empty")
    plain.write_bytes(b"")
    refused(lambda: read_prompts(plain), "no prompt")
    lines.write_text('{"text": "three"}\n')
    refused(lambda: read_prompts(lines), "line 1", "KeyError")
    refused(lambda: read_prompts(tmp_path / "none"), "no such file")


def test_options_that_contradict_each_other() -> None:
    none: dict[str, Any] = {"greedy": False, "temperature": None, "top_k": None, "top_p": None, "seed": None}
    assert Sampling.of(**none).greedy and Sampling.of(**none | {"greedy": True}).greedy
    assert Sampling.of(**none | {"top_k": 3}) == Sampling(temperature=1.0, top_k=3)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"greedy": True, "top_k": 2}, "--greedy beside --top-k"),
        ({"seed": 3}, "--seed alone"),
        ({"temperature": 0.0}, "--temperature 0"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"top_k": 0}, "--top-k 0"),
        ({"top_p": 1.5}, "--top-p 1.5"),
        ({"seed": -1, "temperature": 1.0}, "--seed -1"),
    ]
    for given, words in wrong:
        refused(lambda given=given: Sampling.of(**none | given), words, kind=ConfigError)


def test_bytes_need_no_file() -> None:
    assert load_tokenizer("bytes").encode_prompt("é", special=True) == [0xC3, 0xA9]
