"""A Hugging Face checkpoint directory to INT4 with the Trainer: train on the grid, then save weights that lie on it, and their codes.

python examples/hf_to_int4.py [MODEL_DIRECTORY TEXT_FILE OUT_DIRECTORY]    # without arguments a tiny model and text of its own
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast, Trainer, TrainingArguments

import stepwell as sw
from stepwell.integrations.transformers import trainer_callback


def tiny(folder: str, text: Path) -> None:
    """Make what a user already has: a model and its tokenizer in a folder, and a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    text.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel()
    made.train([str(text)], trainers.BpeTrainer(vocab_size=300, show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 300}
    AutoModelForCausalLM.from_config(LlamaConfig(**shape)).save_pretrained(folder)


torch.manual_seed(0)
source, text, out = sys.argv[1:] if len(sys.argv) == 4 else ("tiny", "text.txt", "tiny-int4")
if len(sys.argv) < 4:
    tiny(source, Path(text))

model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)  # float32 weights; bf16=True below computes in bf16
tokens = torch.tensor(AutoTokenizer.from_pretrained(source)(Path(text).read_text())["input_ids"])
length = 64
rows = tokens[: len(tokens) // length * length].view(-1, length)
data = [{"input_ids": row, "labels": row} for row in rows]

options = {"bf16": True, "use_cpu": not torch.cuda.is_available(), "report_to": [], "disable_tqdm": True, "logging_steps": 5}
args = TrainingArguments(out, max_steps=20, per_device_train_batch_size=4, **options)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, total_iters=args.max_steps)
q = sw.int4(block=32)
run = sw.attach(model, sw.lotion(q, forward="nearest"), optimizer, skip=["lm_head"])  # loss terms: counted by the callback
follow = trainer_callback(run)
Trainer(model, args, train_dataset=data, optimizers=(optimizer, schedule), callbacks=[follow]).train()

model.save_pretrained(out)  # grid weights, in a folder that loads anywhere; the codes are in its encoded.safetensors
again = dict(AutoModelForCausalLM.from_pretrained(out).named_parameters())
assert all(torch.equal(one.decode(), again[name]) for name, one in sw.load(f"{out}/encoded.safetensors").items())
print(f"{len(follow.encoded)} weights of {source} are on {q} in {out}")
