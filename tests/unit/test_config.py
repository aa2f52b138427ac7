"""TOML and `--set` into dataclasses and back; every mistake named, with what would be right."""

from __future__ import annotations

import ast
import inspect
import tomllib
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hakari.run import to_toml
from hakari.training import config
from hakari.training.config import Config, explain, from_dict, load, to_dict
from hakari.training.moe.estimators import ESTIMATORS
from hakari.training.parallel import alone, check, make_mesh

EXAMPLE = Path(__file__).parents[2] / "examples" / "moe_tiny.toml"
CHANGED = {
    "steps": 7,
    "start": 'a "quoted" folder\\with\'all',
    "recompute": True,
    "model": {
        "rope_scaling": {"rope_type": "longrope", "short_factor": [1.0, 2.5], "factor": 8},
        "norm": "layer",
        "moe": {"experts": 8, "layers": [0, 2], "router": "joint", "jitter": 0.3},
    },
    "data": {"text": ["a/*.txt", "b.jsonl"], "packing": False},
    "optimizer": {"learning_rate": 1, "schedule": "wsd"},
    "parallel": {"schedule": "GPipe"},
}


def set_(*changes: str, tmp_path: Path, text: str = "") -> Config:
    """What `hakari train FILE --set CHANGE ...` reads."""
    path = tmp_path / "given.toml"
    path.write_text(text, encoding="utf-8")
    return load(path, changes)


# --- there and back -------------------------------------------------------------------------


@pytest.mark.parametrize("table", [{}, CHANGED], ids=["defaults", "changed"])
def test_a_configuration_survives_its_own_toml(table):
    wanted = from_dict(table)
    text = to_toml(to_dict(wanted))
    assert from_dict(tomllib.loads(text)) == wanted
    assert text == to_toml(to_dict(from_dict(tomllib.loads(text))))


def test_what_is_said_is_what_is_read():
    found = from_dict(CHANGED)
    assert (found.steps, found.recompute, found.start) == (7, True, CHANGED["start"])
    assert found.model.rope_scaling == CHANGED["model"]["rope_scaling"]
    assert found.model.moe.layers == (0, 2)
    assert found.data.text == ("a/*.txt", "b.jsonl")
    assert found.optimizer.learning_rate == 1.0
    assert isinstance(found.optimizer.learning_rate, float)
    assert found.optimizer.warmup == config.Optimizer().warmup
    assert from_dict({"data": {"text": "one.txt"}}).data.text == ("one.txt",)


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_any_allowed_value_survives_its_own_toml(data):
    drawn = {
        "seed": st.integers(0, 2**63 - 1),
        "start": st.text(st.characters(exclude_categories=["Cs"])),
        "recompute": st.booleans(),
        "precision": st.sampled_from(["float32", "bfloat16", "float64"]),
        "optimizer": st.fixed_dictionaries({"learning_rate": st.floats(0, 1e300)}),
        "data": st.fixed_dictionaries({"text": st.lists(st.text("ab\"'\\\n#é"), min_size=1)}),
    }
    wanted = from_dict(data.draw(st.fixed_dictionaries(drawn)))
    assert from_dict(tomllib.loads(to_toml(to_dict(wanted)))) == wanted


def test_the_example_is_a_sparse_model():
    found = load(EXAMPLE)
    assert found.model.moe.experts > found.model.moe.top_k >= 1
    assert all(found.model.sparse(layer) for layer in range(found.model.layers))
    assert load(EXAMPLE, ["model.moe.layers=[1]"]).model.sparse(1)
    assert not load(EXAMPLE, ["model.moe.layers=[1]"]).model.sparse(0)
    assert not load(EXAMPLE, ["model.moe.experts=0"]).model.sparse(1)


# --- what cannot be read --------------------------------------------------------------------

UNKNOWN = {
    "a misspelt field": ({"stepps": 3}, "unknown key stepps: did you mean steps?"),
    "a misspelt nested field": ({"model": {"dims": 3}}, "key model.dims: did you mean model.dim?"),
    "a misspelt section": ({"modle": {"dim": 3}}, "unknown key modle: did you mean model?"),
    "a misspelt section with a near field": (
        {"optimiser": {"warmup": 3}},
        "unknown key optimiser: did you mean optimizer?",
    ),
    "a misspelt inner section": ({"model": {"mo": {}}}, "key model.mo: did you mean model.moe?"),
    "a field of another section": ({"dim": 3}, "unknown key dim: did you mean model.dim?"),
    "a section in the wrong place": ({"moe": {}}, "unknown key moe: did you mean model.moe?"),
    "a misspelt field in the wrong place": (
        {"expert": 8},
        "unknown key expert: did you mean model.moe.experts?",
    ),
    "nothing like it": ({"xyzzy": 1}, "unknown key xyzzy; `hakari train --fields` lists them all"),
}
WRONG = {
    "text for a number": ({"steps": "a"}, "steps = 'a' should be a whole number"),
    "a fraction": ({"steps": 2.5}, "steps = 2.5 should be a whole number"),
    "true for a number": ({"steps": True}, "steps = True should be a whole number"),
    "true for a float": (
        {"optimizer": {"clip": True}},
        "optimizer.clip = True should be a number",
    ),
    "a number for true": ({"recompute": 1}, "recompute = 1 should be true or false"),
    "a number for text": ({"start": 3}, "start = 3 should be a string"),
    "a misspelt choice": (
        {"model": {"norm": "rmss"}},
        "model.norm = 'rmss' should be one of rms, layer: did you mean 'rms'?",
    ),
    "no choice": ({"precision": 16}, "precision = 16 should be one of float32, bfloat16, float64"),
    "a list's item": (
        {"model": {"moe": {"layers": [0, 1.5]}}},
        "model.moe.layers = [0, 1.5] should be a list of whole numbers",
    ),
    "no list": ({"data": {"text": 3}}, "data.text = 3 should be a list of strings"),
    "no table": ({"model": {"rope_scaling": 3}}, "model.rope_scaling = 3 should be a table"),
    "no section": ({"model": 3}, "model = 3 should be a section"),
    "no inner section": ({"model": {"moe": 3}}, "model.moe = 3 should be a section"),
}


@pytest.mark.parametrize("case", UNKNOWN | WRONG)
def test_what_cannot_be_read_is_named_with_what_would_be_right(case):
    table, message = (UNKNOWN | WRONG)[case]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is compared
        from_dict(table)
    assert str(caught.value).endswith(message)


CROSSED = {
    "model.moe.top_k = 3 exceeds model.moe.experts = 2": {
        "model": {"moe": {"experts": 2, "top_k": 3}}
    },
    "router 'switch' sends a token to 1 expert; top_k = 2": {
        "model": {"moe": {"experts": 4, "router": "switch"}}
    },
    "model.dim = 10 is not a multiple of model.heads = 4: change one, or set model.head_dim": {
        "model": {"dim": 10, "heads": 4}
    },
    "model.head_dim = 3 is odd: rotary angles need pairs": {"model": {"head_dim": 3}},
    "model.heads = 6 is not a multiple of model.kv_heads = 4": {"model": {"kv_heads": 4}},
    "model.moe.layers has [6, -1]; layers are 0 to 5": {"model": {"moe": {"layers": [6, 2, -1]}}},
    "data.validation = 0.0 is not a share between 0 and 1": {"data": {"validation": 0}},
    "data.validation = 1.0 is not a share between 0 and 1": {"data": {"validation": 1.0}},
    "data.text is empty: name a file, a folder or a glob": {"data": {"text": []}},
    "optimizer.beta1 = 1.0 is not in [0, 1)": {"optimizer": {"beta1": 1}},
    "optimizer.beta2 = -0.1 is not in [0, 1)": {"optimizer": {"beta2": -0.1}},
    "optimizer.decay = 0.0 is not a share between 0 and 1": {"optimizer": {"decay": 0}},
    "optimizer.decay = 1.5 is not a share between 0 and 1": {"optimizer": {"decay": 1.5}},
    "optimizer.learning_rate = nan is below 0": {"optimizer": {"learning_rate": float("nan")}},
    "data.vocabulary = 256 is below 257": {"data": {"vocabulary": 256}},
    "length = 1 is below 2": {"length": 1},
}


@pytest.mark.parametrize("message", CROSSED)
def test_values_that_do_not_go_together_are_named(message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is compared
        from_dict(CROSSED[message])
    assert str(caught.value) == message


def test_no_message_of_a_section_is_left_untested():
    raised = 0
    for kind in (config.MoE, config.Model, config.Data, config.Optimizer, config.Parallel, Config):
        tree = ast.parse(inspect.getsource(kind))
        raised += sum(isinstance(node, ast.Raise) for node in ast.walk(tree))
    below = sum("is below" in message for message in CROSSED)
    twice = {"validation", "beta1", "decay"}  # one raise, two cases
    assert len(CROSSED) - below - len(twice) == raised


BOUNDS = {
    "steps": 1,
    "seed": 0,
    "batch": 1,
    "micro_batch": 0,
    "keep": 0,
    "validate_every": 0,
    "validate_batches": 0,
    "checkpoint_every": 0,
    "model.vocabulary": 0,
    "model.dim": 1,
    "model.layers": 1,
    "model.heads": 1,
    "model.kv_heads": 1,
    "model.hidden": 1,
    "model.moe.experts": 0,
    "model.moe.top_k": 1,
    "model.moe.hidden": 1,
    "model.moe.balance": 0,
    "model.moe.z_loss": 0,
    "data.shard_tokens": 1,
    "optimizer.weight_decay": 0,
    "optimizer.clip": 0,
    "optimizer.warmup": 0,
    "optimizer.final": 0,
    "parallel.data": 0,
    "parallel.tensor": 1,
    "parallel.pipeline": 1,
}


@pytest.mark.parametrize("name", BOUNDS)
def test_a_number_below_its_bound_is_named_with_the_bound(name, tmp_path):
    low = BOUNDS[name]
    with pytest.raises(ValueError, match=rf"^{name} = {low - 1}(\.0)? is below {low}$"):
        set_(f"{name}={low - 1}", tmp_path=tmp_path)


SPLITS = {
    "model.heads = 6 is not a multiple of parallel.tensor = 4": {"parallel": {"tensor": 4}},
    "model.kv_heads = 3 is not a multiple of parallel.tensor = 2": {
        "model": {"kv_heads": 3},
        "parallel": {"tensor": 2},
    },
    "model.hidden = 511 is not a multiple of parallel.tensor = 2": {
        "model": {"hidden": 511},
        "parallel": {"tensor": 2},
    },
    "model.vocabulary = 257 is not a multiple of parallel.tensor = 2": {
        "model": {"vocabulary": 257},
        "parallel": {"tensor": 2},
    },
    "model.moe.hidden = 255 is not a multiple of parallel.tensor = 2": {
        "model": {"moe": {"experts": 4, "hidden": 255}},
        "parallel": {"tensor": 2},
    },
    "parallel.pipeline = 7 exceeds 6 layers": {"parallel": {"pipeline": 7}},
    "model.tied = true with parallel.pipeline > 1: embedding and head would lie on different "
    "stages; set model.tied = false": {"parallel": {"pipeline": 2}},
    "batch = 15 is not a multiple of 2 data-parallel processes": {"batch": 15},
    "micro_batch = 3 does not divide the 8 sequences of a pipeline: its stages expect equal "
    "micro-batches": {
        "micro_batch": 3,
        "parallel": {"pipeline": 2},
    },
    "compile = true with parallel.tensor = 2: torch does not compile split weights; set "
    "compile = false": {"compile": True, "parallel": {"tensor": 2}},
}


@pytest.mark.parametrize("message", SPLITS)
def test_a_split_that_does_not_divide_the_work_is_named(message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is compared
        check(from_dict(SPLITS[message]), ranks=2)
    assert str(caught.value) == message


def test_a_split_that_divides_the_work_is_not_refused():
    given = {"model": {"tied": False}, "parallel": {"tensor": 2, "pipeline": 2}}
    check(from_dict(given | {"micro_batch": 4}), ranks=2)
    check(from_dict({"micro_batch": 3}), ranks=2)  # without stages, the last one may be smaller


def test_sizes_that_are_not_the_number_of_processes_are_named():
    with alone(), pytest.raises(ValueError, match=r"data 2 x tensor 3 x pipeline 1 = 6 processes"):
        make_mesh(config.Parallel(data=2, tensor=3), "cpu")


# --- files and --set ------------------------------------------------------------------------


def test_set_takes_toml_values_and_strings_without_quotes(tmp_path):
    found = set_(
        "steps=20",
        "model.moe.jitter=1e-2",
        "model.tied=false",
        "model.norm=layer",
        'model.moe.mask="paper"',
        "model.moe.layers=[0, 2]",
        "data.text=my text/**/*.md",
        "data.tokenizer=",
        " optimizer.schedule = wsd",
        "model.rope_scaling={rope_type = 'llama3', factor = 8.0}",
        "model.rope_scaling.low_freq_factor=1",
        tmp_path=tmp_path,
        text="[data]\ntokenizer = 'x'",
    )
    assert (found.steps, found.model.moe.jitter, found.model.tied) == (20, 0.01, False)
    assert (found.model.norm, found.model.moe.mask) == ("layer", "paper")
    assert found.model.moe.layers == (0, 2)
    assert found.data.text == ("my text/**/*.md",)
    assert found.data.tokenizer == ""
    assert found.optimizer.schedule == "wsd"
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1}
    assert found.model.rope_scaling == scaling


def test_set_changes_the_file_and_the_last_one_counts(tmp_path):
    text = "steps = 3\n[model]\ndim = 64\nheads = 4\n"
    found = set_("steps=4", "steps=5", "model.dim=32", tmp_path=tmp_path, text=text)
    assert (found.steps, found.model.dim, found.model.heads) == (5, 32, 4)
    assert set_(tmp_path=tmp_path, text=text).steps == 3


SETTINGS = {
    "steps": "--set 'steps': write it as name=value, such as model.dim=256",
    "=3": "--set '=3': write it as name=value, such as model.dim=256",
    "steps.more=3": "--set 'steps.more=3': steps is a value, not a section",
    "steps=": "steps = '' should be a whole number",
    "steps=1 2": "steps = '1 2' should be a whole number",
    "model=3": "model = 3 should be a section",
    "model.moe.expert=3": "unknown key model.moe.expert: did you mean model.moe.experts?",
    "model..dim=3": "unknown key model.: did you mean model?",
}


@pytest.mark.parametrize("change", SETTINGS)
def test_a_malformed_set_is_one_clear_error(change, tmp_path):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is compared
        set_(change, tmp_path=tmp_path, text="steps = 3")
    assert str(caught.value) == SETTINGS[change]


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no configuration file lost\.toml"):
        load("lost.toml")
    path = tmp_path / "broken.toml"
    path.write_text("steps = = 3")
    with pytest.raises(ValueError, match=r"broken\.toml is not TOML: .*line 1"):
        load(path)


# --- documentation --------------------------------------------------------------------------


def test_explain_covers_every_field_once_with_its_meaning():
    shown = {name: (kind, default, text) for name, kind, default, text in explain()}
    flat = dict(leaves(to_dict(Config())))
    assert set(shown) == set(flat)
    assert len(list(explain())) == len(shown) < 80
    for name, (kind, _, text) in shown.items():
        assert len(text) > 3, name
        assert kind, name
    assert shown["model.moe.jitter"][:2] == ("a number", "0.1")
    assert shown["data.text"][:2] == ("a list of strings", "['stdlib:**/*.py']")
    assert shown["model.rope_scaling"][:2] == ("a table", "{}")
    assert shown["optimizer.schedule"][0] == "one of cosine, wsd, constant"


def leaves(table: dict, prefix: str = ""):
    for name, value in table.items():
        if isinstance(value, dict) and name != "rope_scaling":
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def test_shown_defaults_are_the_defaults():
    flat = dict(leaves(to_dict(Config())))
    derived = {"model.head_dim": 0}  # 0 stands for dim / heads
    for name, _, default, _ in explain():
        value = derived.get(name, flat[name])
        assert ast.literal_eval(default) == (list(value) if isinstance(value, tuple) else value)


def test_every_section_and_field_has_a_default_and_help():
    def walk(kind):
        for f in fields(kind):
            assert f.metadata["help"], f.name
            assert f.default is not MISSING or f.default_factory is not MISSING, f.name
            if is_dataclass(hint := get_type_hints(kind)[f.name]):
                walk(hint)

    walk(Config)


def test_router_names_are_those_of_the_estimators():
    assert set(get_args(config.Router)) == set(ESTIMATORS)
