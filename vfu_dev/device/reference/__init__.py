"""The reference device: what `vfu-dev serve` serves, written as any author would write a device.

`layout` is what its drivers see (docs/device.md), `reference` the device; `dma`, `writer` and
`workload_registers` are the engines behind its registers. `workload` is the generator of an operator, which
the server adds to any device.
"""

from vfu_dev.device.reference.reference import ReferenceDevice

__all__ = ["ReferenceDevice"]
