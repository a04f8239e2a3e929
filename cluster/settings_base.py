"""The base of every room's settings: frozen, strict, unknown names refused.

Covers: the pydantic base class and loading from plain data with errors a person can act on.
Does not cover: which settings exist (each room's `settings.py`) or where they come from (`cluster.settings`).
"""

import json
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, ClassVar, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.errors import SettingsError


class SettingsBase(BaseModel):
    """Settings are checked, never changed: derived values come from a pure `resolve` function."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    RENAMED: ClassVar[dict[str, str]] = {}
    """Names that settings of this group once had, and what to use instead."""


S = TypeVar("S", bound=SettingsBase)


def load_settings(cls: type[S], values: Mapping[str, Any], *, source: str) -> S:
    """Build settings from plain data (a parsed YAML file).

    Args:
        cls: The settings class to build.
        values: Nested mappings, lists and scalars.
        source: Where the values came from, for the error message.

    Raises:
        SettingsError: One line per wrong setting: its dotted name, what is wrong, and a near name if it is unknown.
    """
    try:
        # Through JSON, because strict mode refuses a YAML list for a tuple field otherwise.
        return cls.model_validate_json(json.dumps(values))
    except (TypeError, ValueError) as error:
        if not isinstance(error, ValidationError):
            raise SettingsError(f"{source}: not plain data: {error}") from error
        lines = [f"  {_dotted(item['loc'])}: {_explain(cls, item)}" for item in error.errors()]
        raise SettingsError(f"{source}: {len(lines)} wrong setting(s)\n" + "\n".join(lines)) from error


def _dotted(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location)


def _explain(cls: type[SettingsBase], item: Any) -> str:
    if item["type"] == "value_error":
        # One of our own checks: its words say what was given, unless that could be a secret.
        return str(item["ctx"]["error"])
    if item["type"] != "extra_forbidden":
        return f"{item['msg']} (given: {item['input']!r})"
    *parents, name = item["loc"]
    group = _group_at(cls, parents)
    renamed = getattr(group, "RENAMED", {}).get(name)
    if renamed:
        return f"renamed: use {renamed}"
    known = list(group.model_fields) if group else []
    near = get_close_matches(str(name), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(known))}"
    return f"unknown setting; {hint}"


def _group_at(cls: type[BaseModel], path: list[int | str]) -> type[BaseModel] | None:
    for part in path:
        field = cls.model_fields.get(str(part))
        annotation = field.annotation if field else None
        # A group that may be null is a union with None.
        groups = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
        group = next((kind for kind in groups if issubclass(kind, BaseModel)), None)
        if group is None:
            return None
        cls = group
    return cls
