# SPDX-License-Identifier: Apache-2.0
"""Chat messages as the model saw them in training: the chat template of its tokenizer.

A template is a program in somebody's checkpoint; it runs in jinja2's sandbox or not at all. It is
not told today's date, so that the same messages give the same ids tomorrow.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from jqx.errors import InputError
from jqx_interop.checkpoints.problems import one_line

TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token")


class Chat:
    """Renders messages with the template found in `directory`, compiled at the first use."""

    def __init__(self, directory: Path | None):
        """`directory` holds the tokenizer; None: there is none."""
        self._directory = directory
        self._template: Any = None  # a jinja2.Template
        self._tokens: dict[str, str] = {}

    @property
    def known(self) -> bool:
        """Whether there is a template."""
        return _find_template(self._directory)[0] is not None

    def render(self, messages: list[Any], where: str, answer: bool = False) -> str:
        """The conversation as text, its special tokens written out; with `answer` the beginning of
        the model's answer too.

        `where` names the conversation in errors. Raises InputError without a template, and
        for one that fails or refuses these messages.
        """
        if self._template is None:
            self._template = self._compile(where)
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=answer, tools=None, **self._tokens
            )
        except Exception as error:  # somebody else's program: it may raise anything
            problem = f"the chat template fails ({type(error).__name__}: {error})."
            raise InputError(one_line(f"{where}: {problem}")) from error

    def _compile(self, where: str) -> Any:
        text, self._tokens = _find_template(self._directory)
        if text is None:
            problem = f'"messages" need a chat template, and {self._directory} has none.'
            raise InputError(one_line(f'{where}: {problem} Give "text" instead.'))
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        sandbox = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        sandbox.filters["tojson"] = _to_json
        sandbox.globals["raise_exception"] = _raise
        try:
            return sandbox.from_string(text)
        except jinja2.TemplateError as error:
            problem = f"the chat template does not parse ({error})."
            raise InputError(one_line(f"{where}: {problem}")) from error


def _find_template(directory: Path | None) -> tuple[str | None, dict[str, str]]:
    """The template's text, if any, and the special tokens it may name."""
    if directory is None:
        return None, {}
    config = _object(directory / "tokenizer_config.json")
    tokens = {key: _token(config[key]) for key in TOKENS if config.get(key)}
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8"), tokens
    template = _object(directory / "chat_template.json").get("chat_template")
    template = template or config.get("chat_template")
    if isinstance(template, list):  # several by name, as some tokenizers have them
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, Mapping)}
        template = named.get("default")
    return template if isinstance(template, str) else None, tokens


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(one_line(f"{path}: is not JSON ({error}).")) from error
    return value if isinstance(value, dict) else {}


def _token(value: object) -> str:
    return str(value.get("content", "")) if isinstance(value, Mapping) else str(value)


def _to_json(value: object, **options: Any) -> str:
    """JSON without the HTML escapes of jinja2's own filter, which models were not trained on."""
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _raise(message: object) -> NoReturn:
    raise ValueError(message)
