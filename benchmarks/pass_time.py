"""How long the rewriting pass takes by itself, over decoders of 2 to 64 layers: it has to grow as they do.

    python benchmarks/pass_time.py [--quick] [--impl REGEX] [--output DIR] [--list]

The graphs are Dynamo's, of a Hugging Face Llama with attention written out; no code is generated. Processor time, the
median of three passes over graphs of their own.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from command import options_of, parser
from device import describe_device
from implementations import infuse_backend, optional
from report import print_case
from rows import Row, append, new_run_id, results_file

LAYERS = (2, 4, 8, 16, 32, 64)
QUICK = (1, 2)
REPEATS = 3


def graph_of(num_layers: int) -> tuple[torch.fx.GraphModule, float]:
    """A rewritten graph, and how many milliseconds the rewrite took."""
    transformers = optional("transformers")
    rewriting = optional("infuse.backend").inductor_config(None, None)["pre_grad_custom_pass"]
    found: list[tuple[torch.fx.GraphModule, float]] = []

    def backend(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        begin = time.process_time()
        rewriting(gm.graph)
        found.append((gm, (time.process_time() - begin) * 1e3))
        return gm.forward

    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        attn_implementation="eager",
    )
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(transformers.LlamaModel(config).eval(), backend=backend)(torch.randint(128, (2, 8)))
    return found[0]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser(__doc__ or "").parse_args(argv)
    options = options_of(arguments)
    device = describe_device("cpu")
    layers = QUICK if options.quick else LAYERS
    if arguments.list or not re.search(options.impl, "infuse"):
        print(*(f"{number} layers: infuse" for number in layers), sep="\n")
        return 0
    infuse_backend()
    graph_of(1)
    run_id, rows = new_run_id(), []
    for number in layers:
        graphs, times = zip(*(graph_of(number) for _ in range(REPEATS)), strict=True)
        median = statistics.median(times)
        note = f"{median / number:.2f} ms a layer, {len(graphs[0].graph.nodes)} nodes left"
        spread = (round(median, 2), round(min(times), 2), round(max(times), 2))
        machine = (device.name, device.torch_version, device.commit)
        rows.append(Row(run_id, f"{number} layers", "infuse", *spread, 0, 0, None, 0.0, None, *machine, note))
    print_case(rows)
    if options.output is not None:
        append(results_file(options.output, device.name, "pass_time"), rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
