"""Stage `base`: what is left out of reading a GGUF file is nothing that reaches the model."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from rlhf_core.stages.base import vocabulary_skipped

WIDTH, INNER, HEADS, KV_HEADS, BLOCKS = 32, 64, 4, 2, 2
TOKENS = ["<|a|>", "<|b|>", *map(chr, range(ord("!"), ord("~"))), "he", "el"]


@pytest.fixture
def gguf_dir(tmp_path):
    """A directory with a llama of random weights in blocks of 4 bit, as the package's file is."""
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_block_count(BLOCKS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))
    writer.add_token_merges(["h e", "e l"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    rng = np.random.default_rng(0)

    def add(name, *shape):
        weights = rng.standard_normal(shape, dtype=np.float32)
        if len(shape) == 1:
            return writer.add_tensor(name, weights)
        kind = gguf.GGMLQuantizationType.Q4_1
        return writer.add_tensor(name, gguf.quantize(weights, kind), raw_dtype=kind)

    add("token_embd.weight", len(TOKENS), WIDTH)
    add("output_norm.weight", WIDTH)
    for block in (f"blk.{i}" for i in range(BLOCKS)):
        add(f"{block}.attn_norm.weight", WIDTH)
        add(f"{block}.ffn_norm.weight", WIDTH)
        add(f"{block}.attn_q.weight", WIDTH, WIDTH)
        add(f"{block}.attn_k.weight", WIDTH * KV_HEADS // HEADS, WIDTH)
        add(f"{block}.attn_v.weight", WIDTH * KV_HEADS // HEADS, WIDTH)
        add(f"{block}.attn_output.weight", WIDTH, WIDTH)
        add(f"{block}.ffn_gate.weight", INNER, WIDTH)
        add(f"{block}.ffn_up.weight", INNER, WIDTH)
        add(f"{block}.ffn_down.weight", WIDTH, INNER)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path


def load(directory):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file="model.gguf")
    model = AutoModelForCausalLM.from_pretrained(directory, gguf_file="model.gguf", dtype=torch.float32)
    return model, tokenizer


def test_skipping_the_vocabulary_gives_what_transformers_gives_by_itself(gguf_dir):
    reader = gguf.GGUFReader
    model, tokenizer = load(gguf_dir)
    with vocabulary_skipped():
        assert gguf.GGUFReader is not reader
        same, same_tokenizer = load(gguf_dir)
    assert gguf.GGUFReader is reader, "only in the block"
    assert same.config.to_dict() == model.config.to_dict()
    assert same.state_dict().keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(same.state_dict()[name], weight), name
    assert same_tokenizer.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert same_tokenizer.special_tokens_map == tokenizer.special_tokens_map
    assert tokenizer("hello")["input_ids"] == [
        tokenizer.convert_tokens_to_ids(t) for t in ("he", "l", "l", "o")
    ]


def test_a_reader_that_skips_still_knows_every_tensor_and_number(gguf_dir):
    path = gguf_dir / "model.gguf"
    whole = gguf.GGUFReader(path)
    with vocabulary_skipped():
        brief = gguf.GGUFReader(path)
    assert [t.name for t in brief.tensors] == [t.name for t in whole.tensors]
    assert brief.data_offset == whole.data_offset
    assert list(brief.fields) == list(whole.fields)
    for name, field in whole.fields.items():
        if field.types[0] != gguf.GGUFValueType.ARRAY:
            assert brief.fields[name].contents() == field.contents(), name
