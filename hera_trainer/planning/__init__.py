"""Memory and cost of a run, from its settings and the model's config alone. Uses `data` and what lies below it."""
