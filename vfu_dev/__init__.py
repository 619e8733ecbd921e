"""vfu-dev: a software PCI device that supports the VFIO PRE_COPY migration phase."""

import logging

__version__ = "0.1.0"

# A library stays silent until its user asks for logs.
logging.getLogger(__name__).addHandler(logging.NullHandler())
