"""`rlhf serve`: the registry's champion behind a chat endpoint, and what its users say of the answers."""
