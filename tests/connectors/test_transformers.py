"""The transformers connector on a real model: equal output, and proof that the cache was used."""

from __future__ import annotations

import logging
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from kvtier.block import TierId  # noqa: E402
from kvtier.connectors import hf_model  # noqa: E402
from kvtier.connectors.hf_request import cache_argument  # noqa: E402
from kvtier.connectors.transformers import TransformersCache  # noqa: E402
from kvtier.testing.models import random_tokens, tiny_llama  # noqa: E402
from tests.connectors.dict_client import BrokenClient, DictClient  # noqa: E402

PROMPT = random_tokens(150, seed=1)
NEW_TOKENS = 12
# bf16: decoding against restored KV and against KV still in the same computation may round
# differently in the last bit of a sum.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.15}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_llama(heads=4, kv_heads=2, dtype=request.param)


@pytest.fixture(scope="module")
def float_model() -> Any:
    return tiny_llama()


def _generate(generate: Any, ids: Any, **kwargs: Any) -> Any:
    return generate(
        ids,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **kwargs,
    )


def assert_same_output(model: Any, cache: TransformersCache, ids: Any, **kwargs: Any) -> None:
    """Generates with and without kvtier: equal ids, close logits."""
    kwargs.setdefault("attention_mask", torch.ones_like(ids))
    plain = _generate(model.generate, ids, **kwargs)
    cached = _generate(cache.generate, ids, **kwargs)
    assert cached.sequences.tolist() == plain.sequences.tolist()
    tolerance = TOLERANCE[str(model.dtype).removeprefix("torch.")]
    for ours, theirs in zip(cached.logits, plain.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
    assert cache.border.counts().failure_count == 0


def _ids(*rows: list[int]) -> Any:
    return torch.tensor(rows)


def test_cold_prompt(model: Any) -> None:
    client = DictClient()
    cache = TransformersCache(model, client)

    assert_same_output(model, cache, _ids(PROMPT))

    assert cache.last.token_count == 0
    assert cache.last.tier == "-"
    assert len(client.only.stored) == 150 // 16
    assert cache.border.counts().saved_blocks == 150 // 16
    assert client.only.format.size_bytes == 3 * 2 * 2 * 16 * 16 * model.dtype.itemsize


def test_the_same_prompt_again(model: Any) -> None:
    client = DictClient()
    assert_same_output(model, TransformersCache(model, client), _ids(PROMPT))
    cache = TransformersCache(model, client)  # another engine

    assert_same_output(model, cache, _ids(PROMPT))

    assert cache.last.token_count == 144
    assert cache.last.blocks_by_tier == {"dram": 9}
    assert cache.border.counts().hit_count == 1


def test_partial_prefix(model: Any) -> None:
    client = DictClient()
    cache = TransformersCache(model, client)
    assert_same_output(model, cache, _ids(PROMPT))
    client.only.tier = TierId.SSD

    assert_same_output(model, cache, _ids(PROMPT[:100] + random_tokens(48, seed=2)))

    assert cache.last.token_count == 96
    assert cache.last.tier == "ssd"


@pytest.mark.parametrize("length", [16, 128, 144])
def test_a_full_hit_leaves_a_token_to_compute(model: Any, length: int) -> None:
    client = DictClient()
    cache = TransformersCache(model, client)
    assert_same_output(model, cache, _ids(PROMPT))

    assert_same_output(model, cache, _ids(PROMPT[:length]))

    assert cache.last.token_count == length - 1
    assert cache.last.blocks_by_tier == {"dram": length // 16}


@pytest.mark.parametrize("length", [1, 5, 15])
def test_a_prompt_of_less_than_a_block(float_model: Any, length: int) -> None:
    client = DictClient()
    cache = TransformersCache(float_model, client)
    assert_same_output(float_model, cache, _ids(PROMPT[:length]))
    assert cache.last.token_count == 0
    assert not client.only.stored


def test_two_prompts_of_one_length(model: Any) -> None:
    client = DictClient()
    cache = TransformersCache(model, client)
    other = PROMPT[:64] + random_tokens(86, seed=3)
    assert_same_output(model, cache, _ids(PROMPT))
    assert cache.last.token_count == 0

    assert_same_output(model, cache, _ids(PROMPT, other))
    assert cache.last.token_count == 64  # what both have

    assert_same_output(model, cache, _ids(other, PROMPT))
    assert cache.last.token_count == 144


@pytest.mark.parametrize("padding", [1, 16, 23, 140])
def test_two_prompts_with_left_padding(model: Any, padding: int) -> None:
    client = DictClient()
    cache = TransformersCache(model, client)
    short = random_tokens(150 - padding, seed=4)
    ids = _ids(PROMPT, [0] * padding + short)
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    assert_same_output(model, cache, ids, attention_mask=mask)
    assert cache.last.token_count == 0

    assert_same_output(model, cache, ids, attention_mask=mask)
    short_blocks = (150 - padding) // 16
    expected = min(144, padding + 16 * short_blocks) if short_blocks else 0
    assert cache.last.token_count == expected

    # Blocks saved from the padded row are those of the same tokens without padding.
    assert_same_output(model, cache, _ids(short))
    assert cache.last.token_count == min(16 * short_blocks, 149 - padding)


def test_a_conversation_with_what_was_generated(model: Any) -> None:
    client = DictClient()
    cache = TransformersCache(model, client, save_generated=True)
    answer = _generate(cache.generate, _ids(PROMPT), attention_mask=torch.ones(1, 150, dtype=int))
    assert len(client.only.stored) == (150 + NEW_TOKENS - 1) // 16

    follow_up = answer.sequences[0].tolist() + random_tokens(20, seed=5)
    assert_same_output(model, cache, _ids(follow_up))
    assert cache.last.token_count == 160


def test_restore_and_save_by_hand(float_model: Any) -> None:
    client = DictClient()
    cache = TransformersCache(float_model, client)
    ids = _ids(PROMPT)
    with torch.no_grad():
        whole = float_model(ids, use_cache=True)
    assert cache.save(ids, whole.past_key_values) == 9
    assert cache.save(ids, whole.past_key_values) == 0

    restored = cache.restore(ids)

    assert restored.token_count == 144
    assert restored.cache is not None
    for ours, theirs in zip(restored.cache.layers, whole.past_key_values.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys[:, :, :144])
        assert torch.equal(ours.values, theirs.values[:, :, :144])


def test_corruption_control(float_model: Any) -> None:
    """Stored bytes decide the output: this suite cannot pass by not using the cache."""
    client = DictClient()
    cache = TransformersCache(float_model, client)
    assert_same_output(float_model, cache, _ids(PROMPT))
    plain = _generate(float_model.generate, _ids(PROMPT), attention_mask=torch.ones(1, 150))
    for stored in client.only.stored.values():
        torch.frombuffer(stored, dtype=torch.float32).neg_()

    poisoned = _generate(cache.generate, _ids(PROMPT), attention_mask=torch.ones(1, 150))

    assert cache.last.token_count == 144
    assert poisoned.sequences.tolist() != plain.sequences.tolist()
    assert not torch.allclose(poisoned.logits[0], plain.logits[0], atol=0.1)


def test_every_block_is_used(float_model: Any) -> None:
    client = DictClient()
    cache = TransformersCache(float_model, client)
    assert_same_output(float_model, cache, _ids(PROMPT))
    plain = _generate(float_model.generate, _ids(PROMPT), attention_mask=torch.ones(1, 150))
    for stored in client.only.stored.values():
        kept = bytes(stored)
        torch.frombuffer(stored, dtype=torch.float32).neg_()
        poisoned = _generate(cache.generate, _ids(PROMPT), attention_mask=torch.ones(1, 150))
        stored[:] = kept
        assert not torch.allclose(poisoned.logits[0], plain.logits[0], atol=1e-3)


def test_a_lost_lease_is_a_miss(float_model: Any) -> None:
    client = DictClient()
    cache = TransformersCache(float_model, client)
    assert_same_output(float_model, cache, _ids(PROMPT))
    client.only.lose_leases = True
    for stored in client.only.stored.values():
        stored[:] = bytes(len(stored))  # the slots hold something else by now

    output = cache.generate(_ids(PROMPT), max_new_tokens=NEW_TOKENS, do_sample=False)

    plain = float_model.generate(_ids(PROMPT), max_new_tokens=NEW_TOKENS, do_sample=False)
    assert output.tolist() == plain.tolist()
    assert cache.last.token_count == 0
    assert cache.last.reason == "lease_lost"
    assert cache.border.counts().failures == {"restore:LeaseLost": 1}


def test_a_lease_of_fewer_blocks_than_found(float_model: Any) -> None:
    client = DictClient()
    cache = TransformersCache(float_model, client)
    assert_same_output(float_model, cache, _ids(PROMPT))
    client.only.leased_at_most = 5

    assert_same_output(float_model, cache, _ids(PROMPT))

    assert cache.last.token_count == 80


@pytest.mark.parametrize("opens", [True, False])
def test_a_broken_kvtier_changes_nothing(
    float_model: Any, opens: bool, caplog: pytest.LogCaptureFixture
) -> None:
    cache = TransformersCache(float_model, BrokenClient(opens=opens))
    caplog.set_level(logging.WARNING, logger="kvtier.connector")
    plain = float_model.generate(_ids(PROMPT), max_new_tokens=NEW_TOKENS, do_sample=False)

    for _ in range(3):
        output = cache.generate(_ids(PROMPT), max_new_tokens=NEW_TOKENS, do_sample=False)
        assert output.tolist() == plain.tolist()

    counts = cache.border.counts()
    assert counts.failure_count == 6
    assert counts.misses == {"daemon_down": 3}
    assert len(caplog.records) == 1


def test_no_daemon_at_all(float_model: Any, tmp_path: Any) -> None:
    cache = TransformersCache(float_model, str(tmp_path / "nobody.sock"))
    plain = float_model.generate(_ids(PROMPT), max_new_tokens=NEW_TOKENS, do_sample=False)

    output = cache.generate(_ids(PROMPT), max_new_tokens=NEW_TOKENS, do_sample=False)

    assert output.tolist() == plain.tolist()
    assert cache.last.token_count == 0
    cache.close()


def test_models_that_differ_share_nothing() -> None:
    client = DictClient()
    first = tiny_llama(seed=1)
    assert_same_output(first, TransformersCache(first, client, model_id="m"), _ids(PROMPT))
    second = tiny_llama(seed=2)
    cache = TransformersCache(second, client, model_id="m")

    assert_same_output(second, cache, _ids(PROMPT))

    assert cache.last.token_count == 0
    one, two = client.specs[0].flat(), client.specs[-1].flat()
    assert {name for name in one if one[name] != two[name]} == {"weights"}


def test_weights_written_in_place_are_another_namespace() -> None:
    model = tiny_llama(seed=1)
    client = DictClient()
    cache = TransformersCache(model, client)
    assert_same_output(model, cache, _ids(PROMPT))
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.bias = None
        model.model.layers[0].self_attn.k_proj.weight[0, 0] += 1

    assert_same_output(model, cache, _ids(PROMPT))

    assert cache.last.token_count == 0
    assert len(client.spaces) == 2


def test_attention_implementations_share_nothing() -> None:
    client = DictClient()
    for implementation in ("eager", "sdpa"):
        model = tiny_llama(seed=1)
        model.set_attn_implementation(implementation)
        cache = TransformersCache(model, client)
        assert_same_output(model, cache, _ids(PROMPT))
        assert cache.last.token_count == 0
    assert len(client.spaces) == 2


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_beams": 2},
        {"num_return_sequences": 2, "do_sample": True},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_other_ways_to_generate_are_passed_by(float_model: Any, kwargs: dict[str, Any]) -> None:
    client = DictClient()
    cache = TransformersCache(float_model, client)
    assert_same_output(float_model, cache, _ids(PROMPT))
    kwargs = {"do_sample": False, "max_new_tokens": 4, **kwargs}
    before = client.only.leased_blocks
    torch.manual_seed(0)
    plain = float_model.generate(_ids(PROMPT), **kwargs)

    torch.manual_seed(0)
    output = cache.generate(_ids(PROMPT), **kwargs)

    assert output.tolist() == plain.tolist()
    assert client.only.leased_blocks == before
    assert cache.border.counts().miss_count == 2
    assert cache.border.counts().failure_count == 0


def test_padding_on_the_right_is_passed_by(float_model: Any) -> None:
    client = DictClient()
    cache = TransformersCache(float_model, client)
    mask = torch.ones(1, 150, dtype=torch.int64)
    mask[0, 100:] = 0

    assert cache.restore(_ids(PROMPT), mask).cache is None
    with torch.no_grad():
        whole = float_model(_ids(PROMPT), use_cache=True)
    assert cache.save(_ids(PROMPT), whole.past_key_values, mask) == 0
    assert not client.spaces
    assert cache.border.counts().failure_count == 0


def _sliding() -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    return MistralForCausalLM(
        MistralConfig(**sizes, **heads, sliding_window=32, eos_token_id=None)
    ).eval()


def _dynamic_rope() -> Any:
    model = tiny_llama()
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    return model


@pytest.mark.parametrize(
    ("make", "why"), [(_sliding, "other kinds"), (_dynamic_rope, "sequence's length")]
)
def test_models_it_cannot_serve(make: Any, why: str, caplog: pytest.LogCaptureFixture) -> None:
    model = make()
    client = DictClient()
    cache = TransformersCache(model, client)
    caplog.set_level(logging.WARNING, logger="kvtier.connector")
    for _ in range(2):
        output = cache.generate(_ids(PROMPT), max_new_tokens=4, do_sample=False)
    plain = model.generate(_ids(PROMPT), max_new_tokens=4, do_sample=False)
    assert output.tolist() == plain.tolist()
    assert not client.spaces
    assert len([r for r in caplog.records if why in r.message]) == 1


def test_another_cache_class_is_not_saved(float_model: Any) -> None:
    from transformers.cache_utils import StaticCache

    cache = TransformersCache(float_model, DictClient())
    static = StaticCache(config=float_model.config, max_cache_len=200)
    with torch.no_grad():
        float_model(_ids(PROMPT), **{cache_argument(): static})
    assert cache.save(_ids(PROMPT), static) == 0
    assert cache.border.counts().failure_count == 0


def test_fingerprint_sees_one_changed_bit() -> None:
    model = tiny_llama()
    first = hf_model.weights_fingerprint(model)
    assert first == hf_model.weights_fingerprint(tiny_llama())
    assert not hf_model.weights_changed(model)
    with torch.no_grad():
        weight = model.model.layers[1].mlp.up_proj.weight
        weight.view(torch.int32)[5, 7] ^= 1
    assert hf_model.weights_changed(model)
    assert hf_model.weights_fingerprint(model) != first
