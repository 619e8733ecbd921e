"""Replay of a profile: a served device that behaves in migration as the profile says (docs/profiles.md)."""
