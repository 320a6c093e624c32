"""Help texts of the data tools."""

import pytest

from data_tools.__main__ import main


@pytest.mark.parametrize("command", ["render", "validate", "inspect", "repack", "merge", "demo-assets"])
def test_the_help_names_defaults_that_there_are_and_no_others(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    said = capsys.readouterr().out
    assert not {"None", "False", "%"} & set(said.replace("(", " ").replace(")", " ").split())
    if command == "render":
        assert "views per object (default: 16)" in said
