import sys; sys.path.insert(0,'/work/main/tests/rl')
from tests.rl.test_ppo import *
def test_x(tiny_model_dir, config):
    for method in METHODS:
        c = config.model_copy(update={"advantages": method})
        for seed in range(5):
            scores = learn(make_actors(tiny_model_dir, seed), c, 100, seed)
            first = next((i for i in range(98) if min(scores[i:i+3])>=0.9), None)
            print(method, seed, first, max(min(scores[i:i+3]) for i in range(58)), [round(s,2) for s in scores[::8]], flush=True)
