"""Options: what is accepted, what is refused and how the refusal reads, and where a value comes from."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmi_compile import options as module
from mmi_compile._suggest import did_you_mean, nearest
from mmi_compile.head_config import Fingerprint, HeadConfig, HeadEntry
from mmi_compile.kernels.patterns import AShape, VerticalSlash
from mmi_compile.options import NON_OPTIONS, OptionError, Options, OptionWarning, env_name, options_table

NAMES = [item.name for item in dataclasses.fields(Options)]


def a_backend(gm, example_inputs):
    return gm.forward


@pytest.fixture(autouse=True)
def _warn_anew(monkeypatch):
    monkeypatch.setattr(module, "_warned", set())


def test_defaults_need_nothing_from_outside():
    options = Options.from_mapping(None, environ={})
    assert options == Options()
    assert options.policy == "adaptive"
    assert options.recall == 0.95
    assert options.min_tokens is None
    assert options.inner == "inductor"
    assert options.strict is False


# --- head configs -------------------------------------------------------------------------------------------------

HEADS = HeadConfig(Fingerprint(2, 2, 1, 8), ((HeadEntry(AShape(4, 8)), HeadEntry(VerticalSlash(9, 3))),) * 2)


@pytest.mark.parametrize("how", ["path", "text", "mapping", "object", "environment"])
def test_a_head_config_is_read_at_once(how, tmp_path):
    path = tmp_path / "heads.json"
    HEADS.save(path)
    given_value = {"path": path, "text": str(path), "mapping": HEADS.to_json(), "object": HEADS}.get(how)
    mapping = {"policy": "config"} if given_value is None else {"policy": "config", "head_config": given_value}
    options = Options.from_mapping(mapping, environ={"MMI_HEAD_CONFIG": str(path)})
    path.unlink()
    assert options.head_config == HEADS
    assert options == Options(policy="config", head_config=HEADS)
    assert options.digest() == Options(policy="config", head_config=HEADS).digest()
    assert Options.from_mapping(options.to_json(), environ={}) == options


def test_the_digest_is_that_of_the_content(tmp_path):
    path, digests = tmp_path / "heads.json", set()
    for sink in (4, 5):
        entries = ((HeadEntry(AShape(sink, 8)), HeadEntry(VerticalSlash(9, 3))),) * 2
        dataclasses.replace(HEADS, layers=entries).save(path)
        digests.add(Options(policy="config", head_config=path).digest())
    assert len(digests) == 2


def test_a_wrong_file_is_named_with_the_place(tmp_path):
    path = tmp_path / "heads.json"
    wrong = HEADS.to_json()
    wrong["layers"][1]["heads"][0]["pattern"]["local"] = 0
    path.write_text(json.dumps(wrong))
    with pytest.raises(OptionError) as caught:
        Options(policy="config", head_config=path)
    assert str(caught.value).startswith('option "head_config" must be the path of a head config')
    assert f": {path}: layers[1].heads[0].pattern.local: is 0; give 1 or more" in str(caught.value)


def test_policy_and_head_config_go_together():
    with pytest.raises(OptionError, match='policy "config" needs the option "head_config"'):
        Options(policy="config")
    for policy in ("adaptive", "exact"):
        with pytest.raises(OptionError, match=f'is for policy "config", and the policy is "{policy}"; change one'):
            Options(policy=policy, head_config=HEADS)


def test_is_frozen_and_hashable():
    options = Options(inductor={"max_autotune": True})
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.policy = "exact"
    assert hash(options) == hash(Options(inductor={"max_autotune": True}))
    assert options != Options()


@pytest.mark.parametrize(
    ("name", "value", "stored"),
    [
        ("policy", "exact", "exact"),
        ("recall", 1, 1.0),
        ("recall", 1e-9, 1e-9),
        ("min_tokens", 0, 0),
        ("max_density", 1.0, 1.0),
        ("dense_tail", False, False),
        ("boundaries", ["none"], ("none",)),
        ("boundaries", ("2d", "none", "q", "2d"), ("none", "q", "2d")),
        ("head_config", None, None),
        ("inner", "aot_eager", "aot_eager"),
        ("inner", a_backend, a_backend),
        ("strict", True, True),
        ("dump", "some/folder", Path("some/folder")),
        ("dump", Path("folder"), Path("folder")),
        ("inductor", {"max_autotune": True}, {"max_autotune": True}),
        ("skip_passes", ["rewrite", "cleanup"], ("rewrite", "cleanup")),
    ],
)
def test_accepted_values(name, value, stored):
    options = Options.from_mapping({name: value}, environ={})
    assert getattr(options, name) == stored
    assert type(getattr(options, name)) is type(stored)


REFUSED = [
    ("policy", "exakt", 'did you mean "exact"?'),
    ("policy", None, '"adaptive", "config" or "exact"'),
    ("head_config", "", "the path of a head config, what is in it, a HeadConfig or None"),
    ("head_config", 3, "got 3"),
    ("head_config", {}, "got {}"),
    ("head_config", ["a", "b"], "the path of a head config"),
    ("head_config", "no/such.json", "no/such.json: there is no such file"),
    ("head_config", {"version": 1}, "lacks fingerprint, layers; add it"),
    ("head_config", {"version": 1, "x" * 500: 1}, "..."),
    ("dense_tail", 1, "True or False"),
    ("boundaries", "none", "a sequence of"),
    ("boundaries", ("none", "k"), "'k' is no boundary"),
    ("boundaries", ("q", "2d"), 'heads fall back to "none"'),
    ("boundaries", (), 'heads fall back to "none"'),
    ("recall", 0, "in (0, 1]"),
    ("recall", 1.01, "in (0, 1]"),
    ("recall", float("nan"), "in (0, 1]"),
    ("recall", "0.9", "'0.9'"),
    ("recall", True, "got True"),
    ("min_tokens", -1, "integer >= 0"),
    ("min_tokens", 4096.0, "integer >= 0"),
    ("min_tokens", False, "got False"),
    ("max_density", 0.0, "in (0, 1]"),
    ("max_density", float("inf"), "in (0, 1]"),
    ("inner", "inducter", 'did you mean "inductor"?'),
    ("inner", 3, "or a backend function"),
    ("strict", 1, "True or False"),
    ("strict", "yes", "True or False"),
    ("dump", 3, "a path or None"),
    ("dump", "", "a path or None"),
    ("inductor", ["max_autotune"], "dict with string keys"),
    ("inductor", {1: 2}, "dict with string keys"),
    ("inductor", {"a": {(1, 2): 3}}, "keys must be str"),
    ("skip_passes", "rewrite", "sequence of names"),
    ("skip_passes", [""], "sequence of names"),
    ("skip_passes", [1], "sequence of names"),
    ("passes_until", "", "a name or None"),
    ("passes_until", ["rewrite"], "a name or None"),
]


@pytest.mark.parametrize(("name", "value", "message"), REFUSED)
def test_refused_values_say_what_is_accepted(name, value, message):
    with pytest.raises(OptionError) as caught:
        Options.from_mapping({name: value}, environ={})
    assert f'option "{name}" must be ' in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(("name", "value", "message"), REFUSED)
def test_direct_construction_is_checked_too(name, value, message):
    with pytest.raises(OptionError, match=f'option "{name}" must be '):
        Options(**{name: value})


def test_a_dict_that_contains_itself_is_refused():
    nested: dict[str, object] = {}
    nested["self"] = nested
    with pytest.raises(OptionError, match=r"Circular reference"):
        Options(inductor=nested)


@pytest.mark.parametrize(
    ("given_name", "meant"),
    [("recal", "recall"), ("Policy", "policy"), ("min_token", "min_tokens"), ("skip-passes", "skip_passes")],
)
def test_unknown_option_suggests_the_nearest(given_name, meant):
    with pytest.raises(OptionError) as caught:
        Options.from_mapping({given_name: 1}, environ={})
    assert str(caught.value) == f'unknown option "{given_name}"; did you mean "{meant}"?'


def test_unknown_option_far_from_all_lists_them():
    with pytest.raises(OptionError) as caught:
        Options.from_mapping({"zzz": 1}, environ={})
    assert all(name in str(caught.value) for name in NAMES)


@given(st.text(max_size=12), st.lists(st.sampled_from(NAMES), unique=True))
def test_suggestion_is_known_or_absent(word, known):
    assert nearest(word, known) in {*known, None}
    assert did_you_mean(word, known).startswith("; ")


@pytest.mark.parametrize(
    ("name", "text", "stored"),
    [
        ("policy", "exact", "exact"),
        ("policy", " exact ", "exact"),
        ("recall", "0.9", 0.9),
        ("boundaries", "none, 2d", ("none", "2d")),
        ("min_tokens", "128", 128),
        ("max_density", "1", 1.0),
        ("inner", "eager", "eager"),
        ("strict", "1", True),
        ("strict", "Off", False),
        ("dump", "some/folder", Path("some/folder")),
        ("inductor", '{"max_autotune": true}', {"max_autotune": True}),
        ("inductor", "null", None),
        ("skip_passes", "rewrite, cleanup,", ("rewrite", "cleanup")),
    ],
)
def test_environment_is_parsed_by_type(name, text, stored):
    options = Options.from_mapping({}, environ={env_name(name): text})
    assert getattr(options, name) == stored
    assert type(getattr(options, name)) is type(stored)


@pytest.mark.parametrize(
    ("name", "text", "accepts"),
    [
        ("policy", "confg", 'did you mean "config"?'),
        ("head_config", "no/such.json", "no/such.json: there is no such file"),
        ("dense_tail", "maybe", "yes/no"),
        ("boundaries", "q", 'heads fall back to "none"'),
        ("recall", "high", "a number in (0, 1]"),
        ("recall", "2", "a number in (0, 1]"),
        ("recall", "nan", "a number in (0, 1]"),
        ("min_tokens", "4k", "an integer >= 0"),
        ("min_tokens", "-1", "an integer >= 0"),
        ("inner", "aot-eager", 'did you mean "aot_eager"?'),
        ("strict", "maybe", "yes/no"),
        ("inductor", "{max_autotune}", "a JSON object"),
        ("inductor", "[1]", "a JSON object"),
    ],
)
def test_malformed_environment_names_variable_value_and_range(name, text, accepts):
    with pytest.raises(OptionError) as caught:
        Options.from_mapping({}, environ={env_name(name): text})
    message = str(caught.value)
    assert message.startswith(f"environment variable {env_name(name)} must be ")
    assert repr(text) in message
    assert accepts in message


def test_explicit_beats_environment_beats_default():
    environ = {"MMI_RECALL": "0.8", "MMI_POLICY": "exact"}
    options = Options.from_mapping({"recall": 0.7}, environ=environ)
    assert (options.recall, options.policy, options.min_tokens) == (0.7, "exact", None)


def test_an_overridden_variable_is_not_read():
    assert Options.from_mapping({"recall": 0.7}, environ={"MMI_RECALL": "nonsense"}).recall == 0.7


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_variable_counts_as_unset(name):
    assert Options.from_mapping({}, environ={env_name(name): ""}) == Options()


def test_the_process_environment_is_the_default(monkeypatch):
    monkeypatch.setenv("MMI_RECALL", "0.75")
    assert Options.from_mapping().recall == 0.75


def test_the_mapping_is_copied():
    nested = {"max_autotune": True}
    options = Options.from_mapping({"inductor": nested}, environ={})
    nested["max_autotune"] = False
    assert options.inductor == {"max_autotune": True}


def test_unknown_variable_warns_once_with_the_nearest():
    environ = {"MMI_RECAL": "0.5"}
    with pytest.warns(OptionWarning, match=r'MMI_RECAL is no option of mmi_compile; did you mean "MMI_RECALL"\?'):
        Options.from_mapping({}, environ=environ)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Options.from_mapping({}, environ=environ)


def test_variables_of_other_use_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Options.from_mapping({}, environ=dict.fromkeys(NON_OPTIONS, "1") | {"OTHER": "1"})


def test_skip_passes_are_checked_against_the_pipeline():
    options = Options(skip_passes=("rewrit",))
    with pytest.raises(OptionError, match=r'unknown pass "rewrit"; did you mean "rewrite"\?'):
        options.check_passes(["canonicalize", "rewrite"])
    Options(skip_passes=("rewrite",)).check_passes(["canonicalize", "rewrite"])


def test_passes_until_is_checked_against_the_pipeline():
    with pytest.raises(OptionError, match=r'"passes_until" names an unknown pass "rewrit"; did you mean "rewrite"\?'):
        Options(passes_until="rewrit").check_passes(["canonicalize", "rewrite"])
    Options(passes_until="rewrite").check_passes(["canonicalize", "rewrite"])


def test_passes_until_and_skip_passes_may_not_contradict_each_other():
    with pytest.raises(OptionError, match=r'ends with the pass "rewrite", which "skip_passes" leaves out'):
        Options(passes_until="rewrite", skip_passes=("rewrite",))
    Options(passes_until="rewrite", skip_passes=("cleanup",))


@pytest.mark.parametrize("options", [{"passes_until": "canonicalize"}, {"skip_passes": ("find_attention",)}])
def test_strict_needs_the_pass_that_finds_attention(options):
    with pytest.raises(OptionError, match=r'"strict" needs the pass "find_attention"'):
        Options(strict=True, **options).check_passes(["canonicalize", "find_attention", "rewrite"])


@given(st.none() | st.integers(0, 4), st.sets(st.integers(0, 4)))
def test_which_passes_run(last, skipped):
    names = [f"p{i}" for i in range(5)]
    if last in skipped:
        return
    options = Options(passes_until=None if last is None else names[last], skip_passes=[names[i] for i in skipped])
    ran = [i for i in range(5) if options.runs_pass(names[i], names)]
    assert ran == [i for i in range(5) if i not in skipped and (last is None or i <= last)]


def test_json_holds_every_option_and_only_plain_values():
    options = Options(inner=a_backend, dump=Path("folder"), skip_passes=("cleanup",), inductor={"x": object})
    plain = options.to_json()
    assert list(plain) == NAMES
    assert plain["inner"] == f"{__name__}.a_backend"
    assert plain["dump"] == "folder"
    assert plain["skip_passes"] == ["cleanup"]
    assert json.loads(json.dumps(plain)) == plain


values = st.fixed_dictionaries(
    {},
    optional={
        "policy": st.sampled_from(["adaptive", "exact"]),
        "recall": st.floats(min_value=0, max_value=1, exclude_min=True),
        "min_tokens": st.integers(min_value=0, max_value=1 << 40),
        "max_density": st.floats(min_value=0, max_value=1, exclude_min=True),
        "inner": st.sampled_from(["inductor", "aot_eager", "eager"]),
        "strict": st.booleans(),
        "dense_tail": st.booleans(),
        "skip_passes": st.lists(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), max_size=3),
        "passes_until": st.from_regex(r"[A-Z_]{1,8}", fullmatch=True),
        "inductor": st.none() | st.dictionaries(st.text(max_size=4), st.booleans() | st.integers(), max_size=3),
    },
).filter(lambda mapping: mapping.get("passes_until") not in mapping.get("skip_passes", []))


def as_text(value: object) -> str:
    if isinstance(value, list):
        return ",".join(value)
    return value if isinstance(value, str) else json.dumps(value)


@given(values)
def test_environment_and_mapping_say_the_same(mapping):
    environ = {env_name(name): as_text(value) for name, value in mapping.items()}
    assert Options.from_mapping({}, environ=environ) == Options.from_mapping(mapping, environ={})


@given(values)
def test_json_gives_the_options_back(mapping):
    options = Options(**mapping)
    assert Options.from_mapping(options.to_json(), environ={}) == options


@given(values, values)
def test_digest_is_equal_exactly_when_what_shapes_code_is(left, right):
    a, b = Options(**left), Options(**right)
    same = dataclasses.replace(a, strict=False, dump=None) == dataclasses.replace(b, strict=False, dump=None)
    assert (a.digest() == b.digest()) == same


def test_digest_ignores_what_only_observes():
    assert Options(strict=True, dump="folder").digest() == Options().digest()
    assert len(Options().digest()) == 16


def test_digest_knows_which_passes_run():
    options = [Options(), Options(passes_until="rewrite"), Options(passes_until="cleanup"), Options(skip_passes=["x"])]
    assert len({each.digest() for each in options}) == len(options)


def test_digest_ignores_the_order_of_a_dict():
    assert Options(inductor={"a": 1, "b": 2}).digest() == Options(inductor={"b": 2, "a": 1}).digest()


def test_table_has_one_row_per_option():
    lines = options_table().splitlines()
    assert lines[0].startswith("| option | type | default | environment | meaning |")
    assert len(lines) == len(NAMES) + 2
    for name, line in zip(NAMES, lines[2:], strict=True):
        assert line.count("|") == 6
        assert f"`{name}`" in line
        assert f"`{env_name(name)}`" in line
