"""Make the embedded base and its data: ``python -m tools.make_demo.pretrain --output DIR``.

    the world's text -> tokenizer.model -> rows of tokens -> a plain training loop -> DIR/base, DIR/data

Takes about nine minutes on one core. Nothing is downloaded and nothing but the seed goes in; the data files are the
same bytes everywhere, the weights only on the same kind of machine with the same torch. It prints the loss on the way,
and at the end how much of the world the base knows: the share of facts whose statement it completes.

Shape letters: N rows of a step, T tokens of a row, V pieces of the vocabulary.
"""

import argparse
import io
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    get_cosine_schedule_with_warmup,
)

from tools.make_demo.wording import REQUESTS, Task
from tools.make_demo.world import SEED, Fact, cloze, make_facts, write_documents, write_records

VOCAB_SIZE = 1024

MAX_LENGTH = 2048
"""Tokens of the longest row; the documents in it are far shorter, as are those the base has read."""

UNK, BOS, EOS, PAD = "<unk>", "<s>", "</s>", "<pad>"
USER, ASSISTANT = "<|user|>", "<|assistant|>"

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    # The space keeps the first word of an answer the same piece as inside a sentence, where the base knows it.
    f"{ASSISTANT}{{% generation %}} {{{{ message['content'] }}}}{{{{ eos_token }}}}{{% endgeneration %}}"
    "{% else %}"
    f"{USER} {{{{ message['content'] }}}}"
    "{% endif %}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{ASSISTANT}{{% endif %}}"
)

NUM_STEPS = 1800
NUM_ROWS, ROW_LENGTH = 16, 128
LEARNING_RATE = 4e-3
WEIGHT_DECAY = 0.1


def train_tokenizer(facts: list[Fact], folder: Path, *, seed: int) -> PreTrainedTokenizerBase:
    """Train a SentencePiece tokenizer on the world's text, write its files into ``folder``, and load them."""
    rng = random.Random(f"tokenizer {seed}")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(write_documents(facts * 4, rng) + _wordings()).split("\n")),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        character_coverage=1.0,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        user_defined_symbols=[USER, ASSISTANT],
        num_threads=1,
        minloglevel=2,
    )
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": UNK,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "extra_special_tokens": [USER, ASSISTANT],
        "model_max_length": MAX_LENGTH,
        "chat_template": CHAT_TEMPLATE,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def build_model(tokenizer: PreTrainedTokenizerBase, *, seed: int) -> LlamaForCausalLM:
    """Return an untrained LLaMA of the demo's size, in fp32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=3,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def make_rows(tokenizer: PreTrainedTokenizerBase, facts: list[Fact], *, seed: int) -> Iterator[Tensor]:
    """Yield rows ``[T]`` of token ids without end: documents between BOS and EOS, one after the other."""
    rng = random.Random(f"documents {seed}")
    tokens: list[int] = []
    while True:
        for ids in tokenizer(write_documents(facts, rng), add_special_tokens=False)["input_ids"]:
            tokens += [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
        while len(tokens) >= ROW_LENGTH:
            yield torch.tensor(tokens[:ROW_LENGTH])
            tokens = tokens[ROW_LENGTH:]


def train(model: LlamaForCausalLM, rows: Iterator[Tensor], *, num_steps: int) -> None:
    """Train the model in place, on every token of every row."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=50, num_training_steps=num_steps)
    started = time.monotonic()
    model.train()
    for step in range(1, num_steps + 1):
        ids_NT = torch.stack([next(rows) for _ in range(NUM_ROWS)])
        loss = model(input_ids=ids_NT, labels=ids_NT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step:5d}  loss {loss.item():.4f}  {time.monotonic() - started:.0f} s", flush=True)


@torch.inference_mode()
def knows(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, fact: Fact) -> bool:
    """Tell whether the model completes the beginning of a statement of the fact with its answer."""
    prompt_T = [tokenizer.bos_token_id, *tokenizer(cloze(fact), add_special_tokens=False)["input_ids"]]
    answer_T = tokenizer(fact.answer, add_special_tokens=False)["input_ids"]
    logits_TV = model(torch.tensor([prompt_T + answer_T])).logits[0]
    return logits_TV[len(prompt_T) - 1 : -1].argmax(-1).tolist() == answer_T


def cloze_accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, facts: list[Fact]) -> float:
    """Return the share of the facts that the model knows."""
    model.eval()
    return sum(knows(model, tokenizer, fact) for fact in facts) / len(facts)


def save_model(model: LlamaForCausalLM, folder: Path) -> None:
    """Write the weights in bf16, which is what the base is loaded and judged in."""
    ids = {name: getattr(model.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids, do_sample=False, max_new_tokens=16)
    model.bfloat16().save_pretrained(folder)


def pretrain(output: Path, *, seed: int = SEED, num_steps: int = NUM_STEPS) -> None:
    """Write ``base/`` and ``data/`` into ``output``."""
    # One thread adds in one order, so that two runs agree.
    torch.set_num_threads(1)
    facts = make_facts(seed)
    write_records(output / "data", seed)
    tokenizer = train_tokenizer(facts, output / "base", seed=seed)
    model = build_model(tokenizer, seed=seed)
    train(model, make_rows(tokenizer, facts, seed=seed), num_steps=num_steps)
    save_model(model, output / "base")
    for task in Task:
        share = cloze_accuracy(model, tokenizer, [fact for fact in facts if fact.task is task])
        print(f"knows {share:6.1%} of {task}")


def _wordings() -> list[str]:
    """Return the instructions without subjects: their words become pieces, though the base never reads them."""
    return [request.instruction.format(s="") for requests in REQUESTS.values() for request in requests]


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.make_demo.pretrain", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder that receives base/ and data/")
    parser.add_argument("--num_steps", type=int, default=NUM_STEPS, help="fewer to try the script out")
    arguments = parser.parse_args()
    pretrain(arguments.output, num_steps=arguments.num_steps)


if __name__ == "__main__":
    main()
