"""Attention heads: where a model has them, reading them, scoring them against a teacher and choosing among them. Uses
`teacher` and what lies below it."""
