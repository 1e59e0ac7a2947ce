"""The page in a real Chromium: what it shows is what metrics.jsonl has, it asks nobody for anything, it runs no data."""

import json
import struct

import pytest

from recipe.cli import main
from tests.report.conftest import on_two_gpus
from tests.train.tiny_run import jsonl

WIDE, PHONE = (1400, 900), (360, 800)
MOST_BYTES = 3 * 10**6
BAD = '<script>window.caught = 1</script><img src=x onerror="window.caught = 2"></script>'
# The data of the live page's charts, and where they are drawn.
DRAWN = """(() => {
  const doc = Bokeh.documents[0];
  const plain = (value) => Number.isNaN(value) ? null : value;
  const columns = (name) => Object.fromEntries(Object.entries(doc.get_model_by_name(name).data)
    .map(([key, values]) => [key, Array.from(values, plain)]));
  return {steps: columns("steps"), evaluations: columns("evaluations")};
})()"""


def report(runs, *more):
    assert main(["report", "--set", f"paths.runs={runs}", "--run", "tracked", *more]) == 0
    return runs / "tracked" / "report.html"


@pytest.mark.parametrize("dark", (False, True), ids=("light", "dark"))
@pytest.mark.parametrize("size", (WIDE, PHONE), ids=("wide", "phone"))
def test_the_page_shows_what_metrics_have(runs, browser, size, dark, tmp_path):
    page = report(runs)
    assert page.stat().st_size < MOST_BYTES
    browser.open(page.as_uri(), *size, dark)
    lines, drawn = jsonl(runs / "tracked/metrics.jsonl"), browser.js(DRAWN)
    for name in (
        "step",
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens_per_second",
        "step_seconds",
        "host_ram_gib",
    ):
        assert drawn["steps"][name] == [line[name] for line in lines], name
    held_out = {
        event["step"]: event["loss"]
        for event in jsonl(runs / "tracked/events.jsonl")
        if event["kind"] == "evaluation"
    }
    assert dict(zip(drawn["evaluations"]["step"], drawn["evaluations"]["loss"], strict=True)) == held_out
    assert browser.js("JSON.parse(document.getElementById('series').textContent)") == drawn
    assert f"{lines[-1]['step']}" in browser.js("document.getElementById('tiles').innerText")
    assert browser.js("document.getElementById('state').innerText") == "finished"
    # Every chart has something of its line's colour on it, in front of the right ground.
    assert browser.js("document.querySelectorAll('.plot').length") >= 5
    ground = browser.js("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) < 150) == dark
    assert browser.js("document.documentElement.scrollWidth <= innerWidth")
    assert browser.complaints == [] and browser.requests == [page.as_uri()]
    browser.picture(tmp_path / "page.png")
    assert struct.unpack(">II", (tmp_path / "page.png").read_bytes()[16:24]) == size


def test_hovering_says_the_step_and_its_numbers(runs, browser):
    browser.open(report(runs).as_uri(), *WIDE, dark=True)
    x, y, width, height = browser.js(
        "(() => { const at = document.getElementById('chart-loss').getBoundingClientRect(); "
        "return [at.x, at.y, at.width, at.height] })()"
    )
    browser.move(x + width / 2, y + height / 2)
    browser.wait_for("document.querySelector('.bk-Tooltip')?.shadowRoot.textContent.includes('step')")
    said = browser.js(
        "[...document.querySelectorAll('.bk-Tooltip')].map(tip => tip.shadowRoot.textContent).join(' ')"
    )
    assert any(f"{line['loss']:.4f}" in said for line in jsonl(runs / "tracked/metrics.jsonl")), said
    assert browser.complaints == []


def test_nothing_in_data_runs(runs, browser):
    run = runs / "tracked"
    on_two_gpus(run)
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["model"]["name"] = BAD
    (run / "manifest.json").write_text(json.dumps(manifest | {"gpus": [BAD]}))
    (run / "samples.jsonl").write_text(
        json.dumps({"step": BAD, "prompt": BAD, "reference": "r", "answer": BAD}) + "\n"
    )
    (run / "eval.json").write_text(json.dumps({"samples": [{"prompt": BAD, "base": BAD, "tuned": BAD}]}))
    (run / "data/stats.json").write_text(json.dumps({"rows": 1, "sources": [{"path": BAD}]}))
    with open(run / "events.jsonl", "a") as events:
        events.write(json.dumps({"time": 1.8e9, "kind": BAD, "message": BAD}) + "\n")
    with open(run / "config.yaml", "a") as config:
        config.write(f"# {BAD}\n")
    browser.open(report(runs).as_uri(), *WIDE)
    assert browser.js("document.querySelectorAll('img, [onerror]').length") == 0
    assert browser.js("window.caught") is None
    assert (
        browser.js("document.querySelectorAll('script').length") == 4
    )  # two of JSON, bokeh's and the page's
    assert browser.js("document.body.innerText").count("window.caught = 1") >= 7
    assert browser.complaints == []


def test_a_script_that_got_into_the_page_would_not_run(runs, browser):
    """The page's own policy names its scripts by their hashes."""
    page = report(runs)
    page.write_text(page.read_text().replace("<footer", f"{BAD}<footer"))
    browser.open(page.as_uri(), *WIDE)
    assert browser.js("window.caught") is None
    assert any("Content Security Policy" in text for text in browser.complaints)


def test_a_killed_run_of_two_gpus(runs, browser, capsys):
    on_two_gpus(runs / "tracked")
    lengths = {"edges": [0, 512, 1024], "counts": [30, 10]}
    statistics = {
        "rows": 40,
        "tokens": 9000,
        "in_loss": 4000,
        "held_out_rows": 4,
        "fill": 0.981,
        "lengths": lengths,
    }
    (runs / "tracked/data/stats.json").write_text(json.dumps(statistics))
    page = report(runs, "--kwh-price", "0.5", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["state"] == "failed" and found["bytes"] == page.stat().st_size
    assert found["kwh"] == pytest.approx(300 * 600 * 54 / 3.6e6)  # 600 W for 300 steps of 54 s
    assert found["roofline_share"] == pytest.approx(301 / (16384 / 26.4))
    browser.open(page.as_uri(), *PHONE)
    text = browser.js("document.body.innerText")
    for words in (
        "failed",
        "2 × NVIDIA GeForce RTX 3090",
        "2.700 kWh",
        "1.35 at 0.5 a kWh",
        "49% of the roofline",
        "98.1 %",
        "512–1,024",
        "killed by SIGKILL",
        "-0.7 %",
    ):
        assert words in text, words
    drawn = browser.js(DRAWN)["steps"]
    assert drawn["temperature_celsius_0"][:3] == [71, 72, 73] and set(drawn["temperature_celsius_1"]) == {
        None
    }
    assert drawn["power_watts_1"] == [260] * 300
    assert drawn["grad_norm"][6] is None  # infinite: left out, not drawn as nought
    places = browser.js("[...document.querySelectorAll('.plot')].map(place => place.id)")
    assert {"chart-vram", "chart-temperature", "chart-power"} <= set(places)
    assert browser.js("document.documentElement.scrollWidth <= innerWidth") and browser.complaints == []
