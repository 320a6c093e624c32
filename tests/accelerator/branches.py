"""Find the branches for accelerators, and record which of them the tests have run.

A question about the device is a call of a function of ``lrm_pl/kernels/device.py`` whose answer is ``on_cpu``'s. What
hangs on it must run on both sides: RECORD stands in the place of ``device.HOST_TYPES``, notes who asks and what the
answer is, and traces the lines that run in files that ask.
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
class Question:
    """A call that checks whether a device is a CPU: its file, function and lines."""

    file: str
    function: str
    first: int
    last: int

    def __str__(self):
        return f"{self.file}:{self.first} in {self.function}"


@dataclasses.dataclass(frozen=True)
class Statement:
    """A statement that runs only on some devices: one inside an ``if`` on such a check."""

    file: str
    first: int
    last: int

    def __str__(self):
        return f"{self.file}:{self.first}"


def functions_that_ask(name, source):
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
    def __init__(self, file, asking):
        self.file, self.asking = file, asking
        self.questions, self.statements = [], []
        self._names = []
        self._imported = set(asking) if file == DEVICE_FILE else set()

    def visit_ClassDef(self, node):
        self._names.append(node.name)
        self.generic_visit(node)
        self._names.pop()

    visit_FunctionDef = visit_ClassDef

    def visit_ImportFrom(self, node):
        if node.module == DEVICE_MODULE:
            self._imported |= {alias.asname or alias.name for alias in node.names} & self.asking

    def _asks(self, node):
        return isinstance(node.func, ast.Name) and node.func.id in self._imported

    def visit_Call(self, node):
        if self._asks(node):
            function = ".".join(self._names)
            self.questions.append(Question(self.file, function, node.lineno, node.end_lineno))
        self.generic_visit(node)

    def visit_If(self, node):
        if any(isinstance(part, ast.Call) and self._asks(part) for part in ast.walk(node.test)):
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
    asking = functions_that_ask(name, source)
    if name == "on_cpu":
        asking -= functions_that_ask("on_cuda", source)
    questions, statements = [], []
    for path in sorted((ROOT / "lrm_pl").rglob("*.py")):
        more = find_in(str(path.relative_to(ROOT)), path.read_text(), asking)
        questions += more[0]
        statements += more[1]
    return questions, statements


def find_in(file, source, asking=frozenset({"on_cpu"})):
    """List checks and statements of a file."""
    finder = _Finder(file, asking)
    finder.visit(ast.parse(source))
    return finder.questions, finder.statements


@functools.cache
def _asking_files():
    return {str(ROOT / question.file) for question in find()[0]}


class Record:
    """Replacement of ``device.HOST_TYPES`` that records its use.

    Attributes:
        types: The device types that are CPUs.
        answers: (file, line) -> answers given there.
        lines: (file, line) that ran.
    """

    def __init__(self):
        self.types = frozenset({"cpu"})
        self.answers, self.lines = {}, set()

    def __contains__(self, kind):
        answer = kind in self.types
        frame = sys._getframe(1)  # on_cpu
        while Path(frame.f_code.co_filename) == ROOT / DEVICE_FILE and frame.f_back is not None:
            frame = frame.f_back
            self.answers.setdefault((frame.f_code.co_filename, frame.f_lineno), set()).add(answer)
        return answer

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
        return self._line if frame.f_code.co_filename in _asking_files() else None

    def _line(self, frame, event, argument):
        if event == "line":
            self.lines.add((frame.f_code.co_filename, frame.f_lineno))
        return self._line

    def missing(self, questions, statements):
        """List the checks that did not have both results, and the statements that did not run."""
        found = []
        for question in questions:
            path, lines = str(ROOT / question.file), range(question.first, question.last + 1)
            answers = set().union(*(self.answers.get((path, line), ()) for line in lines))
            sides = {False: "as an accelerator", True: "as a CPU"}
            found += [f"{question} was not asked {sides[side]}" for side in sides if side not in answers]
        for statement in statements:
            path, lines = str(ROOT / statement.file), range(statement.first, statement.last + 1)
            if not any((path, line) in self.lines for line in lines):
                found.append(f"{statement} did not run")
        return found


RECORD = Record()
