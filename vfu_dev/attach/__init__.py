"""How a QEMU gets the device: through vfio-user-pci, or through its own vfio-pci and the preloaded library.

preload.py     the library's environment, and the folders that stand for devices in sysfs
front_end.py   the two front ends: arguments, environment and descriptors of a QEMU; which of them to take
command.py     the same for a command line of somebody's own: `vfu-dev attach`
"""

from vfu_dev.attach.front_end import FrontEnd, VfioPci, VfioUserPci, make_front_end

__all__ = ["FrontEnd", "VfioPci", "VfioUserPci", "make_front_end"]
