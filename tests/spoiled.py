"""A place where a run could begin, and the ways in which its model, data or config are spoiled."""

import json
import shutil
import struct
from pathlib import Path

import yaml

USER = {"role": "user", "content": "hello"}
ANSWER = {"role": "assistant", "content": "world"}
GOOD_ROW = {"messages": [USER, ANSWER]}


class Place:
    """A folder with a model, a data set, a config and three runs; a case spoils one of them."""

    def __init__(self, root: Path, checkpoint: Path, quantised: Path):
        self.root = root
        self.quantised = quantised
        self.model = Path(shutil.copytree(checkpoint, root / "tiny"))
        self.data = root / "data.jsonl"
        self.write_rows(*[GOOD_ROW] * 40)
        self.config = root / "config.yaml"
        self.values = {
            "model": {"id": str(self.model)},
            "data": {"path": str(self.data), "max_length": 32},
            "train": {"steps": 2, "global_batch_tokens": 64, "micro_batch_tokens": 32},
            "paths": {"models": str(root / "models"), "runs": str(root / "runs")},
        }
        self.set()
        for name in ("finished", "unfinished"):
            run = root / "runs" / name
            run.mkdir(parents=True)
            shutil.copyfile(self.config, run / "config.yaml")
        (root / "runs" / "finished" / "summary.json").write_text('{"checkpoint": "step-000002"}')
        (root / "runs" / "no-run").mkdir()
        (root / "runs" / "no-run" / "notes.txt").write_text("mine")

    def set(self, **changes):
        """Change settings, named `section__key`, in the config."""
        for name, value in changes.items():
            section, _, key = name.partition("__")
            self.values.setdefault(section, {})[key] = value
        self.config.write_text(yaml.safe_dump(self.values))

    def prepare(self):
        """What `recipe prepare` has made before."""
        return Path(shutil.copytree(self.quantised, self.root / "models" / "tiny-nf4"))

    def write_rows(self, *rows):
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def edit_json(self, name, **changes):
        path = self.model / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def everything(self):
        return {
            str(path.relative_to(self.root)): path.read_bytes() if path.is_file() else None
            for path in self.root.rglob("*")
        }


def nothing(place):
    pass


def rows(*values):
    """A good row, then these, for a model that is prepared already."""

    def spoil(place):
        place.prepare()
        place.write_rows(GOOD_ROW, *values)

    return spoil


def settings(**changes):
    return lambda place: place.set(**changes)


def config(text):
    return lambda place: place.config.write_text(text)


def model_json(name, **changes):
    return lambda place: place.edit_json(name, **changes)


def without(*names):
    return lambda place: [(place.model / name).unlink() for name in names]


def config_bytes(place):
    place.config.write_bytes("model: dämo\n".encode("latin-1"))


def data_bytes(place):
    place.data.write_bytes('{"text": "dämlich"}\n'.encode("latin-1"))


def index_of_a_missing_shard(place):
    (place.model / "model.safetensors").rename(place.model / "model-00001-of-00002.safetensors")
    files = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (place.model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def cut_weights(place):
    weights = place.model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


def weights_of_another_model(place):
    place.edit_json("config.json", intermediate_size=192)


def tensor_gone(place):
    """The header forgets the last norm; its bytes stay."""
    weights = place.model / "model.safetensors"
    raw = weights.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = raw[8 : 8 + size].replace(b'"model.norm.weight"', b'"model.morn.weight"')
    weights.write_bytes(raw[:8] + header + raw[8 + size :])


def no_chat_template(place):
    folder = place.prepare()
    (folder / "chat_template.jinja").unlink()
    record = json.loads((folder / "prepare.json").read_text())
    del record["files"]["chat_template.jinja"]
    (folder / "prepare.json").write_text(json.dumps(record))


def broken_template(place):
    place.prepare()
    (place.root / "bad.jinja").write_text("{% for m in messages %}")
    place.set(data__chat_template="bad.jinja")


def strict_template(place):
    place.prepare()
    (place.root / "strict.jinja").write_text("{{ raise_exception('no system turns') }}")
    place.set(data__chat_template="strict.jinja")


def too_little_data(place):
    place.prepare()
    place.write_rows({"text": "a"}, {"text": "b"})


def tokenizer_without_eos(place):
    path = place.prepare() / "tokenizer_config.json"
    values = json.loads(path.read_text())
    values.pop("eos_token")
    path.write_text(json.dumps(values))
    record = path.parent / "prepare.json"
    values = json.loads(record.read_text())
    values["files"]["tokenizer_config.json"]["bytes"] = path.stat().st_size
    record.write_text(json.dumps(values))


def prepared_file_gone(place):
    (place.prepare() / "tokenizer.json").unlink()


def prepared_file_cut(place):
    weights = next(place.prepare().glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])


def a_nonsense_model_folder(place):
    shutil.rmtree(place.model)
    place.model.mkdir()
