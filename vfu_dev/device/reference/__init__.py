"""The reference device: what `vfu-dev serve` serves, written as any author would write a device.

`reference` is the device and its register table (docs/device.md); `dma` with `descriptors`, `writer` and
`workload_registers` are the engines behind those registers. `workload` is the generator of an operator,
which the server adds to any device.
"""

from vfu_dev.device.reference.reference import FIELDS, MemorySpec, ReferenceDevice

__all__ = ["FIELDS", "MemorySpec", "ReferenceDevice"]
