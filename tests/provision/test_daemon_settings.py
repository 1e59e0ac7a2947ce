"""Docker's daemon.json, which may be the user's: our settings into it, and out of it again."""

import importlib.util
import json

import pytest

from tests.provision.lab import ROOT

# As somebody may write it; its last line would have the engine find no driver in containerd's store.
USERS = '{"log-driver": "local",\n\t"features": {"buildkit": true, "cdi": false},\n\n "storage-driver":"overlay2" }'


def load_filters():
    spec = importlib.util.spec_from_file_location(
        "daemon_settings", ROOT / "ansible/roles/docker/filter_plugins/daemon_settings.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "before", ["", "{}", USERS, '{"runtimes": {"nvidia": {"path": "theirs"}}}', '{"features": {}}']
)
@pytest.mark.parametrize("runtime", [False, True])
def test_settings_come_back_to_the_byte_or_without_ours_where_they_were_changed_since(before, runtime):
    filters = load_filters()
    ours = filters.with_ours(json.loads(before or "{}"), runtime)
    assert ours["features"]["containerd-snapshotter"] and ours["features"]["cdi"]
    assert filters.with_ours(ours, runtime) == ours
    assert filters.without_ours(json.dumps(ours), before) == before

    changed = {**ours, "debug": True, "features": {**ours["features"], "theirs": True}}
    left = json.loads(filters.without_ours(json.dumps(changed), before))
    expected = {**json.loads(before or "{}"), "debug": True}
    expected["features"] = {**expected.get("features", {}), "theirs": True}
    assert left == expected
    assert filters.without_ours(before, before) == before
