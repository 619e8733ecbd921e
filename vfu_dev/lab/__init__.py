"""Whole experiments with real QEMU: device servers, two QEMUs, a guest under load, everything checked.

`migrate.Lab` owns the processes of one experiment, `migrate.run()` is the experiment. `guest.LinuxGuest` and
`qtest_guest.QtestGuest` write to the device and remember what they wrote. `result` is the JSON.
"""
