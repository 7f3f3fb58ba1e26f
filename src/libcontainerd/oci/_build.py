"""Putting a spec together: functions from spec to spec, and what they share."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Mapping
from typing import TypeAlias

from pydantic import ValidationError

from libcontainerd.errors import InvalidParameterError
from libcontainerd.oci._base import Model
from libcontainerd.oci._document import parse_spec, problems
from libcontainerd.oci._model import Spec
from libcontainerd.oci._model_linux import Linux
from libcontainerd.oci._model_process import Process
from libcontainerd.oci._model_resources import LinuxResources

SpecOption: TypeAlias = Callable[[Spec], Spec]


class Option:
    """A change to a spec. Called, it changes a copy; `build` lets many share one copy.

    Args:
        name: What the user called, for messages.
        edit: Changes the spec that it is given; everything it puts in must be new, or be text or a number.
    """

    __slots__ = ("_edit", "_name")

    def __init__(self, name: str, edit: Callable[[Spec], None]) -> None:
        self._name = name
        self._edit = edit

    def __call__(self, spec: Spec) -> Spec:
        changed = parse_spec(spec)
        self.apply(changed)
        return changed

    def __repr__(self) -> str:
        return f"<{self._name}>"

    def apply(self, spec: Spec) -> None:
        """Change this very spec."""
        try:
            self._edit(spec)
        except ValidationError as error:
            raise InvalidParameterError(f"{self._name}: {problems(error)}") from error


def build(spec: Spec, *options: SpecOption) -> Spec:
    """Apply options to a spec, one after the other.

    An option is any function from spec to spec: those of this module, or your own. None changes what it is
    given.

    >>> from libcontainerd import oci
    >>> spec = oci.build(oci.default_spec(), oci.with_args("sleep", "60"), oci.with_hostname("worker"))
    >>> spec.process.args, spec.hostname
    (['sleep', '60'], 'worker')

    Args:
        spec: What to begin with; it stays as it is.
        *options: What to change, in this order: of two that set the same thing the later one counts.

    Returns:
        A new spec that shares nothing with `spec`.

    Raises:
        InvalidParameterError: if the spec is not valid, or an option's values are not.
    """
    built = parse_spec(spec)
    for option in options:
        if isinstance(option, Option):
            option.apply(built)
        else:
            built = option(built)
            if not isinstance(built, Spec):
                raise InvalidParameterError(
                    f"{option!r} returned no Spec: an option is called with its values first, as in with_args('sh')"
                )
    return built


def process_of(spec: Spec) -> Process:
    """Give the spec's process, made if there is none."""
    if spec.process is None:
        spec.process = Process()
    return spec.process


def linux_of(spec: Spec) -> Linux:
    """Give the spec's linux section, made if there is none."""
    if spec.linux is None:
        spec.linux = Linux()
    return spec.linux


def resources_of(spec: Spec) -> LinuxResources:
    """Give the spec's resource limits, made if there are none."""
    linux = linux_of(spec)
    if linux.resources is None:
        linux.resources = LinuxResources()
    return linux.resources


def unset(model: Model, member: str) -> None:
    """Make a member unset, as if it had never been there; assigning None would write null."""
    model.__dict__[member] = None
    model.model_fields_set.discard(member)


def text(value: object, function: str, parameter: str) -> str:
    """Give an argument that must be text that the kernel takes: callers without a type checker pass anything.

    Raises:
        InvalidParameterError: if it is not a string, or holds a NUL.
    """
    if not isinstance(value, str) or "\0" in value:
        raise InvalidParameterError(f"{function}: {parameter} must be text without NUL, not {value!r}")
    return value


def text_map(values: object, function: str) -> dict[str, str]:
    """Give an argument that must map text to text, as a copy.

    Raises:
        InvalidParameterError: if it does not.
    """
    if not isinstance(values, Mapping):
        raise InvalidParameterError(f"{function}: give a mapping of names to values, not {values!r}")
    return {
        text(name, function, "a name"): text(value, function, str(name)) for name, value in values.items()
    }


def absolute(path: object, function: str, parameter: str) -> str:
    """Give an argument that must be an absolute path.

    Raises:
        InvalidParameterError: if it is not.
    """
    if not posixpath.isabs(text(path, function, parameter)):
        raise InvalidParameterError(f"{function}: {parameter} must be an absolute path, not {path!r}")
    return str(path)


def texts(values: list[str] | None) -> list[str]:
    """Give the strings of an array, without the nulls that Go's decoder lets pass."""
    found: list[object] = list(values or ())
    return [value for value in found if isinstance(value, str)]


def set_env(process: Process, entries: list[str]) -> None:
    """Merge `NAME=value` entries into a process's environment: one of the same name keeps its place."""
    merged: dict[str, str] = {}
    for entry in [*texts(process.env), *entries]:
        merged[entry.partition("=")[0]] = entry
    process.env = list(merged.values())
