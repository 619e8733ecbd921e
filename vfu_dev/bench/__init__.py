"""What the device costs, as ratios that mean something on any machine.

Nearly every figure is one of ours over the same one of a peer, taken in one run and in turns, so that what
else the machine does meets both. The peer is a device in C on the same libvfio-user
(native/libvfio-user/src/samples/vfu-ref-server.c), or where C has nothing to compare with, our own quiet
state or a plain copy of the same bytes.
"""
