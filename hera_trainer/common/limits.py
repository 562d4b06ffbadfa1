"""Limits that several rooms keep to."""

from __future__ import annotations

# Main memory that image features may fill when the device's share is used up, as a multiple of it.
HOST_SHARE = 4
