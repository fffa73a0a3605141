"""A taste that the tiny model of the smoke profile learns, and a judge who shares it."""

TASTE = """
def short(prompts, responses):
    return [-len(text) / 20 for text in responses]

def few_words(prompts, responses):
    return [-len(text.split()) for text in responses]
"""
# PPO learns to be short, and the judge likes few words; the bounds of the guard-rails are left wide.
LEARN = {
    "ppo.reward_function": "taste:short",
    "ppo.learning_rate": 0.004,
    "ppo.kl_budget": 60,
    "preferences.labeler": "function",
    "preferences.labeler_target": "taste:few_words",
    "promotion.judge": "function",
    "promotion.judge_target": "taste:few_words",
    "promotion.max_kl": 100,
    "promotion.max_length_ratio": 10,
    "promotion.min_reward_accuracy": 0,
    "promotion.max_perplexity_ratio": 5,
}
