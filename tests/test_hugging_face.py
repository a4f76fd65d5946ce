"""Hugging Face folders: built, read, merged and written so that transformers reads them again."""

import json
import shutil

import pytest
import torch

import isthmus
from helpers.hugging_face import FAMILIES, READS, REASON, model_of, read, write
from helpers.refusals import refuses
from isthmus.checkpoint import load_module, load_state, load_weights, save_state
from isthmus.cli.commands import main
from isthmus.errors import ModelError
from isthmus.models import load_model
from isthmus.runs.example import example_input
from isthmus.runs.folder import save_hugging_face
from isthmus.runs.inputs import load_inputs
from isthmus.runs.recipe import ParentOptions, Recipe

pytest.importorskip("transformers", reason=REASON)


def recipe_of(*folders, **options):
    return Recipe(
        models=[ParentOptions(model=str(folder)) for folder in folders], architecture=f"hf:{folders[0]}", **options
    )


@pytest.fixture
def parents(tmp_path):
    return [write(tmp_path / name, "gpt2", seed) for seed, name in enumerate("ab")]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_is_built_read_and_written(family, tmp_path):
    folder = write(tmp_path / "model", family)
    original = model_of(family)
    model = load_model(f"hf:{folder}").eval()
    assert type(model) is type(original)
    expected = original.state_dict()
    assert not all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    loaded = load_module(folder, model)
    assert type(loaded) is type(original)
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    save_hugging_face(loaded, recipe_of(folder), tmp_path / "written")
    again = read(tmp_path / "written")
    assert again.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in again.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_configuration_says_what_the_model_reads(family, tmp_path):
    folder = write(tmp_path / "model", family)
    model = load_model(f"hf:{folder}").eval()
    state = torch.random.get_rng_state()
    batch, assumed = example_input(model, None, None)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert batch.kwargs.keys() == READS.get(family, {"input_ids"})
    assert batch.args == ()
    assert batch.size == 2
    assert all(name in assumed for name in batch.kwargs)
    assert "past_key_values" not in model(**batch.kwargs)


# The rest runs with the slow tests: capturing takes seconds for some.
@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=() if name == "gpt2" else pytest.mark.slow) for name in FAMILIES],
)
def test_models_of_every_family_are_captured_and_proved(family, tmp_path):
    model = load_model(f"hf:{write(tmp_path / 'model', family)}").eval()
    kwargs = example_input(model, None, None)[0].kwargs
    symmetry = isthmus.trace(model, kwargs=kwargs)
    if len(symmetry):
        isthmus.verify(model, symmetry, kwargs=kwargs, trials=1, controls=False)


def test_folders_merge_without_being_told_the_architecture(tmp_path, capsys):
    # Its files hold other names than its modules.
    a, b = (write(tmp_path / name, "vit", seed) for seed, name in enumerate("ab"))
    out = tmp_path / "run"
    assert main(["merge", str(a), str(b), "-o", str(out), "--method", "identity", "--no-verify"]) == 0
    merged = read(out)
    first, second = read(a), read(b)
    for name, value in merged.items():
        # Two roundings to float32, of the mean by us and here.
        torch.testing.assert_close(value, (first[name] + second[name]) / 2, rtol=2**-22, atol=1e-30)
    assert json.loads((out / "config.json").read_text()) == json.loads((a / "config.json").read_text())
    assert "ViTForImageClassification.from_pretrained" in (out / "README.md").read_text()
    capsys.readouterr()
    assert main(["merge", str(out / "recipe.yaml"), "-o", str(tmp_path / "again")]) == 0
    files = [(folder / "model.safetensors").read_bytes() for folder in (out, tmp_path / "again")]
    assert files[0] == files[1]


def test_an_aligned_folder_computes_what_its_parent_did(parents, tmp_path):
    assert main(["align", *map(str, parents), "-o", str(tmp_path / "run")]) == 0
    model, x = load_model(f"hf:{parents[0]}"), torch.arange(12).view(2, 6)
    for parent, name in zip(parents, "ab", strict=True):
        assert read(tmp_path / "run" / name).keys() == model.state_dict().keys()
        with torch.no_grad():
            own, moved = (load_module(folder, model)(x).logits for folder in (parent, tmp_path / "run" / name))
        # Sums of 64 terms of size one in another order, in float32.
        torch.testing.assert_close(moved, own, rtol=0, atol=64 * 2**-23 * float(own.abs().max()))
    assert not all(torch.equal(read(parents[1])[n], v) for n, v in read(tmp_path / "run" / "b").items())


def test_sharded_and_single_files_are_read_alike(tmp_path):
    whole, parts = write(tmp_path / "whole", "mixtral"), write(tmp_path / "parts", "mixtral", shard="10KB")
    assert len(list(parts.glob("*.safetensors"))) > 2
    model = load_model(f"hf:{whole}")
    a, b = load_weights(whole, model), load_weights(parts, model)
    assert all(torch.equal(a[name], b[name]) for name in model.state_dict())


def test_a_wrapper_around_all_names_is_taken_off(parents, tmp_path):
    state = load_state(parents[0])
    save_state({f"module.{name}": value for name, value in state.items()}, tmp_path / "wrapped.safetensors")
    model = load_model(f"hf:{parents[0]}")
    a, b = load_weights(parents[0], model), load_weights(tmp_path / "wrapped.safetensors", model)
    assert all(torch.equal(a[name], b[name]) for name in model.state_dict())


def test_weights_keep_their_precision(tmp_path):
    folder = tmp_path / "model"
    model_of("gpt2").to(torch.bfloat16).save_pretrained(folder)
    inputs = load_inputs(recipe_of(folder, folder))
    assert {p.dtype for model in inputs.models for p in model.parameters()} == {torch.bfloat16}
    save_hugging_face(inputs.models[0].float(), recipe_of(folder), tmp_path / "wide")
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"
    assert {value.dtype for value in read(tmp_path / "wide").values()} == {torch.float32}


def test_files_beside_the_weights_are_copied_where_parents_agree(parents, tmp_path):
    for parent in parents:
        (parent / "tokenizer.json").write_text("{}")
        (parent / "vocab.json").write_text(parent.name)
        (parent / "notes.txt").write_text("of no use to transformers")
    (parents[1] / "merges.txt").write_text("a b")
    assert save_hugging_face(model_of("gpt2"), recipe_of(*parents), tmp_path / "out") == ["vocab.json"]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"tokenizer.json", "merges.txt", "generation_config.json", "config.json", "model.safetensors"}


# ---- refusals


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


@pytest.mark.parametrize("values", [{"n_head": 2}, {"activation_function": "relu"}, {"n_layer": 1}], ids=str)
def test_folders_of_other_configurations_are_refused(values, parents):
    change_config(parents[1], **values)
    key, value = next(iter(values.items()))
    with refuses(ModelError, f"is another model than the first: in its config.json {key} is {value!r} for "):
        load_inputs(recipe_of(*parents))


def test_configurations_may_differ_in_what_changes_nothing(parents):
    change_config(
        parents[1], transformers_version="4.0", use_cache=False, resid_pdrop=0.3, attn_pdrop=0.0,
        id2label={"0": "cat", "1": "dog"}, _name_or_path="elsewhere", initializer_range=0.5,
    )  # fmt: skip
    assert len(load_inputs(recipe_of(*parents)).models) == 2


def test_nested_configurations_are_compared(tmp_path):
    a, b = (write(tmp_path / name, "clip") for name in "ab")
    config = json.loads((b / "config.json").read_text())
    change_config(b, vision_config={**config["vision_config"], "layer_norm_eps": 0.1})
    with refuses(ModelError, r"vision_config\.layer_norm_eps is 0\.1 for 1e-05"):
        load_inputs(recipe_of(a, b))


def test_weights_that_do_not_fit_are_refused(tmp_path):
    folder = write(tmp_path / "model", "mixtral")
    model = load_model(f"hf:{folder}")
    state = {name: value.clone() for name, value in load_state(folder).items()}
    gate = next(name for name in state if "gate" in name)
    for changed, says in (
        ({n: v for n, v in state.items() if n != "model.norm.weight"}, r"lacks 'model\.norm\.weight'"),
        ({**state, "bogus": torch.zeros(2)}, "holds, unknown to the model, 'bogus'"),
        ({**state, gate: torch.zeros(3, 5)}, "(has in other shapes|cannot be loaded)"),
    ):
        save_state(changed, tmp_path / "changed.safetensors")
        with refuses(ModelError, says):
            load_weights(tmp_path / "changed.safetensors", model)


def test_code_in_a_folder_is_never_run(tmp_path):
    folder, proof = write(tmp_path / "model", "gpt2"), tmp_path / "code ran"
    (folder / "configuration_mine.py").write_text(f"open({str(proof)!r}, 'w')")
    change_config(folder, model_type="mine", auto_map={"AutoConfig": "configuration_mine.Config"})
    with refuses(ModelError, "describes no model of transformers .* is not run"):
        load_model(f"hf:{folder}")
    change_config(folder, model_type="gpt2", auto_map={"AutoModel": "configuration_mine.Model"}, architectures=["Mine"])
    assert type(load_model(f"hf:{folder}")).__name__ == "GPT2Model"
    assert not proof.exists()


@pytest.mark.parametrize("architectures", [None, [], ["AutoModel"], ["logging"], ["NoSuchModel"]], ids=str)
def test_an_architecture_that_transformers_lacks_gives_the_plain_model(architectures, tmp_path):
    folder = change_config(write(tmp_path / "model", "gpt2"), architectures=architectures)
    assert type(load_model(f"hf:{folder}")).__name__ == "GPT2Model"


def test_a_folder_without_a_usable_configuration_is_refused(tmp_path, parents):
    with refuses(ModelError, "there is no file '.*config.json'"):
        load_model(f"hf:{tmp_path}")
    (tmp_path / "config.json").write_text("{")
    with refuses(ModelError, "describes no model"):
        load_model(f"hf:{tmp_path}")
    with refuses(ModelError, "a folder takes no arguments; write n_head in its config.json"):
        load_model(f"hf:{parents[0]}?n_head=2")


def test_biases_that_no_configuration_describes_are_refused(parents, tmp_path):
    with refuses(ModelError, "gave biases to layers that have none .lm_head.*--repair reset"):
        save_hugging_face(model_of("gpt2"), recipe_of(*parents), tmp_path / "out", ["lm_head"])
    assert not (tmp_path / "out").exists()


def test_the_architecture_is_asked_for_where_a_checkpoint_does_not_say_it(parents, tmp_path, capsys):
    shutil.copy(parents[1] / "model.safetensors", tmp_path / "b.safetensors")
    arguments = [str(parents[0]), str(tmp_path / "b.safetensors"), "-o", str(tmp_path / "run"), "--no-verify"]
    assert main(["merge", *arguments]) == 2
    assert "b.safetensors is no Hugging Face folder" in capsys.readouterr().err
    assert main(["merge", *arguments, "--model", f"hf:{parents[0]}", "--dry-run"]) == 0
