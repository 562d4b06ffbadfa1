"""The way of a row to the training step: text and images for the collator, teacher vectors beside the batch, streams.
Uses `config` and what lies below it."""
