#!/bin/bash
# install.sh REQUIREMENT PART...: vfu-dev into /opt/vfu-dev, with these native parts where a wheel has them, so that
# they are found without a compiler. A step of the Containerfiles.
set -euo pipefail
requirement=$1
shift
python3 -m venv /opt/vfu-dev
/opt/vfu-dev/bin/pip install --no-cache-dir --disable-pip-version-check "$requirement"
# Installs the compilers that it misses.
/opt/vfu-dev/bin/vfu-dev build "$@"
/opt/vfu-dev/bin/python -P - "$@" <<'PYTHON'
import shutil
import sys

from vfu_dev.builds import Cache, recipe_named
from vfu_dev.builds.prebuilt import prebuilt_root

for part in sys.argv[1:]:
    shutil.copytree(recipe_named(part).folder(Cache()), prebuilt_root() / part, symlinks=True)
PYTHON
