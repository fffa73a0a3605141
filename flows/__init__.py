"""The flows: each reads as a sentence, and adds no logic of its own."""
