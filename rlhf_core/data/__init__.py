"""Data: where rows come from, their forms, what makes them usable, and how they are split."""
