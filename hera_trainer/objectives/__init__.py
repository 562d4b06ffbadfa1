"""Alignment objectives, the metric of neighbourhoods, and the queue of past samples: torch alone. Uses `common`."""
