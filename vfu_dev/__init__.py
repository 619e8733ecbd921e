"""vfu-dev: a software PCI device that supports the VFIO PRE_COPY migration phase.

What other programs import, with `__all__` in each; a change that breaks them is in CHANGELOG.md:

    vfu_dev.device     what a device is written against
    vfu_dev.testing    what checks such a device, without a VM, a socket or a library
    vfu_dev.client     a vfio-user client, a migrator of devices, and a client of control sockets

`vfu_dev.errors` has what all of them raise, `vfu_dev.uapi` the constants of <linux/vfio.h>. All other modules
are the project's own and move as it needs; README.md, "How it is put together", says what is where.
"""

import logging

__version__ = "0.1.0"

# Of everything that programs read as JSON: raised when a key changes its meaning or goes away; CHANGELOG.md
# says which. New keys do not count.
JSON_VERSION = 2

# A library stays silent until its user asks for logs.
logging.getLogger(__name__).addHandler(logging.NullHandler())
