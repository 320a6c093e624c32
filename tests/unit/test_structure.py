"""The structure of the tests themselves."""

import ast

import pytest

from tests import ROOT

MODULES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py"))


@pytest.mark.parametrize("module", MODULES)
def test_no_test_module_imports_another(module):
    for node in ast.walk(ast.parse((ROOT / module).read_text())):
        if isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(name.name for name in node.names)]
            assert node.module is None or not (
                names[0] == "tests" and any(n.startswith("test_") for n in names)
            )


def test_benchmarks_can_be_imported():
    import tests.bench.__main__  # noqa: F401


def test_no_file_has_more_than_400_lines():
    lines = {path: len(path.read_text().splitlines()) for path in (ROOT / "tests").rglob("*.py")}
    assert {path: count for path, count in lines.items() if count > 400} == {}
