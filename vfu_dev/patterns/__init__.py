"""Load patterns as data, and the writes that follow from them: numpy only, used by every generator.

`LoadSpec` says what a load is, `Writes` which write comes where, `Pacer` when; docs/load.md is the definition
that a generator in another language follows.
"""

from vfu_dev.patterns.spec import PAGE_PATTERNS, PATTERNS, Burst, LoadSpec, Phase, parse_rate

__all__ = ["PAGE_PATTERNS", "PATTERNS", "Burst", "LoadSpec", "Phase", "parse_rate"]
