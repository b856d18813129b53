"""The Hugging Face Trainer itself, on the CPU, around an attached run: the same steps as a loop by hand, and what its files hold."""

import json
import sys
import warnings

import pytest
import torch

import stepwell as sw
from stepwell.integrations.transformers import attaching_trainer, trainer_callback

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from tests.integrations.trainer_subject import LENGTH, METHODS, RATE, Q, Rows, built, latent, llama, trainer


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def by_hand(parts, rows, *, bf16=False):
    """The loop that the Trainer of `trainer_subject` is told to run: 2 epochs, 2 micro-batches of 4 rows, clipped, a falling rate."""
    model, optimizer, run = parts
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    model.train()
    for _ in range(2):
        data = Rows(rows)
        for start in range(0, rows, 8):
            labels = data.labels[start : start + 8]
            terms = labels[:, 1:].ne(-100).sum()
            for k in range(start, min(start + 8, rows), 4):
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    loss = model(input_ids=data.tokens[k : k + 4], labels=data.labels[k : k + 4], num_items_in_batch=terms).loss
                loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            run.loss_terms = float(terms)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


@pytest.mark.parametrize(("method", "bf16"), [("learned", False), ("lotion", True)])
def test_trainer_takes_the_steps_of_a_loop_by_hand(tmp_path, method, bf16):
    """Accumulation, clipping, a schedule, an epoch whose last step has one micro-batch, padding that is not learned; bit for bit.

    Loss terms are those of every step, so that an equal penalty means that they were counted right.
    """
    theirs, ours = built(METHODS[method]()), built(METHODS[method]())
    made, follow = trainer(tmp_path, theirs, rows=44, bf16=bf16)
    held, ending = [], follow.on_train_end

    def remember(*args, **rest):
        held.append(latent(theirs[2], theirs[0]))
        ending(*args, **rest)

    follow.on_train_end = remember
    made.train()
    by_hand(ours, 44, bf16=bf16)
    assert same(held[0], latent(ours[2], ours[0]))
    assert follow.encoded.keys() == ours[2].finalize().keys()


def test_what_is_left_and_written_at_the_end_is_what_ships(tmp_path):
    model, optimizer, run = built(METHODS["learned"]())
    made, follow = trainer(tmp_path, (model, optimizer, run), max_steps=3)
    made.train()
    stored = sw.load(tmp_path / "encoded.safetensors")
    parameters = dict(model.named_parameters())
    for name, one in follow.encoded.items():
        assert torch.equal(one.decode(), parameters[name])
        assert torch.equal(one.codes, stored[name].codes)
        assert torch.equal(one.scales, stored[name].scales)
    with pytest.raises(RuntimeError, match="has ended"):
        run.health()


@pytest.mark.parametrize("method", ["learned", "lotion"])
def test_resumed_training_equals_uninterrupted(tmp_path, method):
    settings = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8}
    whole = built(METHODS[method]())
    made, follow = trainer(tmp_path, whole, **settings)
    made.train()
    again = built(METHODS[method](), seed=9)
    resumed, followed = trainer(tmp_path, again, **settings)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert not [one for one in told if "stepwell" in str(one.filename) or "outside the run" in str(one.message)]  # others may warn
    assert again[2].steps == 8
    assert same(dict(whole[0].named_parameters()), dict(again[0].named_parameters()))
    assert all(torch.equal(follow.encoded[name].scales, followed.encoded[name].scales) for name in follow.encoded)


@pytest.mark.parametrize(("method", "most"), [("learned", False), ("lotion", True)])
def test_best_model_is_the_one_that_was_evaluated(tmp_path, method, most):
    """Evaluation sees deployed weights; at the end the model holds exactly those of the step with the best loss, scales included."""
    parts = built(METHODS[method]())
    settings = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    made, follow = trainer(tmp_path, parts, max_steps=5, metric_for_best_model="eval_loss", greater_is_better=most, **settings)
    made.train()
    losses = {line["step"]: line["eval_loss"] for line in made.state.log_history if "eval_loss" in line}
    best = (max if most else min)(losses, key=losses.get)
    assert best != 5
    assert made.state.best_global_step == best
    stored = sw.load(tmp_path / f"checkpoint-{best}" / "encoded.safetensors")
    assert all(torch.equal(one.codes, stored[name].codes) for name, one in follow.encoded.items())
    parameters = dict(parts[0].named_parameters())
    assert all(torch.equal(parameters[name], one.decode()) for name, one in stored.items())
    assert made.evaluate()["eval_loss"] == pytest.approx(losses[best], abs=1e-6)


def test_checkpoint_holds_what_the_forward_pass_sees(tmp_path):
    """Grid weights under STE, latent ones under LOTION; the codes that would ship lie beside both."""
    from safetensors.torch import load_file

    for method in ("ste", "lotion"):
        parts = built(METHODS[method]())
        folder = tmp_path / method
        made, _ = trainer(folder, parts, max_steps=2, save_strategy="steps", save_steps=2)
        made.train()
        saved = load_file(folder / "checkpoint-2" / "model.safetensors")
        beside = sw.load(folder / "checkpoint-2" / "encoded.safetensors")
        name = "model.layers.0.mlp.up_proj.weight"
        assert torch.equal(saved[name], beside[name].decode()) == (method == "ste")
        assert torch.equal(Q(saved[name]), beside[name].decode())


def test_log_has_health_and_deployed_loss(tmp_path):
    parts = built(METHODS["lotion"]())
    made, _ = trainer(tmp_path, parts, max_steps=3, eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=3)
    seen = []
    evaluate = made.evaluate

    def looked(*args, **rest):
        seen.append({name: parameter.detach().clone() for name, parameter in parts[0].named_parameters()})
        return evaluate(*args, **rest)

    made.evaluate = looked
    made.train()
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(Q(seen[0][name]), seen[0][name])
    lines = [line for line in json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())["log_history"] if "loss" in line]
    assert [line["run_clipped"] for line in lines] == [0.0] * 3
    assert all(0 < line["run_distance"] < 0.5 for line in lines)
    assert all(0 <= line["run_flips"] < 1 for line in lines[1:])
    assert "run_flips" not in lines[0]  # it needs a second look


def test_labels_are_counted_where_the_model_is_not_told(tmp_path):
    """Trainer hands its own count to models that scale their loss by it; others get the mean over labels, padding left out."""
    parts = built(METHODS["lotion"]())
    made, _ = trainer(tmp_path, parts, max_steps=1)
    made.model_accepts_loss_kwargs = False
    made.train()
    assert parts[2].loss_terms == Rows(8).labels.ne(-100).sum() == 8 * LENGTH - 3 * LENGTH // 4


def test_count_can_be_left_to_the_caller(tmp_path):
    parts = built(METHODS["lotion"]())
    parts[2].loss_terms = 7
    made, _ = trainer(tmp_path, parts, max_steps=1, count=False)
    made.train()
    assert parts[2].loss_terms == 7


def attaching(folder, attach, *, base=None, **options):
    """A Trainer that makes its optimizer itself: the steps of `trainer`, at a constant rate."""
    from transformers import TrainingArguments

    settings = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "train_sampling_strategy": "sequential", "report_to": [],
                "per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True, "learning_rate": RATE, "seed": 1,
                "optim": "adamw_torch", "lr_scheduler_type": "constant", "max_steps": 6, "save_strategy": "steps",
                "save_steps": 3, **options}  # fmt: skip
    args = TrainingArguments(output_dir=str(folder), **settings)
    return attaching_trainer(attach, base=base)(llama(), args, train_dataset=Rows(48), eval_dataset=Rows(8, seed=1))


def begin(model, optimizer):
    return sw.attach(model, METHODS["learned"](), optimizer, skip=["lm_head"])


def test_trainer_that_attaches_itself_trains_and_resumes_like_one_that_is_given_a_run(tmp_path):
    made = attaching(tmp_path / "own", begin)
    made.train()
    model, optimizer, run = built(METHODS["learned"]())
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0  # the default of TrainingArguments
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1)
    theirs, follow = trainer(tmp_path / "given", (model, optimizer, run), max_steps=6)
    theirs.optimizer, theirs.lr_scheduler = optimizer, schedule
    theirs.train()
    assert same(dict(made.model.named_parameters()), dict(model.named_parameters()))
    again = attaching(tmp_path / "own", begin)
    again.train(resume_from_checkpoint=str(tmp_path / "own" / "checkpoint-3"))
    assert again.follow.run.steps == 6
    assert same(dict(made.model.named_parameters()), dict(again.model.named_parameters()))
    assert all(torch.equal(one.scales, follow.encoded[name].scales) for name, one in again.follow.encoded.items())


def test_run_on_another_optimizer_than_the_trainers_is_refused_before_training(tmp_path):
    from transformers import Trainer, TrainingArguments

    model, _, run = built(METHODS["ste"]())
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True)
    with pytest.raises(RuntimeError, match=r"optimizer of its own.*`optimizers=\(optimizer, scheduler\)`.*`attaching_trainer"):
        Trainer(model, args, train_dataset=Rows(8), callbacks=[trainer_callback(run)]).train()


@pytest.mark.parametrize("finds", [True, False], ids=["auto_find_batch_size", "train again"])
def test_training_that_broke_off_begins_anew_on_its_latent_weights(tmp_path, finds):
    from transformers import Trainer

    class Failing(Trainer):
        left = None

        def training_step(self, *args, **kwargs):
            if self.state.global_step == 2 and self.left is None:
                self.left = latent(self.follow.run, self.model)
                raise RuntimeError("CUDA out of memory. Tried to allocate more.")
            return super().training_step(*args, **kwargs)

    begun = []

    def attach(model, optimizer):
        begun.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
        return begin(model, optimizer)

    made = attaching(tmp_path, attach, base=Failing, save_strategy="no", auto_find_batch_size=finds)
    if not finds:
        with pytest.raises(RuntimeError, match="out of memory"):
            made.train()
    made.train()
    assert len(begun) == 2
    assert made.follow.run.steps == 6  # its schedules begin with the Trainer's
    assert all(torch.equal(begun[1][name], made.left[name]) for name in begun[1])
    assert not made.model._forward_pre_hooks


def test_attach_that_returns_no_run_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"`attach` must return the run .* got NoneType"):
        attaching(tmp_path, lambda model, optimizer: None).train()


def test_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ModuleNotFoundError, match=r"accelerate.*stepwell\[hf\]"):
        trainer_callback(built(METHODS["ste"]())[2])
    with pytest.raises(ModuleNotFoundError, match=r"accelerate.*stepwell\[hf\]"):
        attaching_trainer(begin)
