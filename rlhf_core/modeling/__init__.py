"""Models: loading, adapters on one shared base, heads, log-probabilities, saving."""
