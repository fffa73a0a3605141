"""The stages of the pipeline: one module each, one public function `run(params, layout, tracker)`.

A stage function reads the workspace, fills its outputs through `atomic.staged_dir`, and returns its final
metrics, which must be the same in a repetition. `runner.run_stage` does what all stages share.
"""

STAGES = ("prepare", "base", "validate", "pretrain", "sft", "preferences", "reward", "ppo", "evaluate")
SHARED = ("pretrain", "sft", "preferences", "reward", "ppo", "evaluate")  # may run in several processes
