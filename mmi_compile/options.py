"""Options of the backend: flat, validated, each with an environment mirror ``MMI_<NAME>``.

A field declares everything about its option once: type, accepted values, how text from the environment is read, and
what it means. Errors, the environment and the table in the documentation all come from there.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from mmi_compile._suggest import did_you_mean, nearest
from mmi_compile.head_config import HeadConfig, HeadConfigError

__all__ = ["NON_OPTIONS", "OptionError", "OptionWarning", "Options", "options_table"]

ENV_PREFIX = "MMI_"

NON_OPTIONS: Mapping[str, str] = {
    "MMI_ACCEPT": "tests rewrite their golden files",
    "MMI_CACHE_DIR": "folder for generated kernels",
}
"""Environment variables that start like an option's mirror and are none."""


_FINDS = "find_attention"
"""The pass without which no attention is known, so that none could be missed."""


class OptionError(ValueError):
    """An option or its environment mirror is unknown or has a value that is not accepted."""


class OptionWarning(UserWarning):
    """An environment variable looks like an option's mirror, but no option has that name."""


@dataclass(frozen=True)
class _Kind:
    """One type of option.

    ``check`` returns the value in its normal form; it and ``parse`` (for text from the environment) raise ValueError,
    whose message, where there is one, is appended to the error.
    """

    type_name: str
    accepts: str
    check: Callable[[Any], Any]
    parse: Callable[[str], Any]


def _quoted(words: Sequence[str]) -> str:
    names = [f'"{word}"' for word in words]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _choice(*words: str) -> _Kind:
    def check(value: Any) -> str:
        if isinstance(value, str) and value in words:
            return value
        best = nearest(value, words) if isinstance(value, str) else None
        raise ValueError(f'; did you mean "{best}"?' if best else "")

    return _Kind("str", _quoted(words), check, str.strip)


def _number(kind: type[int] | type[float], accepts: str, inside: Callable[[Any], bool]) -> _Kind:
    abstract: Any = Integral if kind is int else Real

    def check(value: Any) -> int | float:
        # bool is an Integral, and True for a count is a slip.
        if isinstance(value, bool) or not isinstance(value, abstract) or not inside(value):
            raise ValueError
        number: int | float = kind(value)
        return number

    return _Kind(kind.__name__, accepts, check, kind)


def _or_none(kind: _Kind, otherwise: str) -> _Kind:
    """``kind`` or None, which means ``otherwise``; text from the environment is always a value."""

    def check(value: Any) -> Any:
        return None if value is None else kind.check(value)

    return _Kind(f"{kind.type_name} | None", f"{kind.accepts} or None ({otherwise})", check, kind.parse)


_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def _flag() -> _Kind:
    def check(value: Any) -> bool:
        if not isinstance(value, bool):
            raise ValueError
        return value

    def parse(text: str) -> bool:
        word = text.strip().lower()
        if word not in _TRUE + _FALSE:
            raise ValueError
        return word in _TRUE

    return _Kind("bool", "True or False (in the environment 1/0, true/false, yes/no, on/off)", check, parse)


def _inner() -> _Kind:
    named = _choice("inductor", "aot_eager", "eager")

    def check(value: Any) -> Any:
        return value if callable(value) else named.check(value)

    accepts = f"{named.accepts.replace(' or ', ', ')} or a backend function"
    return _Kind("str | callable", accepts, check, named.parse)


def _folder() -> _Kind:
    def check(value: Any) -> Path | None:
        if value is None:
            return None
        if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
            raise ValueError
        return Path(value)

    return _Kind("path | None", "a path or None", check, Path)


def _dictionary() -> _Kind:
    def check(value: Any) -> dict[str, Any] | None:
        if value is None:
            return None
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise ValueError
        try:
            json.dumps(dict(value), default=repr)
        except (TypeError, RecursionError) as error:
            raise ValueError(f": {error}") from None
        return dict(value)

    return _Kind("dict | None", "a dict with string keys or None (in the environment a JSON object)", check, json.loads)


def _names() -> _Kind:
    def check(value: Any) -> tuple[str, ...]:
        # A bare string is a sequence too: "rewrite" would become seven one-letter names.
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ValueError
        if not all(isinstance(name, str) and name for name in value):
            raise ValueError
        return tuple(value)

    def parse(text: str) -> tuple[str, ...]:
        return tuple(name.strip() for name in text.split(",") if name.strip())

    accepts = "a sequence of names (in the environment a comma-separated list)"
    return _Kind("tuple of str", accepts, check, parse)


def _boundaries() -> _Kind:
    known = ("none", "q", "2d")
    names = _names()

    def check(value: Any) -> tuple[str, ...]:
        given: tuple[str, ...] = names.check(value)
        for name in given:
            if name not in known:
                raise ValueError(f"; {name!r} is no boundary")
        if "none" not in given:
            raise ValueError('; heads fall back to "none"')
        return tuple(name for name in known if name in given)

    accepts = 'a sequence of "none" and any of "q" and "2d" (in the environment a comma-separated list)'
    return _Kind("tuple of str", accepts, check, names.parse)


def _name() -> _Kind:
    def check(value: Any) -> str | None:
        if value is not None and not (isinstance(value, str) and value):
            raise ValueError
        return value

    return _Kind("str | None", "a name or None", check, str.strip)


def _head_config() -> _Kind:
    def check(value: Any) -> HeadConfig | None:
        if value is None or isinstance(value, HeadConfig):
            return value
        if not isinstance(value, (str, os.PathLike, Mapping)) or value in ("", {}):
            raise ValueError
        try:
            return HeadConfig.load(value)
        except HeadConfigError as error:
            raise ValueError(f": {error}") from None

    accepts = "the path of a head config, what is in it, a HeadConfig or None (in the environment a path)"
    return _Kind("path | dict | HeadConfig | None", accepts, check, str)


def _about(kind: _Kind, meaning: str, *, shapes_code: bool = True) -> dict[str, Any]:
    return {"kind": kind, "meaning": meaning, "shapes_code": shapes_code}


_SHARE = "a number in (0, 1]"


@dataclass(frozen=True)
class Options:
    """Settings of one compilation; every value is checked on construction.

    Raises:
        OptionError: a value is of the wrong type or out of range; the message says what is accepted.
    """

    policy: str = field(
        default="adaptive",
        metadata=_about(
            _choice("adaptive", "config", "exact"),
            "`adaptive` chooses a sparse pattern per head at run time; `config` runs the patterns of `head_config`; "
            "`exact` keeps the model's mathematics.",
        ),
    )
    head_config: HeadConfig | None = field(
        default=None,
        metadata=_about(_head_config(), 'Pattern of every head, for `policy="config"`; read and checked at once.'),
    )
    recall: float = field(
        default=0.95,
        metadata=_about(
            _number(float, _SHARE, lambda x: 0 < x <= 1),
            "Share of the attention's probability mass that a sparse head must keep; a head that cannot stays dense.",
        ),
    )
    min_tokens: int | None = field(
        default=None,
        metadata=_about(
            _or_none(
                _number(int, "an integer >= 0", lambda x: x >= 0), "6144 on a CPU; by the amount of work on a GPU"
            ),
            "Prompts with fewer tokens are computed densely.",
        ),
    )
    max_density: float = field(
        default=0.5,
        metadata=_about(
            _number(float, _SHARE, lambda x: 0 < x <= 1),
            "A head whose plan computes more than this share of the dense pairs is computed densely.",
        ),
    )
    boundaries: tuple[str, ...] = field(
        default=("none",),
        metadata=_about(
            _boundaries(),
            "What `adaptive` may choose for a head: `none`, one pattern for the whole matrix; `q`, one for the rows "
            "of each modality; `2d`, one for each pair of modalities. Text is told apart from everything else. `q` and "
            "`2d` take a longer probe.",
        ),
    )
    dense_tail: bool = field(
        default=True,
        metadata=_about(
            _flag(),
            "The last 64 rows of a prompt keep every key in every head, under `adaptive` and `config`: they carry the "
            "answer and cost next to nothing.",
        ),
    )
    verify: float = field(
        default=0.0,
        metadata=_about(
            _number(float, "a number in [0, 1]", lambda x: 0 <= x <= 1),
            "Share of the sparse calls that are compared with exact attention on some rows of the prompt; the report "
            "then holds error and recall of every head.",
        ),
    )
    min_recall: float | None = field(
        default=None,
        metadata=_about(
            _or_none(_number(float, _SHARE, lambda x: 0 < x <= 1), "nothing is checked"),
            "Sparse heads that keep a smaller share of the probability on some rows of the prompt run densely.",
        ),
    )
    guard_rows: int = field(
        default=64,
        metadata=_about(
            _number(int, "an integer >= 1", lambda x: x >= 1),
            "Rows that `verify` and `min_recall` look at, spread over the whole prompt.",
        ),
    )
    inner: str | Callable[..., Any] = field(
        default="inductor",
        metadata=_about(_inner(), "Backend that compiles the rewritten graph."),
    )
    strict: bool = field(
        default=False,
        metadata=_about(
            _flag(),
            "Raise where a pass failed, a causal attention is left alone or a head config does not fit, instead of "
            "running without.",
            shapes_code=False,
        ),
    )
    dump: Path | None = field(
        default=None,
        metadata=_about(
            _folder(), "Folder that receives the graph after every pass, as Python files that run.", shapes_code=False
        ),
    )
    inductor: Mapping[str, Any] | None = field(
        default=None,
        hash=False,  # a dict has no hash; equality still compares it
        metadata=_about(_dictionary(), "Options handed to Inductor as they are."),
    )
    skip_passes: tuple[str, ...] = field(
        default=(),
        metadata=_about(_names(), "Passes left out, by name; for finding faults."),
    )
    passes_until: str | None = field(
        default=None,
        metadata=_about(_name(), "The last pass that runs, by name; later ones are left out. For finding faults."),
    )

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            try:
                normal = _kind(item).check(value)
            except ValueError as error:
                accepts = _kind(item).accepts
                raise OptionError(f'option "{item.name}" must be {accepts}, got {_brief(value)}{error}') from None
            object.__setattr__(self, item.name, normal)
        if self.policy == "config" and self.head_config is None:
            raise OptionError('policy "config" needs the option "head_config"; give the path of a head config')
        if self.policy != "config" and self.head_config is not None:
            raise OptionError(
                f'option "head_config" is for policy "config", and the policy is "{self.policy}"; change one of them'
            )
        if self.passes_until in self.skip_passes:
            raise OptionError(
                f'option "passes_until" ends with the pass "{self.passes_until}", which "skip_passes" leaves out; '
                "name another pass, or do not skip it"
            )

    @classmethod
    def from_mapping(
        cls, mapping: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None
    ) -> Options:
        """Options from what the user passed, then from the environment, then from the defaults.

        Args:
            mapping: option names to values, as in ``torch.compile(..., options=mapping)``.
            environ: the environment, ``os.environ`` when None. An empty variable counts as unset, and one whose
                option is in ``mapping`` is not read.

        Raises:
            OptionError: a name is unknown (the nearest known one is suggested), or a value is not accepted.

        Warns:
            OptionWarning: once per process for each unknown ``MMI_`` variable.
        """
        explicit = dict(mapping or {})
        known = [item.name for item in fields(cls)]
        for name in explicit:
            if name not in known:
                raise OptionError(f'unknown option "{name}"{did_you_mean(str(name), known)}')
        environment = os.environ if environ is None else environ
        _warn_unknown(environment)
        mirrored = {
            item.name: _from_environment(item, environment[env_name(item.name)])
            for item in fields(cls)
            if item.name not in explicit and environment.get(env_name(item.name))
        }
        return cls(**mirrored, **explicit)

    def check_passes(self, known: Sequence[str]) -> None:
        """Check ``skip_passes`` and ``passes_until`` against ``known``, the pipeline's names in order.

        Raises:
            OptionError: a pass is unknown, or ``strict`` is asked for without the pass that finds what it is about.
        """
        until = () if self.passes_until is None else (self.passes_until,)
        for option, names in (("skip_passes", self.skip_passes), ("passes_until", until)):
            for name in names:
                if name not in known:
                    raise OptionError(f'option "{option}" names an unknown pass "{name}"{did_you_mean(name, known)}')
        if self.strict and _FINDS in known and not self.runs_pass(_FINDS, known):
            raise OptionError(
                f'option "strict" needs the pass "{_FINDS}", and skip_passes or passes_until leaves it out'
            )

    def runs_pass(self, name: str, pipeline: Sequence[str]) -> bool:
        """Whether the pass called ``name`` runs, of a pipeline of these names."""
        if name in self.skip_passes:
            return False
        return self.passes_until is None or pipeline.index(name) <= pipeline.index(self.passes_until)

    def to_json(self) -> dict[str, Any]:
        """All options as JSON values; a backend function becomes its qualified name, other objects their repr."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        plain: dict[str, Any] = json.loads(json.dumps(values, default=_plain))
        return plain

    def digest(self) -> str:
        """Sixteen hex digits, equal for options that compile the same code (``strict`` and ``dump`` are left out).
        Of a head config its content counts, wherever it came from.

        A backend function is known by its qualified name only: two closures of one function share a digest.
        """
        values = self.to_json()
        shaping = {item.name: values[item.name] for item in fields(self) if item.metadata["shapes_code"]}
        return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()[:16]


def env_name(option: str) -> str:
    """The environment variable that mirrors ``option``."""
    return ENV_PREFIX + option.upper()


def options_table() -> str:
    """The options as a Markdown table: name, type, default, environment variable, meaning."""
    head = ["| option | type | default | environment | meaning |", "| --- | --- | --- | --- | --- |"]
    return "\n".join(head + [_row(item) for item in fields(Options)]) + "\n"


def _row(item: Field[Any]) -> str:
    kind, default = _kind(item), json.dumps(item.default)
    if item.default is None or isinstance(item.default, (bool, tuple)):
        default = repr(item.default)
    cells = (
        f"`{item.name}`",
        kind.type_name.replace("|", "or"),
        f"`{default}`",
        f"`{env_name(item.name)}`",
        f"{item.metadata['meaning']} Accepts {kind.accepts}.",
    )
    return f"| {' | '.join(cells)} |"


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:197] + "..."


def _kind(item: Field[Any]) -> _Kind:
    kind: _Kind = item.metadata["kind"]
    return kind


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, HeadConfig):
        return value.to_json()
    if callable(value):
        return f"{getattr(value, '__module__', '?')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    return repr(value)


def _from_environment(item: Field[Any], text: str) -> Any:
    kind, variable = _kind(item), env_name(item.name)
    try:
        return kind.check(kind.parse(text))
    except ValueError as error:
        # A number parser's own message repeats what the accepted range says better.
        detail = str(error) if str(error).startswith((":", ";")) else ""
        message = f"environment variable {variable} must be {kind.accepts}, got {text!r}{detail}"
        raise OptionError(message) from None


_warned: set[str] = set()


def _warn_unknown(environ: Mapping[str, str]) -> None:
    known = {env_name(item.name) for item in fields(Options)} | set(NON_OPTIONS)
    for variable in sorted(environ):
        if variable.startswith(ENV_PREFIX) and variable not in known and variable not in _warned:
            _warned.add(variable)
            message = f"environment variable {variable} is no option of mmi_compile{did_you_mean(variable, known)}"
            warnings.warn(message, OptionWarning, stacklevel=4)
