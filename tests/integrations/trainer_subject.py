"""A Llama of some thousand weights, its data, and a Trainer around it, for the tests of the callback."""

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import stepwell as sw
from stepwell.integrations.transformers import trainer_callback
from stepwell.schedules import sigmoid
from stepwell.train.ranks import whole

VOCABULARY, LENGTH, RATE = 32, 16, 3e-3
Q = sw.int3(block=16)
METHODS = {
    "ste": lambda: sw.ste(Q),
    "lotion": lambda: sw.lotion(Q),
    "ste + lotion": lambda: sw.lotion(Q, forward="nearest"),
    "learned": lambda: sw.learned(sw.parq(Q, slope=sigmoid(1, 0, steps=8))),
}


class Rows(Dataset):
    """Random sequences; the last quarter of every third is not to be learned."""

    def __init__(self, count, *, seed=0):
        self.tokens = torch.randint(VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
        self.labels = self.tokens.clone()
        self.labels[::3, LENGTH * 3 // 4 :] = -100

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, k):
        return {"input_ids": self.tokens[k], "labels": self.labels[k]}


def llama(seed=0):
    """Return 2 layers of width 32."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
            vocab_size=VOCABULARY, max_position_embeddings=LENGTH, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )
    )  # fmt: skip


def built(method, *, seed=0):
    """Return a model, its optimizer and the run of a method on it."""
    model = llama(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    return model, optimizer, sw.attach(model, method, optimizer, skip=["lm_head"])


def latent(run, model):
    """Return what the run trains, whole where it is in shards."""
    with run.latent():
        return {name: whole(parameter.detach()).clone() for name, parameter in model.named_parameters()}


def trainer(folder, parts, *, rows=48, count=True, **options):
    """Return a Trainer of 2 epochs of 6 steps of 2 micro-batches of 4 rows, clipped, in the data's order; and our callback."""
    model, optimizer, run = parts
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    settings = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "num_train_epochs": 2,
        "train_sampling_strategy": "sequential", "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "seed": 1, **options,
    }  # fmt: skip
    follow = trainer_callback(run, count=count)
    made = Trainer(
        model,
        TrainingArguments(output_dir=str(folder), **settings),
        train_dataset=Rows(rows),
        eval_dataset=Rows(8, seed=1),
        optimizers=(optimizer, schedule),
        callbacks=[follow],
    )
    return made, follow
