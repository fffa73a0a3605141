"""The mathematics of reinforcement learning from human feedback: pure functions on tensors, and the PPO
step."""
