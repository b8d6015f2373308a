"""One serving engine of `kvtier demo`: a process that generates, told what to do line by line.

    python -m kvtier.cli.demo_engine make DIR [MODEL]     makes or measures a model, says its sizes
    python -m kvtier.cli.demo_engine serve MODEL SOCKET   serves requests until its input ends

Input and output are JSON, a line each. Every request is answered twice: with kvtier, then by plain
`generate()` without a cache, and the two are compared.

Does not: know the story of the demo, or start anything.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from kvtier.units import align_up

THREADS_MAX = 8  # of one engine; fixed, so that equal requests compute equally
PREFILL_S = 1.2  # computing the shared prompt shall take a second, with some margin
PROBE_TOKENS = 512
LOGITS_TOLERANCE = 1e-3
# (hidden size, layers): the first whose prefill is slow enough here is taken.
LADDER = ((512, 8), (768, 8), (1024, 8), (1024, 16), (2048, 16))
PROMPT_TOKENS = (2048, 3072, 4096)
OWN_PROMPT_TOKENS = (256, 512, 1024, *PROMPT_TOKENS)
DEADLINE_S = 5.0  # of a lookup: patient enough to attach to a daemon that was just started
CONVERSATION_TOKENS = 512  # room beside the shared prompt
VOCABULARY = 4096


def main(arguments: list[str]) -> None:
    """Runs one of the two ways; see the module."""
    import torch
    import transformers

    engine: Any = transformers
    engine.utils.logging.disable_progress_bar()

    torch.set_num_threads(min(len(os.sched_getaffinity(0)), THREADS_MAX))
    torch.set_grad_enabled(False)
    if arguments[0] == "make":
        _say(make(Path(arguments[1]), arguments[2] if len(arguments) > 2 else None))
    else:
        serve(arguments[1], arguments[2])


def make(directory: Path, given: str | None) -> dict[str, Any]:
    """A model whose prefill of the prompt takes a second here, saved below `directory`."""
    if given:
        model, path = load(given), given
        room = getattr(model.config.get_text_config(), "max_position_embeddings", 4096)
        most = max(room - CONVERSATION_TOKENS, OWN_PROMPT_TOKENS[0])
        prompts = [count for count in OWN_PROMPT_TOKENS if count <= most]
        tokens, seconds = _enough(model, prompts)
    else:
        model, tokens, seconds = _raised()
        path = str(directory / "model")
        model.save_pretrained(path)
    config = model.config.get_text_config()
    cache = model(_ids(model, 16, seed=0), use_cache=True).past_key_values
    one_token = [part[0, :, 0] for layer in cache.layers for part in (layer.keys, layer.values)]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "path": path,
        "prompt_tokens": tokens,
        "prefill_s": seconds,
        "kv_bytes_per_token": sum(part.nbytes for part in one_token),
        "vocabulary": config.vocab_size,
        "description": f"{type(model).__name__}, {parameters / 1e6:,.0f} M parameters",
    }


def load(path: str) -> Any:
    """The model in float32, in which equal computations can be told from nearly equal ones."""
    import torch
    import transformers

    engine: Any = transformers
    model = engine.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, local_files_only=True
    )
    return model.eval()


def serve(path: str, socket: str) -> None:
    """Answers requests until the input ends: `tokens`, `new_tokens` -> see `answer`."""
    from kvtier.connectors import hf_model
    from kvtier.connectors.transformers import TransformersCache

    model = load(path)
    model(_ids(model, 64, seed=0))  # the first forward pass of a process is slower
    cache = TransformersCache(model, socket, model_id="kvtier-demo", deadline_s=DEADLINE_S)
    hf_model.weights_fingerprint(model)  # once per model, as an engine does while it loads
    _say({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        _say(answer(model, cache, request["tokens"], request["new_tokens"]))
    cache.close()


def answer(model: Any, cache: Any, tokens: list[int], new_tokens: int) -> dict[str, Any]:
    """One request with and without kvtier, and whether they are the same."""
    import torch

    ids = torch.tensor([tokens])
    started = time.monotonic()
    ours, ttft_ms = _generate(cache.generate, ids, new_tokens)
    whole_ms = (time.monotonic() - started) * 1e3
    theirs, baseline_ms = _generate(model.generate, ids, new_tokens)
    pairs = list(zip(ours.logits, theirs.logits, strict=True))
    close = all(
        torch.allclose(one, other, atol=LOGITS_TOLERANCE, rtol=LOGITS_TOLERANCE)
        for one, other in pairs
    )
    counts = cache.border.counts()
    return {
        "prompt_tokens": len(tokens),
        "found_tokens": cache.last.token_count,
        "tier": cache.last.tier,
        "ttft_ms": ttft_ms,
        "ttft_baseline_ms": baseline_ms,
        "whole_ms": whole_ms,
        "identical": bool(ours.sequences.equal(theirs.sequences) and close),
        "logits_difference_max": max(float((one - other).abs().max()) for one, other in pairs),
        "answer": theirs.sequences[0, len(tokens) :].tolist(),
        "failures": counts.failures,
        "saved_blocks": counts.saved_blocks,
    }


class FirstToken:
    """A streamer that notes when the first generated token came: its second `put`."""

    def __init__(self) -> None:
        self.puts_s: list[float] = []

    def put(self, value: Any) -> None:
        del value
        self.puts_s.append(time.monotonic())

    def end(self) -> None:
        """There is nothing to flush."""


def _generate(generate: Any, ids: Any, new_tokens: int) -> tuple[Any, float]:
    """The output and the milliseconds to its first token."""
    streamer, started = FirstToken(), time.monotonic()
    output = generate(
        ids,
        attention_mask=ids.new_ones(ids.shape),
        max_new_tokens=new_tokens,
        do_sample=False,
        streamer=streamer,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return output, (streamer.puts_s[1] - started) * 1e3


def _raised() -> tuple[Any, int, float]:
    """The first model of the ladder that is slow enough, and the prompt with which it is."""
    from kvtier.testing.models import tiny_llama

    for hidden, layers in LADDER:
        model = tiny_llama(
            layers=layers,
            hidden=hidden,
            heads=hidden // 64,
            kv_heads=hidden // 128,
            intermediate=align_up(hidden * 8 // 3, 64),
            vocabulary=VOCABULARY,
            positions_max=8192,
        )
        tokens, seconds = _enough(model, PROMPT_TOKENS)
        if seconds >= PREFILL_S:
            break
    return model, tokens, seconds


def _enough(model: Any, prompts: Any) -> tuple[int, float]:
    """The shortest of these prompts with a prefill slow enough (else the longest), and seconds.

    Estimated from a shorter prompt: attention makes the truth slower, never faster.
    """
    model(_ids(model, 64, seed=0))
    started = time.monotonic()
    model(_ids(model, PROBE_TOKENS, seed=0), logits_to_keep=1)
    per_token_s = (time.monotonic() - started) / PROBE_TOKENS
    tokens = next((count for count in prompts if count * per_token_s >= PREFILL_S), prompts[-1])
    return tokens, tokens * per_token_s


def _ids(model: Any, count: int, *, seed: int) -> Any:
    import torch

    from kvtier.testing.models import random_tokens

    vocabulary = model.config.get_text_config().vocab_size
    return torch.tensor([random_tokens(count, seed=seed, vocabulary=vocabulary)])


def _say(record: dict[str, Any]) -> None:
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
