"""Applies third-party templates to examples: sandboxed jinja2, bounded, deterministic.

Three uses: PromptSource's templates, FLAN's patterns (plain placeholders), and the expressions with which a definition
maps a raw row to template fields.
"""

from __future__ import annotations

import collections
import hashlib
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
from jinja2.sandbox import SandboxedEnvironment

SEPARATOR = "|||"  # between prompt and target, and between answer choices
MAXIMUM_CHARACTERS = 1_000_000  # per rendered template
_PROTECTED = "\ue000separator\ue001"  # stands in for a separator in the data during rendering
_PLACEHOLDER = re.compile(r"\{(\w+)\}")


class Rendered(NamedTuple):
    """One prompted example."""

    prompt: str
    targets: tuple[str, ...]
    candidates: tuple[str, ...]


class TemplateError(ValueError):
    """A template failed on an example; the message says how. The caller knows task, template and example."""


class _Environment(SandboxedEnvironment):
    """jinja2's sandbox, also preventing repetition and powers from filling the memory."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and (abs(left) > MAXIMUM_CHARACTERS or abs(right) > 64):
            raise jinja2.TemplateRuntimeError(f"{left} ** {right} is too large for a template")
        if operator == "*":
            for text, times in ((left, right), (right, left)):
                if isinstance(text, (str, list, tuple)) and len(text) * times > MAXIMUM_CHARACTERS:
                    raise jinja2.TemplateRuntimeError(
                        f"a text or list of {len(text)} repeated {times} times is too long"
                    )
        return super().call_binop(context, operator, left, right)


class Renderer:
    """Compiles and renders templates; random filters draw from a generator seeded by the caller's key.

    A field missing from an example is an error, not an empty text.
    """

    def __init__(self) -> None:
        self._key = ""  # of the example being rendered
        self._random: random.Random | None = None
        self._environment = _Environment(undefined=jinja2.StrictUndefined)
        self._environment.globals = {"zip": zip, "range": self._environment.globals["range"], "dict": dict}
        self._environment.globals["namespace"] = jinja2.utils.Namespace
        self._environment.filters |= {
            "choice": self._choice,
            "random": self._choice,  # jinja2's own uses the process's generator
            "most_frequent": _most_frequent,
            "highlight": lambda text: text,  # colours for a terminal, in the original
        }

    def compile(self, source: str) -> jinja2.Template:
        """Raises TemplateError for invalid jinja."""
        try:
            template = self._environment.from_string(source)
        except jinja2.TemplateError as error:
            raise TemplateError(f"is not valid Jinja: {error}") from error
        template.globals = dict(template.globals)  # copied for every example, which is slow for a chain of mappings
        return template

    def _choice(self, values: Any) -> Any:
        if self._random is None:
            digest = hashlib.blake2b(self._key.encode(errors="surrogatepass"), digest_size=8).digest()
            self._random = random.Random(int.from_bytes(digest, "big"))
        return self._random.choice(list(values))

    def render(self, template: jinja2.Template, fields: Mapping[str, Any], key: str) -> str:
        """Render a template. `key` seeds its random choices. Raises TemplateError."""
        self._key, self._random = key, None
        pieces: list[str] = []
        length = 0
        try:
            for piece in template.generate(**fields):
                length += len(piece)
                if length > MAXIMUM_CHARACTERS:
                    raise TemplateError(f"gives more than {MAXIMUM_CHARACTERS} characters")
                pieces.append(piece)
        except TemplateError:
            raise
        except Exception as error:  # a template can raise any Python exception
            raise TemplateError(f"fails: {type(error).__name__}: {error}") from error
        return "".join(pieces)

    def expression(self, source: str) -> Callable[[Mapping[str, Any]], Any]:
        """A function from a raw row to the value of a jinja expression, such as `choices|map(attribute='text')|list`.

        The whole row is also available as `row`, for names that are not identifiers. Raises TemplateError when
        compiling an invalid expression, and when called for a row on which it fails.
        """
        try:
            compiled = self._environment.compile_expression(source, undefined_to_none=False)
        except jinja2.TemplateError as error:
            raise TemplateError(f"{source!r} is not an expression: {error}") from error

        def evaluate(row: Mapping[str, Any]) -> Any:
            try:
                value = compiled(**{key: item for key, item in row.items() if key != "row"}, row=row)
                if isinstance(value, jinja2.Undefined):
                    str(value)  # raises with the missing name
            except Exception as error:
                raise TemplateError(f"{source!r} fails: {type(error).__name__}: {error}") from error
            return value

        return evaluate


class PromptSourceTemplate:
    """One template of PromptSource: jinja for prompt and target, and jinja for the answer choices or None."""

    def __init__(self, renderer: Renderer, name: str, jinja: str, answer_choices: str | None) -> None:
        self.name = name
        self._renderer = renderer
        self._template = renderer.compile(jinja)
        self._choices = None if answer_choices is None else renderer.compile(answer_choices)
        self._fixed_choices = answer_choices if answer_choices is not None and "{" not in answer_choices else None

    def apply(self, protected: Mapping[str, Any], key: str) -> Rendered | None:
        """Prompt, targets and candidates of one example, or None if the template does not apply to it.

        `protected` are the example's fields after `protect`. Raises TemplateError.
        """
        candidates: tuple[str, ...] = ()
        if self._choices is not None:
            text = self._fixed_choices or self._renderer.render(self._choices, protected, key)
            candidates = tuple(part.strip() for part in text.split(SEPARATOR))
            protected = {**protected, "answer_choices": list(candidates)}
        text = self._renderer.render(self._template, protected, key)
        # split after rendering: in some templates each branch of an `if` has its own separator
        parts = [part.strip() for part in text.split(SEPARATOR)]
        if (len(parts) == 1 and not parts[0]) or (len(parts) > 1 and not (parts[0] and all(parts[1:]))):
            return None
        if len(parts) == 1:
            raise TemplateError(f"gives no {SEPARATOR} between prompt and target")
        prompt, *targets = map(_restore, parts)
        return Rendered(prompt, tuple(targets), _fitting([_restore(item) for item in candidates], targets))


class FlanPattern:
    """One (input, target) pair of FLAN's PATTERNS, with {placeholders}."""

    def __init__(self, name: str, source: str, target: str) -> None:
        self.name = name
        # nine published templates lost the backslash of "\n" after a placeholder
        self._source = source.replace("}n\n", "}\n")
        self._target = target

    def apply(self, fields: Mapping[str, Any]) -> Rendered:
        """Fill in the fields; `options`, a list, becomes {options_} and the candidates. Raises TemplateError."""
        options = [str(option) for option in fields.get("options") or ()]
        listed = "OPTIONS:\n" + "\n".join(f"- {option}" for option in options)
        known = {**fields, "options_": listed, "options_str": listed} if options else fields
        target = _fill(self._target, known)
        return Rendered(_fill(self._source, known), (target,), _fitting(options, [target]))


def uninverted(patterns: Sequence[tuple[str, str]], keep: str | None = None) -> list[int]:
    """Indices of the patterns in a group that ask for the original task: those with the majority's target.

    FLAN does not mark its inverted patterns; `keep` names the target if both directions are equally many, as in
    translation. Raises ValueError for a tie without `keep`, and for a `keep` that no pattern has.
    """
    counts = collections.Counter(target for _, target in patterns)
    (target, most), *others = counts.most_common()
    if keep is not None:
        if keep not in counts:
            raise ValueError(f"no pattern has the target keep ({keep!r}); there are: {', '.join(map(repr, counts))}")
        target = keep
    elif others and others[0][1] == most:
        raise ValueError(f"as many patterns have the target {target!r} as {others[0][0]!r}: say which to `keep`")
    return [index for index, (_, each) in enumerate(patterns) if each == target]


def _fill(pattern: str, fields: Mapping[str, Any]) -> str:
    """A single pass, so that braces in the data are left alone."""

    def value(match: re.Match[str]) -> str:
        if match[1] not in fields:
            raise TemplateError(f"needs the field {match[1]!r}; there are: {', '.join(fields)}")
        return str(fields[match[1]])

    return _PLACEHOLDER.sub(value, pattern)


def _fitting(candidates: Sequence[str], targets: Sequence[str]) -> tuple[str, ...]:
    """The candidates if the answer is one of them; a template may list choices but ask for something else."""
    return tuple(candidates) if targets[0] in candidates else ()


def protect(value: Any) -> Any:
    """The same value with all separators in its texts replaced."""
    if isinstance(value, str):
        return value.replace(SEPARATOR, _PROTECTED)
    if isinstance(value, Mapping):
        return {key: protect(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [protect(item) for item in value]
    return value


def _restore(text: str) -> str:
    return text.replace(_PROTECTED, SEPARATOR)


def _most_frequent(values: Sequence[Any]) -> list[Any]:
    """All values tied for most frequent, in order of first occurrence."""
    counts = collections.Counter(values)
    return [value for value, count in counts.items() if count == max(counts.values())]
