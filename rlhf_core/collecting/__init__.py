"""What people are asked: which prompts, whose answers, and which of them tell most."""
