"""What ansible/filter_plugins/verdicts.py makes of the checks' rows: the table, the last words, what is excused."""

import re

import pytest

from tests.provision.ansible_calls import ansible
from tests.provision.verdict_cases import CHOICES, FILTERS, PLAN, SETTINGS, UBUNTU_22, changed


def bad_host() -> list[dict]:
    machine = {
        "secure_boot": "on",
        "desktop": {"active": True, "manager": "gdm3"},
        "driver.runfile": True,
        "gpus.1.link_width_max": 1,
        "driver.foreign_sources": [
            "/etc/apt/sources.list.d/cuda-ubuntu2204-x86_64.list",
            "/etc/apt/sources.list.d/ppa.list",
        ],
    }
    choices = {
        "unreachable": [
            {"url": "https://" + "long." * 30 + "example.org/", "for": "the driver", "error": "timed out"}
        ]
    }
    return FILTERS["verdicts"](changed(UBUNTU_22, machine), changed(CHOICES, choices), PLAN, SETTINGS)


def test_the_table_is_aligned_and_at_most_100_columns_wide():
    rows = bad_host()
    lines = FILTERS["verdict_table"](rows).splitlines()
    assert max(map(len, lines)) <= 100
    heads = [line for line in lines[:-1] if not line.startswith(" ")]
    assert len(heads) == len(rows)
    column = len("ok    ") + max(len(row["check"]) for row in rows) + 2
    for line, row in zip(heads, rows, strict=True):
        assert line[6:column].strip() == row["check"] and line[column] == row["found"][0]
        assert line[:4].strip().lower() == row["status"]
    remedies = [line for line in lines if line.startswith(" " * column + "-> ")]
    assert len(remedies) == sum(bool(row["remedy"]) and row["status"] in ("warn", "fail") for row in rows)
    text = re.sub(r"\s+", " ", " ".join(lines))
    assert "-> `sudo nvidia-uninstall`, reboot, and provision again" in text


def test_the_closing_line_counts():
    rows = bad_host()
    count = {status: sum(row["status"] == status for row in rows) for status in ("ok", "warn", "fail")}
    last = FILTERS["verdict_table"](rows).splitlines()[-1]
    assert last == f"{count['ok']} ok, {count['warn']} warnings, {count['fail']} failed"
    assert count["fail"] == 3 and count["warn"] >= 4
    assert FILTERS["verdict_table"]([]) == "0 ok, 0 warnings, 0 failed\n"


def test_the_last_words_name_every_failed_check_and_no_other():
    first, *others = FILTERS["failed"](bad_host()).splitlines()
    assert first == "3 checks failed"
    assert [line.partition(":")[0] for line in others] == ["secure boot", "driver", "network"]
    assert re.fullmatch(
        r"driver: .*; expected branch 580 or newer of apt, or none; `sudo nvidia-uninstall`.*", others[1]
    )
    assert FILTERS["failed"](FILTERS["verdicts"](UBUNTU_22, CHOICES, PLAN, SETTINGS)) == ""


def test_excused_checks_warn_and_still_say_what_to_do():
    rows = bad_host()
    excused = FILTERS["excused"](rows, ["driver", "network", "nouveau", "ok", "no such check"])
    changed_rows = [(was, now) for was, now in zip(rows, excused, strict=True) if was != now]
    assert [now["check"] for _, now in changed_rows] == ["driver", "network"]
    for was, now in changed_rows:
        assert was["status"] == "fail" and now["status"] == "warn"
        assert now == was | {"status": "warn", "remedy": f"ignored, as checks_ignore says; {was['remedy']}"}
    assert FILTERS["failed"](excused).splitlines()[0] == "1 check failed"
    assert FILTERS["excused"](rows, []) == rows == bad_host()  # and the rows that came in are as they were


REFUSED = "Status code was -1 and not [200]: Request failed: <urlopen error [Errno 111] Connection refused>"


@pytest.mark.parametrize(
    "status, message, error",
    [
        (-1, REFUSED, "[Errno 111] Connection refused"),
        (
            -1,
            "Status code was -1 and not [200]: Connection failure: timed out",
            "Connection failure: timed out",
        ),
        (
            407,
            "Status code was 407 and not [200]: HTTP Error 407: Proxy Authentication Required",
            "HTTP Error 407: Proxy Authentication Required",
        ),
        (None, "MODULE FAILURE", "MODULE FAILURE"),
        (None, None, "no answer"),
        (200, "OK (0 bytes)", None),
        (301, "", None),
        (403, "Status code was 403 and not [200]: HTTP Error 403: Forbidden", None),
        (404, "Status code was 404 and not [200]: HTTP Error 404: Not Found", None),
    ],
)
def test_unreachable_is_what_gives_no_answer(status, message, error):
    """Answers as ansible.builtin.uri gives them."""
    item = {"url": "https://example.org/key", "for": "Docker"}
    answer = {key: value for key, value in (("status", status), ("msg", message)) if value is not None}
    expected = [] if error is None else [item | {"error": error}]
    assert FILTERS["unreachable"]([answer | {"item": item}]) == expected
    assert item.keys() == {"url", "for"}


def test_unreachable_places_become_rows_of_the_table():
    answers = [
        {"item": {"url": f"https://{name}.example.org/", "for": name}, "status": status, "msg": REFUSED}
        for name, status in (("driver", -1), ("Docker", 200), ("models", -1))
    ]
    choices = CHOICES | {"unreachable": FILTERS["unreachable"](answers)}
    found = FILTERS["failed"](FILTERS["verdicts"](UBUNTU_22, choices, PLAN, SETTINGS)).splitlines()
    assert [line.partition(" (")[0] for line in found] == [
        "2 checks failed",
        "network: no network for driver: https://driver.example.org/",
        "network: no network for models: https://models.example.org/",
    ]


def test_a_mirror_is_asked_through_apts_own_proxy():
    url = "http://deb.debian.org/debian"
    general, own = (
        "Acquire::http::Proxy=http://cache:3142",
        "acquire::HTTP::proxy::deb.debian.org=http://own:1/",
    )
    proxy = FILTERS["apt_proxy"]
    assert proxy([general], url) == {"http_proxy": "http://cache:3142", "no_proxy": ""}
    assert proxy([general, own, "Acquire::http::Proxy::=x"], url)["http_proxy"] == "http://own:1/"
    assert proxy([general], "https://deb.debian.org/debian") == {}
    assert proxy([general, "Acquire::http::Proxy::deb.debian.org=DIRECT"], url) == {}
    for none in (
        [],
        [""],
        ["Acquire::http::Proxy="],
        ["Acquire::http::Proxy=socks5h://a:1"],
        ["Acquire::http="],
    ):
        assert proxy(none, url) == {}


def test_ansible_finds_the_filters(tmp_path):
    """It loads them by their path; that judging/ can be imported is up to them."""
    filters = "{{ {} | verdicts | excused(['gpu']) | verdict_table }}{{ {} | verdicts | failed }}{{ [] | unreachable }}"
    text = ansible(tmp_path, "debug", msg=filters)["msg"]
    assert "WARN  gpu " in text and "-> ignored, as checks_ignore says; " in text
    assert "checks failed\nrelease: unknown; expected one of Debian 12" in text and text.endswith("[]")
