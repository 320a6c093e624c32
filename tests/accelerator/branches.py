"""Find the branches for accelerators, and record which of them the tests have run.

A device check is a call of a function in ``lrm_pl/kernels/device.py`` whose result depends on ``on_cpu``. Both results
of each check and all statements that depend on a check must occur in the tests. ``RECORD`` replaces
``device.HOST_TYPES``, records the location and the result of each check, and traces the lines that run in files with
device checks.
"""

import ast
import contextlib
import dataclasses
import functools
import sys
import threading
from pathlib import Path

from tests import ROOT

DEVICE_FILE = "lrm_pl/kernels/device.py"
DEVICE_MODULE = "lrm_pl.kernels.device"


@dataclasses.dataclass(frozen=True)
class Check:
    """A call that checks whether a device is a CPU, with its file, function and lines."""

    file: str
    function: str
    first: int
    last: int

    def __str__(self):
        return f"{self.file}:{self.first} in {self.function}"


@dataclasses.dataclass(frozen=True)
class Statement:
    """A statement inside an ``if`` statement whose condition is a device check."""

    file: str
    first: int
    last: int

    def __str__(self):
        return f"{self.file}:{self.first}"


def functions_that_check(name, source):
    """List the functions of the device file whose result depends on ``name``, including itself."""
    calls = {
        node.name: {c.func.id for c in ast.walk(node) if isinstance(c, ast.Call) and isinstance(c.func, ast.Name)}
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef)
    }  # fmt: skip
    found = {name}
    while more := {f for f, called in calls.items() if called & found} - found:
        found |= more
    return found


class _Finder(ast.NodeVisitor):
    def __init__(self, file, checking):
        self.file, self.checking = file, checking
        self.checks, self.statements = [], []
        self._names = []
        self._imported = set(checking) if file == DEVICE_FILE else set()

    def visit_ClassDef(self, node):
        self._names.append(node.name)
        self.generic_visit(node)
        self._names.pop()

    visit_FunctionDef = visit_ClassDef

    def visit_ImportFrom(self, node):
        if node.module == DEVICE_MODULE:
            self._imported |= {alias.asname or alias.name for alias in node.names} & self.checking

    def _is_check(self, node):
        return isinstance(node.func, ast.Name) and node.func.id in self._imported

    def visit_Call(self, node):
        if self._is_check(node):
            function = ".".join(self._names)
            self.checks.append(Check(self.file, function, node.lineno, node.end_lineno))
        self.generic_visit(node)

    def visit_If(self, node):
        if any(isinstance(part, ast.Call) and self._is_check(part) for part in ast.walk(node.test)):
            below = [part for kept in (*node.body, *node.orelse) for part in ast.walk(kept)]
            self.statements += [
                Statement(self.file, part.lineno, part.end_lineno)
                for part in below
                if isinstance(part, ast.stmt) and not isinstance(part, ast.Nonlocal | ast.Global)
            ]
        self.generic_visit(node)


def find(name="on_cpu"):
    """List checks and statements of the package, including checks for CUDA."""
    source = (ROOT / DEVICE_FILE).read_text()
    checking = functions_that_check(name, source)
    if name == "on_cpu":
        checking -= functions_that_check("on_cuda", source)
    checks, statements = [], []
    for path in sorted((ROOT / "lrm_pl").rglob("*.py")):
        more = find_in(str(path.relative_to(ROOT)), path.read_text(), checking)
        checks += more[0]
        statements += more[1]
    return checks, statements


def find_in(file, source, checking=frozenset({"on_cpu"})):
    """List checks and statements of a file."""
    finder = _Finder(file, checking)
    finder.visit(ast.parse(source))
    return finder.checks, finder.statements


@functools.cache
def _files_with_checks():
    return {str(ROOT / check.file) for check in find()[0]}


class Record:
    """Replacement of ``device.HOST_TYPES`` that records its use.

    Attributes:
        types: The device types that are CPUs.
        results: Set of results by (file, line).
        lines: Lines that ran, as (file, line).
    """

    def __init__(self):
        self.types = frozenset({"cpu"})
        self.results, self.lines = {}, set()

    def __contains__(self, kind):
        result = kind in self.types
        frame = sys._getframe(1)  # on_cpu
        while Path(frame.f_code.co_filename) == ROOT / DEVICE_FILE and frame.f_back is not None:
            frame = frame.f_back
            self.results.setdefault((frame.f_code.co_filename, frame.f_lineno), set()).add(result)
        return result

    def __iter__(self):
        return iter(self.types)

    @contextlib.contextmanager
    def tracing(self):
        """Record the lines that run, in this thread and in threads that it starts."""
        before = sys.gettrace()
        sys.settrace(self._enter)
        threading.settrace(self._enter)
        try:
            yield
        finally:
            sys.settrace(before)
            threading.settrace(before)

    def _enter(self, frame, event, argument):
        return self._line if frame.f_code.co_filename in _files_with_checks() else None

    def _line(self, frame, event, argument):
        if event == "line":
            self.lines.add((frame.f_code.co_filename, frame.f_lineno))
        return self._line

    def missing(self, checks, statements):
        """List the checks that did not have both results, and the statements that did not run."""
        found = []
        for check in checks:
            path, lines = str(ROOT / check.file), range(check.first, check.last + 1)
            results = set().union(*(self.results.get((path, line), ()) for line in lines))
            sides = {False: "as an accelerator", True: "as a CPU"}
            found += [f"{check} was not called {sides[side]}" for side in sides if side not in results]
        for statement in statements:
            path, lines = str(ROOT / statement.file), range(statement.first, statement.last + 1)
            if not any((path, line) in self.lines for line in lines):
                found.append(f"{statement} did not run")
        return found


RECORD = Record()
