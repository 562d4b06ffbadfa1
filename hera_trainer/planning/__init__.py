"""Memory and cost of a run, from its settings and the model's config alone. Uses `heads`, `objectives` and
`common`."""
