"""How a QEMU gets the device: through vfio-user-pci, or through its own vfio-pci and the preloaded library.

preload.py     the library's environment, and the folders that stand for devices in sysfs
front_end.py   the two front ends: which to use, and its QEMU arguments, environment and descriptors
command.py     `vfu-dev attach`: the same for a command line that the user wrote
"""

from vfu_dev.attach.front_end import FrontEnd, VfioPci, VfioUserPci, make_front_end

__all__ = ["FrontEnd", "VfioPci", "VfioUserPci", "make_front_end"]
