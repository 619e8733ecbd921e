"""One move with real QEMU, checked: device servers, two QEMUs, a guest under load.

`lab.Lab` owns the processes and has the steps, `migrate.run` is the whole of `vfu-dev lab migrate`,
`result` is its JSON and `judge` decides whether everything is correct. Machines and guests: `vfu_dev.vm`.
"""
