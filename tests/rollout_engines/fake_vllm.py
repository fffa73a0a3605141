"""What `vllm serve` is to the engine, over a tiny model: the same endpoints, strict about what they are sent.

The file that FAKE_VLLM names holds how it misbehaves, if at all; it is read anew for every request. What it
was asked for is appended to that file's `.asked`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

MODE_FILE = Path(os.environ["FAKE_VLLM"])
FIELDS = {
    "model", "prompt", "max_tokens", "temperature", "top_k", "top_p", "seed", "n", "ignore_eos",
    "stop_token_ids", "logprobs", "return_token_ids",
}  # fmt: skip
LOCK = threading.Lock()


class Model:
    """The base with one adapter at most, as --max-loras 1 has it; writes by plain forward passes."""

    def __init__(self, path):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        self.path, self.loaded = path, {}
        self.base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def load(self, name, path):
        import copy

        from rlhf_core.config import LoRAConfig
        from rlhf_core.modeling import lora

        facts = json.loads((Path(path) / "adapter_config.json").read_text())
        assert facts["peft_type"] == "LORA"
        assert not self.loaded
        config = LoRAConfig(rank=facts["r"], alpha=facts["lora_alpha"])
        model = copy.deepcopy(self.base)
        lora.adapt(model, config).name = name
        lora.add_adapter(model, name, seed=1)
        lora.load_adapter_state(model, name, lora.read_adapter(Path(path)))
        self.loaded[name] = model

    def write(self, asked):
        import torch

        ids, tokens, logprobs = list(asked["prompt"]), [], []
        generator = torch.Generator().manual_seed(asked["seed"])
        while len(tokens) < asked["max_tokens"]:
            with torch.no_grad():
                logits = self.loaded[asked["model"]](torch.tensor([ids])).logits[0, -1]
            scaled = (logits / asked["temperature"]).log_softmax(-1)
            if asked["top_k"] == 1:
                token, logprob = int(scaled.argmax()), 0.0
            else:
                token = int(torch.multinomial(scaled.exp(), 1, generator=generator))
                logprob = float(scaled[token])
            ids.append(token)
            tokens.append(token)
            logprobs.append(logprob)
            if token in asked["stop_token_ids"]:
                break
        return tokens, logprobs


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.reply(200 if self.path == "/health" else 404, {})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with MODE_FILE.with_suffix(".asked").open("a") as file:
            file.write(json.dumps([self.path, body]) + "\n")
        if self.headers["Authorization"] != f"Bearer {os.environ['VLLM_API_KEY']}":
            return self.reply(401, {"error": "Unauthorized"})
        with LOCK:
            self.reply(*getattr(self, self.path.rpartition("/")[2])(body, MODE_FILE.read_text()))

    def load_lora_adapter(self, body, mode):
        if mode == "load_refused":
            return 400, {"error": {"message": "LoRA rank 16 is greater than max_lora_rank 8"}}
        self.server.model.load(body["lora_name"], body["lora_path"])
        return 200, "Success"

    def unload_lora_adapter(self, body, mode):
        del self.server.model.loaded[body["lora_name"]]
        return 200, "Success"

    def completions(self, body, mode):
        if body.keys() != FIELDS or not body["ignore_eos"] or body["model"] not in self.server.model.loaded:
            return 404, {"error": {"message": f"cannot do this: {body}"}}
        if mode == "dies":
            print("CUDA error: out of memory", flush=True)
            os._exit(9)
        if mode == "silent":
            time.sleep(60)
        if mode == "refused":
            return 400, {"error": {"message": "maximum context length is 16 tokens"}}
        tokens, logprobs = self.server.model.write(body)
        eos = body["stop_token_ids"][0]
        if mode == "too_few":
            tokens, logprobs = [token for token in tokens[:2] if token != eos], logprobs[:2]
            logprobs = logprobs[: len(tokens)]
        if mode == "past_eos":
            tokens, logprobs = [eos, *tokens], [-1.0, *logprobs]
        if mode == "one_logprob_short":
            logprobs = logprobs[1:]
        choice = {"index": 0, "text": "", "token_ids": tokens, "logprobs": {"token_logprobs": logprobs}}
        if mode == "no_logprobs":
            choice["logprobs"] = None
        return 200, {"choices": [choice]}

    def reply(self, status, body):
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        """Those who asked may have gone."""


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("serve", choices=["serve"])
    parser.add_argument("model")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--enable-lora", action="store_true")
    for name in ("served-model-name", "dtype", "max-model-len", "max-num-seqs", "gpu-memory-utilization",
                 "max-lora-rank", "max-loras", "logprobs-mode", "generation-config", "seed"):  # fmt: skip
        parser.add_argument(f"--{name}", required=name != "dtype")
    options = parser.parse_args()
    mode = MODE_FILE.read_text()
    if mode == "does_not_start":
        sys.exit("ValueError: No available memory for the cache blocks")
    if mode == "never_answers":
        time.sleep(60)
    model = Model(options.model) if mode != "light" else None
    server = Server((options.host, options.port), Handler)
    server.model = model
    print("listening", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
