"""Attention heads: where they are, what they say, how well they agree with a teacher."""
