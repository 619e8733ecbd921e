"""A fuzz target in Python: `python target.py NAME`, then libFuzzer's options and inputs.

NAME is `stream` or `client`, or one of them with `-planted`, which breaks what is under test in a known way.
"""

from __future__ import annotations

import sys

import atheris

# Modules are instrumented as they are imported, so nothing of vfu_dev may be imported before.
with atheris.instrument_imports(include=["vfu_dev.migration", "vfu_dev.client"]):
    import clientfuzz
    import streamfuzz

MODULES = {"stream": streamfuzz, "client": clientfuzz}


def main() -> None:
    name, *arguments = sys.argv[1:]
    module = MODULES[name.removesuffix("-planted")]
    if name.endswith("-planted"):
        module.plant()
    options = {}
    if module is clientfuzz:
        options["custom_mutator"] = clientfuzz.mutate
    atheris.Setup([sys.argv[0], *arguments], module.run_one, **options)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
