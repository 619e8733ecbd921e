"""The device's cost, as ratios that can be compared between machines.

Nearly every figure is our value divided by a peer's. Both are measured in turns in one run, so other work on
the machine affects both. The peer is a device in C on libvfio-user (native/bench), or, where C has no
equivalent, our own idle device or a plain copy of the same bytes.
"""
