"""ansible/library/before.py as Ansible runs it: what a setting was before us is kept once, told, and forgotten."""

from tests.provision.ansible_calls import ansible


def test_the_first_value_is_kept_until_it_is_forgotten(tmp_path):
    folder = tmp_path / "state"
    file = folder / "before/swappiness"
    about = {"name": "swappiness", "folder": str(folder)}

    def call(*options: str, **arguments: str) -> tuple[bool, bool, str | None]:
        result = ansible(tmp_path, "before", *options, **about, **arguments)
        return result["changed"], result["known"], result["value"]

    assert call("--check", value="60") == (True, False, "60")
    assert not folder.exists()
    assert call(value="60") == (True, False, "60")
    assert file.read_text() == "60"
    assert call(value="10") == (False, True, "60")
    assert [path.name for path in file.parent.iterdir()] == ["swappiness"] and file.read_text() == "60"
    assert call(state="absent") == (True, True, None)
    assert not file.exists()
