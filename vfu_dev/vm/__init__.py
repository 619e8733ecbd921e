"""Machines and guests: child processes, device servers, QEMU, and guests that write and verify.

Nothing here knows what a migration is: `vfu_dev.lab` moves what this starts.
"""
