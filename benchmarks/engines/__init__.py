"""A training engine each, run as a process: `python ENGINE.py CASE.json` ends with one line of JSON.

A case: model (directory), prompts (token ids), conversations (the same as messages), batch, response_length,
epochs, minibatches, stop (whether answers may end), lora, bf16, batches (measured, after one to warm up). The
line: seconds of each batch, seconds by phase, response tokens of each batch, peak resident memory in GiB.
"""
