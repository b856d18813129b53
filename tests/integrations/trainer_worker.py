"""One of two ranks under the Trainer: `torchrun -m tests.integrations.trainer_worker FOLDER`; rank 0 writes what they found.

accelerate takes `fsdp` for DDP on a CPU. `on_cpu` tells its state that this is FSDP, as it tells itself where there are GPUs; all else is
accelerate's and Trainer's own code, on gloo. FSDP2's gathered tensors are waited for there: on a GPU the copy to the CPU does that.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from tests.integrations.trainer_subject import METHODS, RATE, Rows, built, latent, llama, trainer
from transformers import TrainingArguments

import stepwell as sw
from stepwell.integrations.transformers import attaching_trainer

ROWS = 44  # the last step of an epoch has one micro-batch
KINDS = ("FULL_STATE_DICT", "SHARDED_STATE_DICT")


def on_cpu():
    """Have accelerate shard on the CPU where it is asked to."""
    begin = AcceleratorState.__init__

    def told(self, *args, fsdp_plugin=None, **options):
        begin(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
        if self.__dict__.get("fsdp_plugin") is not None:
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = told


def sharded(kind=KINDS[0]):
    """Return the arguments of a Trainer that shards by layer."""
    return {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "state_dict_type": kind}}


def attaching(folder, method, *, skip=("lm_head",), rows=ROWS, **options):
    """Return a Trainer of 2 epochs in float64, of 4 rows at once over all ranks, that attaches a method itself."""
    AcceleratorState._reset_state(True)  # one process trains several times here, with and without shards
    settings = {
        "per_device_train_batch_size": 4 // int(os.environ.get("WORLD_SIZE", "1")), "gradient_accumulation_steps": 2, "max_grad_norm": 0.5,
        "num_train_epochs": 2, "learning_rate": RATE, "train_sampling_strategy": "sequential", "logging_steps": 1, "save_strategy": "no",
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 1, **options,
    }  # fmt: skip
    made = attaching_trainer(lambda model, optimizer: sw.attach(model, METHODS[method](), optimizer, skip=skip))
    args = TrainingArguments(output_dir=str(folder), **settings)
    return made(llama().double(), args, train_dataset=Rows(rows), eval_dataset=Rows(8, seed=1))


def trained(made, **options):
    """Train to the end; return the latent weights of the last step, whole."""
    found = {}
    schedule = made.create_scheduler

    def begun(*args, **rest):
        made_schedule = schedule(*args, **rest)
        end = made.follow.on_train_end

        def held(*args, **rest):
            found.update(latent(made.follow.run, made.model))
            end(*args, **rest)

        made.follow.on_train_end = held
        return made_schedule

    made.create_scheduler = begun
    made.train(**options)
    return found


def resumed(folder, method, **options):
    """Train twice, the second time from the middle of the first; return how far apart the two end."""
    settings = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8, **options}
    whole = trained(attaching(folder, method, **settings))
    again = trained(attaching(folder, method, **settings), resume_from_checkpoint=str(folder / "checkpoint-4"))
    return max(float((whole[name] - again[name]).abs().max()) for name in whole)


def best(folder):
    """Look after every step, at a head that is on the grid too, and load the best step at the end; return what the model loses then."""
    settings = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    settings |= {"metric_for_best_model": "eval_loss", "greater_is_better": True, **sharded()}
    made = attaching(folder, "lotion", skip=(), max_steps=5, **settings)
    made.train()
    losses = {line["step"]: line["eval_loss"] for line in made.state.log_history if "eval_loss" in line}
    return {"losses": losses, "best": made.state.best_global_step, "end": made.evaluate()["eval_loss"], "grid": len(made.follow.encoded)}


def given(folder):
    """Train in copies with an optimizer that has a run already, every rank dividing by its own labels; return the loss terms counted."""
    AcceleratorState._reset_state(True)
    parts = built(METHODS["lotion"]())
    made, _ = trainer(folder, parts, max_steps=2, per_device_train_batch_size=2, average_tokens_across_devices=False)
    made.train()
    return parts[2].loss_terms


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    on_cpu()
    weights = {f"copies {method}": trained(attaching(folder / f"copies-{method}", method)) for method in ("learned", "lotion")}
    numbers = {"terms": given(folder / "given"), "resumed copies": resumed(folder / "copies", "learned")}
    for method in ("learned", "lotion"):  # shards come last: asking for them once sets the environment that accelerate reads
        weights[f"shards {method}"] = trained(attaching(folder / f"shards-{method}", method, **sharded()))
    numbers |= {f"resumed {kind}": resumed(folder / kind, "learned", **sharded(kind)) for kind in KINDS}
    numbers["best"] = best(folder / "best")
    if os.environ["RANK"] == "0":
        save_file(
            {f"{case}/{name}": tensor for case, found in weights.items() for name, tensor in found.items()}, folder / "found.safetensors"
        )
        (folder / "numbers.json").write_text(json.dumps(numbers))
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
