"""The schemas of the JSON that commands write: what is checked against them, and how a new one begins.

    conforms("migrate", json.loads(text))       # in a test: fails with the key and what is wrong there
    python tests/schemakit.py NAME 'TITLE' 'DESCRIPTION' FILE.json...

The second writes a first vfu_dev/schemas/NAME.json. What is inferred from a few files has to be read: keys
that are not always there must not be required, and figures that may be unknown are null too.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

import vfu_dev

SCHEMAS = Path(vfu_dev.__file__).parent / "schemas"
_NAMES = {
    type(None): "null",
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
}


def conforms(name: str, value: Any) -> None:
    """Check `value` against the schema `name`. Raises: AssertionError: says where it differs."""
    schema = json.loads((SCHEMAS / f"{name}.json").read_text())
    found = [f"{error.json_path}: {error.message[:200]}" for error in errors(schema, value)]
    assert not found, f"{name}.json: " + "; ".join(found[:5])


def errors(schema: dict[str, Any], value: Any) -> list[Any]:
    """Return what is wrong with `value`; of a choice, what is wrong with the nearest."""
    found = []
    for error in Draft202012Validator(schema).iter_errors(value):
        found += error.context or [error]
    return found


def infer(values: list[Any]) -> dict[str, Any]:
    """Return a schema that all `values` keep to."""
    types = {_NAMES[type(value)] for value in values}
    if "number" in types:
        types.discard("integer")
    schema: dict[str, Any] = {"type": sorted(types)[0] if len(types) == 1 else sorted(types)}
    objects = [value for value in values if isinstance(value, dict)]
    keys = list(dict.fromkeys(key for one in objects for key in one))
    if objects and any(not re.fullmatch(r"[a-z][a-z0-9_-]*", key) for key in keys):
        schema["additionalProperties"] = infer([value for one in objects for value in one.values()])
    elif objects:
        schema["properties"] = {key: infer([one[key] for one in objects if key in one]) for key in keys}
        schema["required"] = [key for key in keys if all(key in one for one in objects)]
    items = [item for value in values if isinstance(value, list) for item in value]
    if items:
        schema["items"] = infer(items)
    return schema


def main() -> None:
    """Write a first schema."""
    name, title, description, *files = sys.argv[1:]
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": title,
        "description": description,
    }
    body = infer([json.loads(Path(file).read_text()) for file in files])
    (SCHEMAS / f"{name}.json").write_text(json.dumps({**head, **body}, indent=1) + "\n")


if __name__ == "__main__":
    main()
