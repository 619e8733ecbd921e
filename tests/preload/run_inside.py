"""Run one test function in this process, which the library is preloaded into: see conftest.py.

run_inside.py MODULE-FILE FUNCTION ARGUMENTS-AS-JSON
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import traceback
from pathlib import Path


def main() -> int:
    file, name, text = sys.argv[1:]
    sys.path[:0] = [str(Path(file).parent), str(Path(file).parents[1])]  # kits of this folder, and of all
    from inside import Served

    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    arguments = json.loads(text)
    for key, value in arguments.items():
        if isinstance(value, dict) and "sockets" in value:
            arguments[key] = Served(**value)
    try:
        getattr(module, name)(**arguments)
    except BaseException as error:
        below = (
            error.__traceback__.tb_next if error.__traceback__ else None
        )  # without this function's own part
        chain = traceback.TracebackException(type(error), error, below, capture_locals=True)
        print("".join(chain.format()), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if os.environ.get("INSIDE_EXITS_AT_ONCE"):
        os._exit(status)
    sys.exit(status)
