"""Between documents and models: parsing, writing, and the messages for what Go's decoder would refuse."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails, PydanticSerializationError

from libcontainerd.errors import InvalidParameterError
from libcontainerd.oci._base import Model, UnknownMembers, folded, is_text, join, path_of
from libcontainerd.oci._json import UnreadableError, loads, plain
from libcontainerd.oci._model import PLATFORMS, Spec, State
from libcontainerd.oci._model_features import Features
from libcontainerd.oci._model_process import Process
from libcontainerd.oci._model_resources import LinuxResources

_M = TypeVar("_M", bound=Model)

# A document with a wrong type in every element of a long list should not give a message of a page.
_SHOWN_PROBLEMS = 5
_SHOWN_STEPS = 16


def parse_spec(document: Spec | Mapping[str, object] | str | bytes) -> Spec:
    """Read a spec as Go's decoder would, but strictly.

    Args:
        document: JSON text, a mapping with the specification's own member names, or a `Spec` (which is
            checked again, because its lists may have been changed since). The result shares nothing with it.

    Returns:
        A new `Spec`. `dump` gives back a document equal to what was read.

    Raises:
        InvalidParameterError: naming the path and what was found there, for everything that Go's
            `encoding/json` refuses for the types of runtime-spec 1.3.0, and beyond that: a member that occurs
            twice, a member whose name differs from a known one in case alone (Go would take it for that one,
            most readers would not), NaN and infinities, text that is not Unicode, more than 100 levels of
            nesting, a document that is not an object.
    """
    return parse(document, Spec, "spec")


def parse_process(document: Process | Mapping[str, object] | str | bytes) -> Process:
    """Read a process, such as an exec's. As `parse_spec`, with paths that begin at the process."""
    return parse(document, Process, "process")


def checked_spec(document: Spec | Mapping[str, object] | str | bytes) -> Spec:
    """Read a spec as `parse_spec`, for whoever will not change what comes back.

    A `Spec` that says what an accepted one said is not checked and copied again, but given back itself: the document is
    written once more, which takes a fifth of the time and cannot miss a change. Most programs use one spec again and again.
    """
    return _checked(document, Spec, "spec")


def checked_process(document: Process | Mapping[str, object] | str | bytes) -> Process:
    """Read a process as `parse_process`, as `checked_spec` reads a spec."""
    return _checked(document, Process, "process")


def _checked(document: object, model: type[_M], what: str) -> _M:
    if not isinstance(document, model):
        return parse(document, model, what)
    try:
        accepted = (what, dump(document))
    except InvalidParameterError:
        return parse(document, model, what)  # which says more exactly what is wrong
    if accepted in _accepted:
        return document
    parsed = parse(document, model, what)
    _accepted.append(accepted)
    return parsed


_accepted: deque[tuple[str, bytes]] = deque(maxlen=16)
"""The last documents of models that were accepted."""


def parse_resources(document: LinuxResources | Mapping[str, object] | str | bytes) -> LinuxResources:
    """Read resource limits. As `parse_spec`, with paths that begin at the resources."""
    return parse(document, LinuxResources, "resources")


def parse_state(document: State | Mapping[str, object] | str | bytes) -> State:
    """Read what a runtime's `state` prints, or gives a hook on its standard input. As `parse_spec`."""
    return parse(document, State, "state")


def parse_features(document: Features | Mapping[str, object] | str | bytes) -> Features:
    """Read what a runtime's `features` prints. As `parse_spec`."""
    return parse(document, Features, "features")


def dump(document: Model) -> bytes:
    """Write a model as JSON, in UTF-8: what was never set is left out, what was set to `None` is null.

    Raises:
        InvalidParameterError: if something of another type has been put into one of the model's lists or maps
            since it was made. Widths are not checked again; `parse_spec` does.
    """
    try:
        return document.model_dump_json(by_alias=True, exclude_unset=True, warnings="error").encode()
    except (PydanticSerializationError, ValueError) as error:
        raise InvalidParameterError(f"this {type(document).__name__} cannot be written: {error}") from error


def to_mapping(document: Model) -> dict[str, object]:
    """Give a model as a new plain `dict` with the specification's own member names.

    As `dump`, but not as text. What has been put into the model since it was made is not checked.

    Raises:
        InvalidParameterError: if text in it is not Unicode, or it has been made to contain itself.
    """
    return _mapping(document, type(document).__name__)


def _mapping(document: Model, what: str) -> dict[str, object]:
    try:
        members = document.model_dump(by_alias=True, exclude_unset=True, warnings=False)
    except ValueError as error:
        raise InvalidParameterError(f"invalid {what}: {error}") from error
    # Pydantic hands out unknown members as they are, not as copies.
    copied = _plain(members, what)
    return copied if isinstance(copied, dict) else members


def parse(document: object, model: type[_M], what: str) -> _M:
    """Read a document, in whatever form it comes, as `model`.

    Raises:
        InvalidParameterError: as `parse_spec`; `what` is in the message.
    """
    if isinstance(document, str | bytes):
        value = loads(document, what)
        if _may_hold_surrogates(document):
            value = _plain(value, what)
    elif isinstance(document, model):
        value = _mapping(document, what)
    elif isinstance(document, Mapping):
        value = _plain(document, what)
    else:
        raise InvalidParameterError(
            f"invalid {what}: must be a mapping, JSON text or oci.{model.__name__},"
            f" not {type(document).__name__}"
        )
    return validated(value, model, what)


def _may_hold_surrogates(document: str | bytes) -> bool:
    if isinstance(document, bytes):
        # UTF-8 has none: only an escape can bring one in.
        return b"\\u" in document
    return "\\u" in document or not is_text(document)


def _plain(document: object, what: str) -> object:
    try:
        return plain(document)
    except UnreadableError as error:
        # A cycle's path would fill the screen; its beginning says where it is.
        path = path_of(list(reversed(error.steps))[:_SHOWN_STEPS]) or "the document"
        raise InvalidParameterError(f"invalid {what}: {path} {error.problem}") from None


def validated(value: object, model: type[_M], what: str) -> _M:
    """Check a plain value as `model`.

    Raises:
        InvalidParameterError: as `parse_spec`; `what` begins the message.
    """
    unknown = UnknownMembers()
    try:
        parsed = model.model_validate(value, by_alias=True, by_name=False, context=unknown)
    except ValidationError as error:
        raise InvalidParameterError(f"invalid {what}: {problems(error)}") from error
    if isinstance(parsed, Spec) and not parsed.model_fields_set.isdisjoint(PLATFORMS):
        _check_platforms(parsed, what)
    if unknown.found:
        _settle(parsed, value, "", what)
    return parsed


def _check_platforms(spec: Spec, what: str) -> None:
    # Some forty models that Linux never needs: building them would cost every start of a program.
    from libcontainerd.oci._platforms import SECTIONS  # noqa: PLC0415

    for name, model in SECTIONS.items():
        section: object = getattr(spec, name)
        if section is None:
            continue
        unknown = UnknownMembers()
        try:
            parsed = model.model_validate(section, by_alias=True, by_name=False, context=unknown)
        except ValidationError as error:
            raise InvalidParameterError(f"invalid {what}: {problems(error, name)}") from error
        if unknown.found:
            _settle(parsed, section, name, what)


def _settle(model: Model, source: object, path: str, what: str) -> None:
    """Look after the unknown members of a model and of all below it; `source` is what it was made from.

    Raises:
        InvalidParameterError: for one that Go's decoder, which ignores case, would take for a known one.
    """
    if not isinstance(source, dict):
        return
    fields = type(model).model_fields
    if model.model_extra:
        known = {folded(field.alias or name): field.alias or name for name, field in fields.items()}
        for name in model.model_extra:
            if folded(name) in known:
                raise InvalidParameterError(
                    f"invalid {what}: {join(path, name)}: the member's name is {known[folded(name)]!r},"
                    " and Go would take this for it"
                )
            # Pydantic keeps one set of names for both: a member that has the Python name of a known one by
            # chance would make that one look set.
            if name in fields and fields[name].alias not in source:
                model.model_fields_set.discard(name)
    for name, field in fields.items():
        alias = field.alias or name
        for step, item, origin in _pairs(getattr(model, name), source.get(alias)):
            if isinstance(item, Model):
                _settle(item, origin, path_of(step, join(path, alias)), what)


def _pairs(value: object, source: object) -> Iterator[tuple[tuple[int | str, ...], object, object]]:
    """Yield what may be a model in a member's value: the steps to it, itself, and what it was made from."""
    if isinstance(value, list) and isinstance(source, list):
        yield from (((index,), item, source[index]) for index, item in enumerate(value))
    elif isinstance(value, dict) and isinstance(source, dict):
        yield from (((key,), item, source[key]) for key, item in value.items())
    else:
        yield (), value, source


def problems(error: ValidationError, section: str = "") -> str:
    """Say what pydantic found, as paths (under `section`) and what Go's decoder would miss there."""
    found = error.errors(include_url=False)
    shown = [f"{_path(item, section)} {_problem(item)}" for item in found[:_SHOWN_PROBLEMS]]
    if len(found) > _SHOWN_PROBLEMS:
        shown.append(f"and {len(found) - _SHOWN_PROBLEMS} more")
    return "; ".join(shown)


def _path(error: ErrorDetails, section: str) -> str:
    # pydantic marks an error in a map's key, rather than its value, by this step; Go has no such errors,
    # Python has.
    path = path_of((step for step in error["loc"] if step != "[key]"), section)
    inner = str(error["ctx"]["inner"]) if error["type"] == "json_value" else ""
    if inner:
        path += inner if inner.startswith("[") else f".{inner}"
    return path or "the document"


_WANTED = {
    "model_type": "an object",
    "dict_type": "an object",
    "list_type": "an array",
    "string_type": "a string",
    "bool_type": "true or false",
    "int_type": "an integer",
}


def _problem(error: ErrorDetails) -> str:
    kind, value = error["type"], error["input"]
    if kind in _WANTED:
        return f"must be {_WANTED[kind]}, not {_shown(value)}"
    if kind in ("greater_than_equal", "less_than_equal"):
        bound = error["ctx"]["ge" if kind == "greater_than_equal" else "le"]
        return (
            f"must be at {'least' if kind == 'greater_than_equal' else 'most'} {bound}, not {_shown(value)}"
        )
    if kind == "string_unicode":
        return "must be Unicode text, and holds a lone surrogate"
    message = error["msg"]
    return message[:1].lower() + message[1:]


def _shown(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"the number {str(value)[:40]}"
    if isinstance(value, str):
        return f"the string {value[:40]!r}"
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list):
        return "an array"
    return type(value).__name__
