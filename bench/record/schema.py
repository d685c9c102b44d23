"""The JSON schema of a results file, made from the classes of its rows."""

from __future__ import annotations

import types
import typing
from dataclasses import fields
from functools import cache
from typing import Any

from bench.record.rows import FLAGS, TABLES

__all__ = ["SCHEMA", "fault", "schema"]

SCHEMA = "tritonnorm.bench/1"
LATER = ("folds", "counters")  # tables that the first files lack: they read as empty

_NAMES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
# What a field may hold beyond its type. Times and bandwidths of nothing or less cannot be.
_POSITIVE = {"exclusiveMinimum": 0}
_NOT_NEGATIVE = {"minimum": 0}
_LIMITS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("p50_us", "p20_us", "p80_us", "p50_ms", "p20_ms", "p80_ms"), _POSITIVE),
    **dict.fromkeys(("gb_s", "samples"), _POSITIVE),
    **dict.fromkeys(("noise", "error", "host_us", "peak_mb"), _NOT_NEGATIVE),
    "cache": {"enum": ["cold", "warm"]},
    "flags": {"pattern": f"^[{''.join(FLAGS)}]*$"},
    "layout": {"enum": ["NCHW", "NHWC"]},
    "shape": {"pattern": r"^\d+(x\d+)+$"},
}


@cache
def schema() -> dict[str, Any]:
    """JSON schema, draft 2020-12."""
    tables = {name: {"type": "array", "items": _row(row)} for name, row in TABLES.items()}
    top = {"schema": {"const": SCHEMA}, "environment": _environment(), **tables}
    whole = _closed(top) | {"required": [name for name in top if name not in LATER]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **whole}


def fault(content: Any) -> str | None:
    """Where and why something is not a results file, or None.

    Raises:
        ImportError: jsonschema is not installed.
    """
    import jsonschema

    error = jsonschema.exceptions.best_match(_validator().iter_errors(content))
    if error is None:
        return None
    place = "/".join(map(str, error.absolute_path)) or "the file"
    return f"{place}: {error.message[:200]}"


@cache
def _validator() -> Any:
    import jsonschema

    return jsonschema.Draft202012Validator(schema())


def _closed(properties: dict[str, Any]) -> dict[str, Any]:
    """An object with exactly these properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _row(row: type) -> dict[str, Any]:
    hints = typing.get_type_hints(row)
    return _closed({f.name: _type(hints[f.name]) | _LIMITS.get(f.name, {}) for f in fields(row)})


def _type(hint: Any) -> dict[str, Any]:
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return {"type": [_NAMES[part] for part in parts]}


def _environment() -> dict[str, Any]:
    text, number = {"type": "string"}, {"type": ["number", "null"]}
    versions = {"type": "object", "additionalProperties": {"type": ["string", "null"]}}
    gpu = {
        "type": "object",
        "properties": {"name": text, "arch": text, "sms": number, "l2_bytes": number},
        "required": ["name", "arch", "sms", "l2_bytes"],
        "additionalProperties": {"type": ["string", "number", "boolean", "null"]},
    }
    return {
        "type": "object",
        "properties": {
            "date": {"type": "string", "pattern": r"^\d{4}-\d{2}-\d{2}$"},
            "command": text,
            "seed": {"type": "integer"},
            "commit": {"type": ["string", "null"]},
            "dirty": {"type": ["boolean", "null"]},
            "gpu": gpu,
            "versions": versions,
            "host": {"type": "object", "additionalProperties": {"type": ["string", "number"]}},
            "variables": {"type": "object", "additionalProperties": text},
        },
        "required": ["date", "seed", "commit", "dirty", "gpu", "versions"],
        "additionalProperties": False,
    }
