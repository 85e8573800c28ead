"""Prompts to ids and ids to text: the model's tokenizer, its chat template, and the tokens that end
an answer. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from toolkit.data.tokenizer import SubwordTokenizer, TextTokenizer, load_tokenizer
from toolkit.errors import DataError, ToolkitError
from toolkit.inference.source import Model

Message = Mapping[str, str]
"""One turn of a conversation: role (system, user, assistant) and content."""


class Text:
    """A model's tokenizer as generating needs it.

    tokenizer: what --tokenizer named, else what came with the model, else what its run was trained
    with. stop: ids that end an answer.
    """

    def __init__(self, model: Model, *, tokenizer: str | None = None) -> None:
        self.files = model.files
        self.tokenizer = load_tokenizer(tokenizer) if tokenizer is not None else _tokenizer(model)
        self.special = model.foreign
        self.vocab = model.section.vocab_size
        self.stop = frozenset(self._stop())

    def encode(self, text: str, *, name: str) -> list[int]:
        """Ids of a prompt; DataError, naming it, where it is empty or has text that the model has
        no token for.
        """
        return self._checked(text, name=name, special=self.special)

    def encode_chat(self, messages: Sequence[Message], *, name: str) -> list[int]:
        """Ids of a conversation in the model's own template, up to where the assistant's answer begins."""
        return self._checked(self.render(messages), name=name, special=False)

    def _checked(self, text: str, *, name: str, special: bool) -> list[int]:
        if not text:
            raise DataError(f"{name} is empty", why="there is nothing to go on from", fix="Write at least one character.")
        try:
            ids = self.tokenizer.encode_prompt(text, special=special)
        except DataError as e:
            raise DataError(f"{name}: {e.what}", why=e.why, fix=e.fix) from None
        if not ids:
            raise DataError(f"{name} has no tokens", why="the tokenizer leaves nothing of its text", fix="Write at least one word.")
        if self.vocab is not None and max(ids) >= self.vocab:
            raise DataError(
                f"{name} has token id {max(ids)}, and the model knows {self.vocab} ids",
                why="the tokenizer is not the one that the model was trained with",
                fix="Name the right one with --tokenizer.",
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of an answer."""
        return self.tokenizer.decode(ids, special=False)

    # -- chat -------------------------------------------------------------------------------------------

    def render(self, messages: Sequence[Message]) -> str:
        """A conversation as text by the model's chat template, which ends where the assistant is to go on."""
        from jinja2.exceptions import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        template = self._template()
        if template is None:
            raise DataError(
                "the model has no chat template",
                why="nothing says how turns of a conversation are written",
                fix="Leave --chat out, and give the whole text as --prompt.",
            )
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            return environment.from_string(template).render(
                messages=[dict(m) for m in messages], add_generation_prompt=True, **self._special_tokens()
            )
        except TemplateError as e:
            raise DataError("the model's chat template does not take this conversation", why=str(e), fix="Leave --chat out.") from None

    def _template(self) -> str | None:
        if "chat_template.jinja" in self.files:
            return self.files["chat_template.jinja"].decode()
        found = self._json("chat_template.json").get("chat_template") or self._json("tokenizer_config.json").get("chat_template")
        if isinstance(found, list):  # several by name
            found = next((t.get("template") for t in found if t.get("name") == "default"), None)
        return found if isinstance(found, str) else None

    def _special_tokens(self) -> dict[str, str]:
        found = self._json("special_tokens_map.json") | self._json("tokenizer_config.json")
        named = {k: v.get("content") if isinstance(v, dict) else v for k, v in found.items() if k.endswith("_token")}
        return {k: v for k, v in named.items() if isinstance(v, str)}

    # -- ends ---------------------------------------------------------------------------------------------

    def _stop(self) -> list[int]:
        """As transformers has it: what the generation settings name, else the config; else the end
        of a document.
        """
        for name in ("generation_config.json", "config.json"):
            found = self._json(name).get("eos_token_id")
            ids = [found] if isinstance(found, int) else found if isinstance(found, list) else []
            if ids:
                return [int(i) for i in ids]
        return [self.tokenizer.eod]

    def _json(self, name: str) -> dict[str, Any]:
        try:
            value = json.loads(self.files[name])
        except (KeyError, ValueError):
            return {}
        return value if isinstance(value, dict) else {}


def _raise(message: str) -> None:
    from jinja2.exceptions import TemplateError

    raise TemplateError(message)


def _tokenizer(model: Model) -> TextTokenizer:
    own = model.files.get("tokenizer.json")
    if own is not None:
        eod = _end(model.files)
        return SubwordTokenizer(str(model.path / "tokenizer.json"), text=own.decode(), eod=eod)
    if model.path.is_dir() and {"tokenizer.model", "vocab.json"} & model.files.keys():
        return load_tokenizer(str(model.path))  # transformers makes a tokenizer.json of it
    if model.tokenizer == "bytes":
        return load_tokenizer("bytes")
    if model.config is not None:
        return _of_training(model)
    raise DataError(f"{model.path} comes without a tokenizer", why="prompts are text", fix="Name one with --tokenizer.")


def _of_training(model: Model) -> TextTokenizer:
    """The tokenizer that a run's data was prepared with, from beside the data, or from where the
    config says.
    """
    from toolkit.config.load import override_config
    from toolkit.data.dataset import resolve_data
    from toolkit.data.manifest import load_manifest, tokenizer_of

    assert model.config is not None
    try:
        prefix = resolve_data(override_config(model.config, []), prepare_missing=False).prefixes[0]
        return tokenizer_of(load_manifest(prefix), prefix)
    except (ToolkitError, OSError) as e:
        spec = model.tokenizer or ""
        if spec and not spec.startswith("train:"):
            return load_tokenizer(spec)
        raise DataError(
            f"the tokenizer {spec or 'of the training data'} is not found",
            why=e.what if isinstance(e, ToolkitError) else str(e),
            fix="Name its tokenizer.json with --tokenizer.",
        ) from None


def _end(files: Mapping[str, bytes]) -> str | None:
    try:
        token = json.loads(files["tokenizer_config.json"]).get("eos_token")
    except (KeyError, ValueError, AttributeError):
        return None
    return token.get("content") if isinstance(token, dict) else token


class TextStream:
    """Text of an answer as its tokens come: whole characters only, since a token may hold a part of one."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.before = self.shown = 0  # ids from `before` on are decoded anew, those up to `shown` are on the screen

    def push(self, token: int) -> str:
        """The text that a token adds; empty while a character is not complete."""
        self.ids.append(token)
        old = self.tokenizer.decode(self.ids[self.before : self.shown], special=False)
        new = self.tokenizer.decode(self.ids[self.before :], special=False)
        if new.endswith("\ufffd") or len(new) <= len(old):
            return ""
        self.before, self.shown = self.shown, len(self.ids)
        return new[len(old) :]

    def rest(self) -> str:
        """What is left at the end, of a character that was never completed."""
        old = self.tokenizer.decode(self.ids[self.before : self.shown], special=False)
        new = self.tokenizer.decode(self.ids[self.before :], special=False)
        return new[len(old) :]


def read_prompts(path: Path) -> list[str]:
    """Prompts of a file: a JSON text or {"prompt": …} a line in .jsonl, else one a line; DataError
    names the line that is wrong.
    """
    try:
        raw = path.read_bytes()
    except OSError as e:
        raise DataError(f"--prompts {path} cannot be read", why=(e.strerror or str(e)).lower(), fix="Name a text file.") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        at = raw[: e.start].count(b"\n") + 1
        raise DataError(
            f"--prompts {path}, line {at}: byte 0x{raw[e.start]:02x} is not UTF-8", why="prompts are text", fix="Save the file as UTF-8."
        ) from None
    prompts = []
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    for number, line in enumerate(lines, 1):
        line = line.removesuffix("\r")
        if path.suffix == ".jsonl":
            try:
                value = json.loads(line)
                line = value["prompt"] if isinstance(value, dict) else value
                if not isinstance(line, str):
                    raise ValueError("the prompt is no text")
            except (ValueError, KeyError) as e:
                raise DataError(
                    f"--prompts {path}, line {number} holds no prompt",
                    why=f"{type(e).__name__}: {e}",
                    fix='Write "text", or {"prompt": "text"}, on each line.',
                ) from None
        if not line:
            raise DataError(f"--prompts {path}, line {number} is empty", why="there is nothing to go on from", fix="Remove the line.")
        prompts.append(line)
    if not prompts:
        raise DataError(f"--prompts {path} holds no prompt", fix="Write one a line.")
    return prompts
