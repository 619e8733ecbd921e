"""vfu-dev: a software PCI device that supports the VFIO PRE_COPY migration phase."""

import logging

__version__ = "0.1.0"

# Of everything that programs read as JSON: raised when a key changes its meaning or goes away; CHANGELOG.md
# says which. New keys do not count.
JSON_VERSION = 2

# A library stays silent until its user asks for logs.
logging.getLogger(__name__).addHandler(logging.NullHandler())
