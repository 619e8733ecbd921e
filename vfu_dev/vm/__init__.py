"""Machines and guests: child processes, device servers, QEMU, and guests that write and verify.

Nothing here knows what a migration is: `vfu_dev.lab` moves what this starts.
"""

# Devices in one VM: the guest's program has room for that number (native/guest/vfud-load).
MAX_DEVICES = 16
