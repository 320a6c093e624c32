"""Help texts of the data tools."""

import pytest

from data_tools.__main__ import main


@pytest.mark.parametrize("command", ["render", "validate", "inspect", "repack", "merge", "demo-assets"])
def test_help_texts_contain_only_existing_defaults(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    said = capsys.readouterr().out
    assert not {"None", "False", "%"} & set(said.replace("(", " ").replace(")", " ").split())
    if command == "render":
        assert "views per object (default: 16)" in said
