"""What a client can observe of a device in migration, as data: imported from a trace, replayed by a server.

model.py      the classes, `Profile` first; values.py: marks, distributions; kinds.py: kinds of values
reading.py    from a TOML file, with line and key in errors; writing.py: into one
contradictions.py  what cannot be true at once
importing.py  from traces: from_qemu.py and from_calls.py tell a History (history.py, session.py, tally.py)
              what happened, build.py makes the profile of it
compare.py    where two differ; fit.py: parameters for what was recorded; show.py: for people; keys.py: by key
docs/profiles.md describes the format, docs/recording.md what is imported.
"""

from vfu_dev.profile.model import FORMAT_VERSION, Profile
from vfu_dev.profile.reading import parse_profile, read_profile
from vfu_dev.profile.values import Curve, Distribution, Mark, Value
from vfu_dev.profile.writing import profile_text

__all__ = [
    "FORMAT_VERSION",
    "Curve",
    "Distribution",
    "Mark",
    "Profile",
    "Value",
    "parse_profile",
    "profile_text",
    "read_profile",
]
