"""Loads from outside the device: as a vfio-user client, or commanded where others make them."""
