"""What vLLM's structured output sees of our tokenizers: the bytes of each token, among them tokens that are no text."""

from visualrwkv_hf.conversion.world_tokenizer import build_world_tokenizer, load_world_vocabulary


def test_xgrammar_reads_the_bytes_of_every_world_token():
    import xgrammar

    tokenizer = build_world_tokenizer()
    read = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=len(tokenizer))
    vocabulary = {number: token for token, number in load_world_vocabulary().items()}
    seen = read.decoded_vocab  # a copy at each access
    assert {number: seen[number] for number in vocabulary} == vocabulary
    assert b"\xe0\xa4" in vocabulary.values(), "a token that is no UTF-8 by itself"
    assert (read.vocab_size, read.add_prefix_space, read.stop_token_ids) == (65536, False, [0])


def test_without_a_named_backend_json_has_no_white_space():
    from vllm.config.structured_outputs import StructuredOutputsConfig

    from visualrwkv_hf.vllm.engine_config import write_compact_json

    class Engine:
        structured_outputs_config = StructuredOutputsConfig()

    write_compact_json(Engine)
    found = Engine.structured_outputs_config
    assert (found.backend, found.disable_any_whitespace) == ("xgrammar", True)
    Engine.structured_outputs_config = StructuredOutputsConfig(backend="xgrammar")
    write_compact_json(Engine)
    assert not Engine.structured_outputs_config.disable_any_whitespace, "the user has chosen"
