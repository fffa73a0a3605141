"""Who writes the answers of a PPO rollout: this project's own decoding, or vLLM beside the training."""
