"""A taste that the tiny model of the smoke profile learns, and a judge who shares it."""

TASTE = """
def short(prompts, responses):
    return [-len(text) / 20 for text in responses]

def few_words(prompts, responses):
    return [-len(text.split()) for text in responses]
"""
# PPO learns to be short, and the judge likes few words. The bounds of the guard-rails are left wide, and the
# gate asks for less than by default, so that a policy that has learnt a little passes it, and one that has
# learnt more passes it against that one. What it lets through by chance is the matter of tests/promotion.
LEARN = {
    "ppo.reward_function": "taste:short",
    "ppo.learning_rate": 0.004,
    "ppo.kl_budget": 60,
    "preferences.labeler": "function",
    "preferences.labeler_target": "taste:few_words",
    "promotion.judge": "function",
    "promotion.judge_target": "taste:few_words",
    "promotion.confidence": 0.8,
    "promotion.num_prompts": 96,
    "promotion.max_kl": 100,
    "promotion.max_length_ratio": 1000,
    "promotion.min_distinct_ratio": 0,
    "promotion.max_repeated": 1,
    "promotion.min_reward_accuracy": 0,
    "promotion.max_perplexity_ratio": 1000,
}
