"""Forms in which items and votes come and go: the project's own JSONL, Label Studio's, Argilla's, TRL's."""
