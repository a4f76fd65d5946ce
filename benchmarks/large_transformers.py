"""Traces transformers of full size, and proves a narrow copy of each.

    python benchmarks/large_transformers.py gpt2|llama-7b

GPT-2 is traced with its weights, and Llama-7B on the meta device, where weights need no memory. Their float64 copies
would not fit beside each other, so the proof is made on a narrow copy of the configuration: the same layers in the same
order, of small widths and depth two. That the large model has the same structure is checked by its count of free units.
"""

import argparse
import resource
import time
from collections.abc import Mapping
from typing import Any

import torch
from coverage_transformers import cases

import isthmus

# Free units: a stream, and for each layer the hidden units, the heads and the value (and key) units of every head.
EXPECTED = {
    "gpt2": 768 + 12 * (3072 + 12 + 12 * 64 + 12 * 64),
    "llama-7b": 4096 + 32 * (11008 + 32 + 32 * 128),
}
NARROW: Mapping[str, Mapping[str, Any]] = {
    "gpt2": {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 16, "vocab_size": 50},
    "llama-7b": {
        "hidden_size": 64,
        "intermediate_size": 88,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 50,
    },
}


def main() -> None:
    """Prints seconds, memory, free units and the error of the proof."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=EXPECTED)
    name = parser.parse_args().model
    next(cases())  # defines what a torchvision without compiled operators lacks
    import transformers

    config = transformers.GPT2Config if name == "gpt2" else transformers.LlamaConfig
    model = transformers.GPT2LMHeadModel if name == "gpt2" else transformers.LlamaForCausalLM
    with torch.device("cpu" if name == "gpt2" else "meta"):
        large = model(config()).eval()
        ids = torch.zeros(1, 4, dtype=torch.long)
    wall, processor = time.perf_counter(), time.process_time()
    symmetry = isthmus.trace(large, kwargs={"input_ids": ids, "use_cache": False})
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{name}: {wall:.0f} s ({processor:.0f} s of processor time), {peak:.2f} GB at most")
    print(f"{len(symmetry)} spaces, {symmetry.free_units:,} free units, expected {EXPECTED[name]:,}")
    assert symmetry.free_units == EXPECTED[name]
    narrow = model(config(**NARROW[name])).eval()
    kwargs = {"input_ids": torch.randint(3, 50, (2, 5)), "use_cache": False}
    proof = isthmus.verify(narrow, isthmus.trace(narrow, kwargs=kwargs), kwargs=kwargs)
    print(
        f"narrow copy: error {proof.max_error:.1e}, weakest control {proof.weakest_control:.1e}, {proof.trials} trials"
    )


if __name__ == "__main__":
    main()
