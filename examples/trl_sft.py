"""Train GOAT experts with TRL's SFTTrainer, in one process.

    python examples/trl_sft.py --model google/gemma-3-270m --data train.jsonl --output runs/trl

The data has a format that TRL knows, such as lines with "prompt" and "completion", or with "messages".
``--load_in_4bit`` loads the base in 4 bits with bitsandbytes; the experts start from what its 4-bit weights stand for.
"""

import argparse
import sys
from collections.abc import Sequence

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from goat_ds import GoatConfig


def main(arguments: Sequence[str]) -> None:
    """Train as the command line says, and save the adapter and the tokenizer."""
    args = parser().parse_args(arguments)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.bfloat16, quantization_config=nf4 if args.load_in_4bit else None
    )
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            output_dir=args.output,
            max_steps=args.max_steps,
            max_length=args.max_length,
            learning_rate=args.learning_rate,
            per_device_train_batch_size=args.batch_size,
            gradient_accumulation_steps=args.grad_accum_steps,
            # The balance loss reaches the routers with either kind of checkpointing.
            gradient_checkpointing=args.gradient_checkpointing,
            # transformers offers this on a GPU only. On a CPU the base is in bf16 and the experts in fp32 all the same.
            bf16=torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=load_dataset("json", data_files=args.data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        peft_config=GoatConfig(r=args.r, num_experts=args.num_experts, top_k=args.top_k, task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model(args.output)


def parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--model", required=True, help="folder or hub name of the base")
    made.add_argument("--data", nargs="+", required=True, help="JSON Lines files")
    made.add_argument("--output", required=True, help="folder of the adapter")
    made.add_argument("--load_in_4bit", action="store_true", help="load the base in 4 bits")
    made.add_argument("--r", type=int, default=32, help="total rank of a layer (%(default)s)")
    made.add_argument("--num_experts", type=int, default=8, help="experts of a layer (%(default)s)")
    made.add_argument("--top_k", type=int, default=2, help="experts a token uses (%(default)s)")
    made.add_argument("--learning_rate", type=float, default=1e-4, help="peak learning rate (%(default)s)")
    made.add_argument("--max_steps", type=int, default=100, help="steps of the run (%(default)s)")
    made.add_argument("--max_length", type=int, default=1024, help="tokens of the longest record (%(default)s)")
    made.add_argument("--batch_size", type=int, default=1, help="records in one forward (%(default)s)")
    made.add_argument("--grad_accum_steps", type=int, default=8, help="forwards in one step (%(default)s)")
    made.add_argument("--gradient_checkpointing", action="store_true", help="recompute activations in backward")
    return made


if __name__ == "__main__":
    main(sys.argv[1:])
