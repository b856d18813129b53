"""Selection: the right weights, along the right dimension, and a reason for every other."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import stepwell as sw
from stepwell.selection import matches, select


class Conv1D(nn.Module):
    """GPT-2's layer, as transformers has it: a weight stored as (in, out)."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))


class Experts(nn.Module):
    """Expert tensors, `(experts, in, out)` or `(experts, out, in)`."""

    def __init__(self, hidden: int, inner: int, *, inputs_first: bool) -> None:
        super().__init__()
        up, down = (4, 2 * inner, hidden), (4, hidden, inner)
        self.gate_up_proj = nn.Parameter(torch.ones(up).transpose(1, 2) if inputs_first else torch.ones(up))
        self.down_proj = nn.Parameter(torch.ones(down).transpose(1, 2) if inputs_first else torch.ones(down))
        self.gate_up_proj_bias = nn.Parameter(torch.ones(4, 2 * inner))


class LoraLinear(nn.Module):
    """A low-rank adapter around a layer, as peft builds it."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(8, 8)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(8, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 8, bias=False)})


class Model(nn.Module):
    """One layer of each common kind, with a head tied to the embedding."""

    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.conv = nn.Conv2d(3, 8, 3)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8, bias=False))
        self.attention = nn.MultiheadAttention(8, 2)
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def chosen(*arguments, **options) -> list[str]:
    return [row.name for row in select(*arguments, **options).chosen]


def test_matrices_are_selected_and_embeddings_norms_biases_and_tied_heads_are_not():
    expected = ["conv.weight", "mlp.0.weight", "mlp.2.weight", "attention.in_proj_weight", "attention.out_proj.weight"]
    assert chosen(Model()) == expected
    assert chosen(Model(tied=False)) == [*expected, "head.weight"]
    reasons = {row.name: row.reason for row in select(Model())}
    assert reasons["embed.weight"] == "tied: embedding and Linear weight"
    assert reasons["mlp.0.bias"] == "bias of Linear is no matrix"
    assert set(reasons) == {name for name, _ in Model().named_parameters()}  # every parameter has a row, once


def test_separate_projections_of_attention_are_selected():
    attention = nn.MultiheadAttention(8, 2, kdim=4, vdim=4, add_bias_kv=True)
    assert chosen(attention) == ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]


def test_conv1d_is_contracted_along_its_first_dimension():
    row = select(nn.ModuleDict({"c_attn": Conv1D(24, 8)})).chosen[0]
    assert (row.name, row.axis) == ("c_attn.weight", 0)
    assert select(nn.Linear(8, 24)).chosen[0].axis is None


@pytest.mark.parametrize(("inputs_first", "axis"), [(True, 1), (False, 2)])
def test_expert_tensors_are_contracted_along_their_inputs(inputs_first, axis):
    rows = select(Experts(8, 32, inputs_first=inputs_first)).chosen
    assert [(row.name, row.axis) for row in rows] == [("gate_up_proj", axis), ("down_proj", axis)]


def test_expert_tensors_whose_shapes_fit_both_layouts_are_left_out_with_the_way_out():
    experts = Experts(8, 8, inputs_first=True)
    experts.gate_up_proj = nn.Parameter(torch.ones(4, 8, 8))  # no gate beside it, and all matrices square
    rows = select(experts)
    assert not rows.chosen
    assert len(select(Experts(32, 16, inputs_first=True)).chosen) == 2  # here only `down_proj` tells the layouts apart
    assert "name it exactly and give `axis=`" in rows[0].reason


def test_the_exact_name_of_a_parameter_selects_it_and_a_module_or_pattern_does_not():
    assert chosen(Model(), {"embed.weight": True}) == ["embed.weight"]
    assert chosen(Model(), {"head.weight": True}) == ["embed.weight"]  # either name of a shared parameter; the first one names the row
    assert chosen(Model(), {"embed": True}) == []
    assert chosen(Model(), {"embed.*": True}) == []
    assert chosen(Model(), {"mlp": True}) == ["mlp.0.weight", "mlp.2.weight"]  # and not its bias


def test_the_first_match_decides_and_none_leaves_out():
    rows = select(Model(), {"mlp.2": "three", "mlp.*": None, "*": "four"})
    found = {row.name: row.choice for row in rows}
    assert (found["mlp.2.weight"], found["mlp.0.weight"], found["conv.weight"]) == ("three", None, "four")
    assert next(row.reason for row in rows if row.name == "mlp.0.weight") == "left out by the mapping"
    assert next(row.reason for row in select(Model(), {"mlp": 1}) if row.name == "conv.weight") == "no name in the mapping matches"


@pytest.mark.parametrize(
    ("skip", "left"),
    [(["mlp"], {"mlp.0.weight", "mlp.2.weight"}), (["mlp.0.weight"], {"mlp.0.weight"}), (["*.out_proj"], {"attention.out_proj.weight"})],
)
def test_skip_takes_modules_names_and_patterns(skip, left):
    assert set(chosen(Model())) - set(chosen(Model(), skip=skip)) == left


def test_names_match_whole_parts():
    assert matches("head.weight", "head")
    assert not matches("ahead.weight", "head")
    assert not matches("head2.weight", "head")
    assert matches("blocks.10.mlp.weight", "blocks.*.mlp")


@pytest.mark.parametrize("options", [{"skip": ["heads"]}, {"choices": {"heads": True, "*": True}}, {"choices": {"*.attn.*": True}}])
def test_names_that_match_nothing_are_refused_by_name(options):
    with pytest.raises(ValueError, match=r"'(heads|\*\.attn\.\*)' matches no parameter.*embed\.weight"):
        select(Model(), **options)


def test_a_string_for_skip_is_refused_by_value():
    with pytest.raises(TypeError, match=r"`skip`.*'head'.*skip=\['head'\]"):
        select(Model(), skip="head")


def test_skip_that_is_no_sequence_of_names_is_refused_by_value():
    for skip in (None, 3):
        with pytest.raises(TypeError, match=f"`skip` must be a sequence of names: got {skip}"):
            select(Model(), skip=skip)
    with pytest.raises(TypeError, match="must be strings: got 3"):
        select(Model(), skip=["mlp", 3])
    with pytest.raises(TypeError, match="must be strings: got None"):
        select(Model(), {None: True})
    assert chosen(Model(), skip={"mlp"}) == chosen(Model(), skip=["mlp"])  # a set of names is one too


@pytest.mark.parametrize("call", [select, lambda model: sw.ptq.rtn(model, sw.int4())])
@pytest.mark.parametrize(("model", "kind"), [(torch.ones(2, 2), "Tensor"), (nn.Linear, "type"), (None, "NoneType"), ({}, "dict")])
def test_what_is_no_module_is_refused_by_kind(call, model, kind):
    with pytest.raises(TypeError, match=f"`model` must be a torch module: got {kind}"):
        call(model)


def test_a_lazy_module_is_refused_until_it_has_a_shape():
    model = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(4))
    for call in (select, lambda model: select(model, skip=["1"]), lambda model: sw.ptq.rtn(model, sw.int4(block=4))):
        with pytest.raises(ValueError, match=r"parameter '1\.weight' has no shape yet.*Run one forward pass first"):
            call(model)
    model(torch.ones(1, 8))
    assert chosen(model) == ["0.weight", "1.weight"]


def test_a_weight_with_two_contraction_dimensions_is_left_out():
    linear, conv1d = nn.Linear(8, 8, bias=False), Conv1D(8, 8)
    conv1d.weight = linear.weight
    assert [row.reason.split(":")[0] for row in select(nn.ModuleList([linear, conv1d])) if row.name == "0.weight"] == ["tied"]
    tied = nn.ModuleList([linear, nn.Linear(8, 8, bias=False)])
    tied[1].weight = linear.weight
    assert chosen(tied) == ["0.weight"]  # shared by two layers of one kind: selected once


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def parametrized() -> nn.Module:
    layer = nn.Linear(8, 8)
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


def attention() -> nn.Module:
    layer = nn.MultiheadAttention(8, 2)
    parametrize.register_parametrization(layer, "in_proj_weight", Doubled())
    return layer


COMPUTED = [
    (lambda: nn.utils.weight_norm(nn.Linear(8, 8)), "layer.weight", "weight_norm"),
    (lambda: parametrizations.weight_norm(nn.Linear(8, 8)), "layer.weight", "parametrize"),
    (lambda: nn.utils.spectral_norm(nn.Linear(8, 8)), "layer.weight", "spectral_norm"),
    (lambda: parametrizations.spectral_norm(nn.Conv2d(3, 8, 3)), "layer.weight", "parametrize"),
    (lambda: prune.random_unstructured(nn.Linear(8, 8), "weight", 0.5), "layer.weight", "prune"),
    (lambda: nn.utils.weight_norm(Conv1D(8, 8)), "layer.weight", "weight_norm"),
    (parametrized, "layer.weight", "parametrize"),
    (attention, "layer.in_proj_weight", "parametrize"),
    (LoraLinear, "layer.base_layer.weight", "LoRA"),
]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize(("build", "name", "reason"), COMPUTED)
def test_weights_computed_from_others_are_refused_by_name_and_reason_unless_left_out(build, name, reason):
    model = nn.ModuleDict({"layer": build(), "plain": nn.Linear(8, 8)})
    with pytest.raises(ValueError, match=f"'{name}' cannot be quantized: .*{reason}.*skip="):
        select(model)
    with pytest.raises(ValueError, match=f"'{name}'"):
        select(model, {name: True})
    for skip in (["layer"], [name], ["layer*"]):
        assert "plain.weight" in chosen(model, skip=skip)
    assert name not in chosen(model, skip=[name])
    assert chosen(model, {"plain": True}) == ["plain.weight"]  # never asked for, never refused
    assert chosen(model, {"layer": None, "*": True}) == ["plain.weight"]


def test_other_parametrizations_disturb_nobody():
    layer = nn.Linear(8, 8)
    parametrize.register_parametrization(layer, "bias", Doubled())
    assert chosen(layer) == ["weight"]


def test_the_table_counts_parameters_and_elements():
    text = str(sw.select(nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}), skip=["b"]))
    assert "1 of 4 parameters quantized: 16 of 40 elements" in text
    assert "skipped by name" in text
    assert "nothing" not in str(select(nn.Identity()))


def test_the_prompt_shows_the_table_and_no_tensors():
    selection = select(nn.Linear(4, 4))
    assert repr(selection) == str(selection)
    assert "tensor(" not in repr(selection)
