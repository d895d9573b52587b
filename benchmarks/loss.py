"""What does the loss cost where 30 % of the tokens are labels, against logits at all positions?

    python benchmarks/loss.py [--tokens 512 1024] [--repetitions 5]

The loss is the output layer and the cross-entropy, forward and backward to the hidden states: Gemma-3-270M without its
decoder layers, in bf16, with random weights, its output layer frozen and tied to the embedding. The rival is what
transformers does with ``labels=``. Both take turns on one thread. Memory is the peak of the bytes of all tensors that
the two passes make, counted by their storages; workspace inside an operator is none.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import results
import torch
from live_tensors import LiveTensors
from results import Row
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from goat_ds.data import MicroBatch, label_loss_sum
from goat_ds.data.tokens import IGNORE

MIB = 2**20
LABEL_SHARE = 0.3


def main() -> None:
    """Measure time and memory for each number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="*", default=[512, 1024])
    parser.add_argument("--vocabulary", type=int, default=262144)
    parser.add_argument("--repetitions", type=int, default=5)
    results.add_flag(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = output_layer(arguments.vocabulary)
    rows = [
        row
        for num_tokens in arguments.tokens
        for row in measured(model, row_of(num_tokens, arguments.vocabulary), arguments.repetitions)
    ]
    results.publish(rows, parser=parser, arguments=arguments)


def output_layer(vocabulary: int) -> Any:
    """Return Gemma-3-270M without decoder layers, frozen; the embedding's output takes the gradient."""
    torch.manual_seed(0)
    layer_types = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(vocab_size=vocabulary, hidden_size=640, num_hidden_layers=2, layer_types=layer_types)
    model = Gemma3ForCausalLM(config).to(torch.bfloat16).requires_grad_(False)
    model.model.layers = torch.nn.ModuleList()
    model.enable_input_require_grads()
    return model.train()


def row_of(num_tokens: int, vocabulary: int) -> MicroBatch:
    """Draw a row of one document, with its last tokens as labels."""
    input_ids = torch.randint(vocabulary, (1, num_tokens))
    labels = torch.cat([input_ids[:, 1:], torch.tensor([[IGNORE]])], dim=1)
    labels[:, : round((1 - LABEL_SHARE) * num_tokens)] = IGNORE
    return MicroBatch(
        input_ids=input_ids,
        position_ids=torch.arange(num_tokens)[None],
        labels=labels,
        label_index=(labels[0] != IGNORE).nonzero()[:, 0],
        num_tokens=num_tokens,
        is_filler=False,
    )


def measured(model: Any, batch: MicroBatch, repetitions: int) -> list[Row]:
    """Measure one row of tokens."""
    # transformers shifts labels itself.
    unshifted = torch.cat([torch.tensor([[IGNORE]]), batch.labels[:, :-1]], dim=1)

    def ours() -> Tensor:
        return label_loss_sum(model, batch)

    def rival() -> Tensor:
        loss: Tensor = model(input_ids=batch.input_ids, labels=unshifted, use_cache=False).loss
        return loss

    torch.testing.assert_close(ours() / len(batch.label_index), rival())
    pairs = [(seconds_of(ours), seconds_of(rival)) for _ in range(repetitions)]
    question = f"of {batch.num_tokens} tokens with {LABEL_SHARE:.0%} labels, vocabulary {model.config.vocab_size}"
    mine, others = zip(*pairs, strict=True)
    return [
        Row(question=f"loss {question}, against full logits", ours=mine, rival=others, unit="s", at_most=0.60),
        Row(
            question=f"peak memory of the loss {question}, against full logits",
            ours=(peak_of(ours) / MIB,),
            rival=(peak_of(rival) / MIB,),
            unit="MiB",
            at_most=0.45,
        ),
    ]


def seconds_of(loss: Callable[[], Tensor]) -> float:
    """Time forward and backward."""
    began = time.process_time()  # with one thread it is the time worked, whatever else the machine does
    loss().backward()
    return time.process_time() - began


def peak_of(loss: Callable[[], Tensor]) -> int:
    """Return the bytes of all tensors of forward and backward at the worst moment."""
    with LiveTensors() as live:
        loss().backward()
    return live.peak


if __name__ == "__main__":
    main()
