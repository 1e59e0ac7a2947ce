"""Two hundred generated configs that nobody should write: each ends with 0, 1 or 2 and one line, and changes no file.

Property-based and in process: hypothesis makes them of real settings, of values of every kind and of YAML's own tricks.
"""

import contextlib
import copy
import dataclasses
import hashlib
import io
import math

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recipe.cli import main
from recipe.settings import Settings
from tests.models import tiny_checkpoint
from tests.spoiled import Place

EXAMPLES = 200
KEYS = [f"{section}.{key}" for section, keys in Settings().to_dict().items() for key in keys]
SECTIONS = sorted({key.split(".")[0] for key in KEYS})
TRICKS = [
    "lora: {rank: 0x" + "f" * 5000 + "}",
    "lora: {rank: " + "9" * 5000 + "}",
    "train: {learning_rate: 1e999999}",
    "train: " + "[" * 600 + "]" * 600,
    "train: " + "{a: " * 600 + "}" * 600,
    "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\ntrain: *c",
    "train: &t {steps: *t}",
    "lora: &l\n  rank: 4\n  self: *l",
    "lora: &l [*l]",
    "base: &base {rank: 3}\nlora: {<<: *base, rank: 4}",
    "lora: {<<: {rank: -4}}",
    "lora: {<<: 5}",
    "<<: {lora: {rank: 0}}",
    "train: {steps: 5}\n---\ntrain: {steps: 6}",
    "train: !!python/object/apply:os.system ['touch pwned']",
    "train: !!python/name:os.system",
    "train: !unknown {steps: 1}",
    "lora: !!set {rank, alpha}",
    "lora: !!omap [rank: 4]",
    "lora: !!pairs [rank: 4]",
    "lora: {rank: !!binary 'AAAA'}",
    "lora: {rank: !!binary '*'}",
    "lora: {rank: !!int x}",
    "lora: {rank: !!float ''}",
    "lora: {rank: !!timestamp 'x'}",
    "lora: {rank: !!bool x}",
    "train: {steps: 2020-13-45}",
    "train: {steps: 190:20:30}",
    "? [a, b]\n: c",
    "? {a: b}\n: c",
    "lora:\n  ? [rank]\n  : 4",
    "lora:\n  ? {rank: 1}\n  : 4",
    "1: 2",
    "null: 5",
    "true: {steps: 1}",
    "lora: {1: 2}",
    "lora: {null: 2}",
    "lora: {.nan: 2}",
    "lora: {2020-01-01: 2}",
    "lora: {rank: 1, rank: 2}",
    "lora: {rank: 1}\nlora: {rank: 2}",
    "- lora\n- rank",
    "just text",
    "5",
    "''",
    "~",
    "%YAML 9.9\n---\nlora: {}",
    "%TAG ! tag:x,2000:\n---\n!x y",
    "lora:\n\trank: 4",
    "lora: {rank: 4",
    'lora: "\\ud800"',
    'model: {id: "\\0"}',
    'data: {path: "a\\nb"}',
    "data: {path: /dev/null}",
    "data: {path: /proc/self/mem}",
    "paths: {runs: /dev/null}",
    "paths: {models: /dev/null, runs: /proc}",
    "paths: {models: /dev/null/x}",
    "model: {id: /dev/null}",
    "model: {id: ..}",
    "model: {id: /}",
    "paths: {models: '" + "x" * 5000 + "'}",
    "data: {path: '" + "y" * 5000 + "'}",
    "data: {eval_path: '" + "z/" * 3000 + "'}",
    "data: {chat_template: /}",
    "eval: {prompts: [''], tasks: [1]}",
    "lora: {target_modules: [q_proj, q_proj]}",
    "lora: {target_modules: []}",
    "lora: {target_modules: {q_proj: 1}}",
    "train: {steps: null, epochs: 1e-300}",
    "train: {global_batch_tokens: 1073741824, micro_batch_tokens: 16777216}",
    "compute: {processes: 64, offload_layers: 1000, keep_layers: 1000}",
    "model: {revision: '../../../etc'}",
]

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 2**31, 2**63, -(2**70), 10**400]),
    st.floats(),
    st.sampled_from([math.nan, math.inf, -math.inf, -0.0, 1e308, 5e-324]),
    st.text(max_size=30),
    st.sampled_from(
        ["auto", "demo", "1e-4", "1_000", "..", "😀", "\u202e", "a" * 400, "x/y/z", "\x7f", "NaN", " "]
    ),
    st.dates(),
    st.binary(max_size=8),
)
junk = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(scalars, inner, max_size=3),
    max_leaves=6,
)
keys = st.sampled_from(KEYS) | st.builds("{}.{}".format, st.sampled_from(SECTIONS), st.text(max_size=8))


FIELDS = {
    f"{section.name}.{field.name}": field
    for section in dataclasses.fields(Settings)
    for field in dataclasses.fields(section.default_factory)
}


def extreme(key):
    """Values that the settings take, at the ends of their range, or any text where a text is taken."""
    field = FIELDS[key]
    limits = field.metadata
    if limits.get("choices"):
        one = st.sampled_from(limits["choices"])
        return st.lists(one, min_size=1, unique=True) if "list" in field.type else one
    if "bool" in field.type:
        return st.booleans()
    if "list" in field.type:
        return st.lists(st.text(min_size=1, max_size=20), max_size=3)
    numbers = [
        limits.get("low"),
        limits.get("high"),
        1,
        17,
        2**31,
        2**62,
        *([1e-300, 1e300] if "float" in field.type else []),
    ]
    low, high = limits.get("low", limits.get("above", -math.inf)), limits.get("high", math.inf)
    fitting = [
        number
        for number in numbers
        if number is not None and low <= number <= high and number != limits.get("above")
    ]
    if "int" in field.type or "float" in field.type:
        return st.sampled_from(fitting or numbers)
    return st.text(min_size=1, max_size=20) | st.sampled_from(
        ["demo", "nobody/nothing", "config.yaml", ".", "tiny"]
    )


@st.composite
def changed(draw, good):
    """The good config with some settings at their extremes, and perhaps one that is anything at all."""
    values = copy.deepcopy(good)
    for key in draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=3, unique=True)):
        section, _, name = key.partition(".")
        values.setdefault(section, {})[name] = draw(extreme(key))
    if draw(st.integers(0, 2)) == 0:
        section, _, name = draw(keys).partition(".")
        values.setdefault(section, {})[name] = draw(junk)
    return yaml.safe_dump(values, allow_unicode=draw(st.booleans())).encode("utf-8", "surrogatepass")


@st.composite
def from_nothing(draw):
    """Sections and keys, half of them known, with anything in them."""
    names = st.sampled_from(SECTIONS) | st.text(max_size=8)
    values = draw(
        st.dictionaries(names, junk | st.dictionaries(names, junk, max_size=3), min_size=1, max_size=3)
    )
    return yaml.safe_dump(values, allow_unicode=draw(st.booleans())).encode("utf-8", "surrogatepass")


def mostly(first, *others):
    """`first` three times of four."""
    return st.integers(0, 3).flatmap(lambda number: first if number else st.one_of(*others))


tricks = st.sampled_from(TRICKS).map(str.encode)
raw = st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass"))
overrides = st.lists(
    st.builds(lambda key, value: f"{key}={value}", keys, st.text(max_size=12) | scalars.map(str)), max_size=2
)
options = st.lists(
    st.tuples(
        st.sampled_from(["--gpus", "--vram-gib", "--ram-gib", "--gpu", "--kwh-price"]),
        st.sampled_from(
            [
                "0",
                "1",
                "-1",
                "nan",
                "inf",
                "-inf",
                "1e999",
                "24",
                "24,x",
                ",",
                "",
                "RTX 4090",
                "🂡",
                "9" * 5000,
            ]
        ),
    ),
    max_size=2,
).map(lambda pairs: [f"{name}={value}" for name, value in pairs])
commands = mostly(
    st.sampled_from(
        [
            ["train"],
            ["plan"],
            ["plan", "--json"],
            ["plan", "--gpus=2", "--vram-gib=24", "--ram-gib=64"],
            ["train", "--force"],
        ]
    ),
    st.text(max_size=6).map(lambda name: ["train", f"--run={name}"]),
    options.map(lambda more: ["plan", *more]),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, runs, and no data: a config that is right by chance is refused for want of rows."""
    root = tmp_path_factory.mktemp("malformed")
    made = Place(root, tiny_checkpoint(root / "source" / "tiny"), root)
    made.data.write_text("")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        yield made


def tree(place):
    """Every path with its content's hash, but for the config that is being spoilt."""
    return {
        str(path.relative_to(place.root)): hashlib.sha256(path.read_bytes()).digest()
        if path.is_file()
        else None
        for path in sorted(place.root.rglob("*"))
        if path != place.config
    }


def test_no_config_brings_a_traceback_or_changes_a_file(place):
    good = place.config.read_bytes()
    before = tree(place)
    seen = {0: 0, 1: 0, 2: 0}

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        mostly(changed(place.values), from_nothing(), tricks, raw), commands, mostly(st.just([]), overrides)
    )
    def check(config, command, changes):
        place.config.write_bytes(config)
        arguments = [*command, "--config=config.yaml", *(f"--set={change}" for change in changes)]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(arguments)  # what it raises is a traceback, and fails the test
        told = err.getvalue().splitlines()
        assert code in (0, 1, 2), told
        assert code != 0 or command[0] == "plan", "nothing can be trained here"
        if code == 2:
            assert len(told) == 1 and told[0].startswith("error: ") and len(told[0]) < 2000, told
            assert out.getvalue() == ""
        assert "Traceback" not in err.getvalue()
        assert tree(place) == before
        seen[code] += 1

    try:
        check()
    finally:
        place.config.write_bytes(good)
    assert seen[2] > EXAMPLES / 2, seen
    print(seen)


@pytest.mark.parametrize("trick", TRICKS, ids=lambda trick: trick[:40])
def test_each_trick_of_yaml_alone(trick, place):
    good = place.config.read_bytes()
    before = tree(place)
    try:
        for text in (trick, good.decode() + trick):
            place.config.write_text(text)
            err = io.StringIO()
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
                code = main(["train", "--config", "config.yaml"])
            assert code in (1, 2), err.getvalue()
            assert err.getvalue().splitlines()[-1].startswith("error: ")
            assert code == 1 or len(err.getvalue().splitlines()) == 1
            assert tree(place) == before
    finally:
        place.config.write_bytes(good)
