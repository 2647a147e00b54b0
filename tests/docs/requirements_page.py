"""docs/requirements.md: every promise, where it is kept, the tests that hold it, and how they ended.

python -m tests.docs.requirements_page                       prints the page, without results
python -m tests.docs.requirements_page --write               runs the tests of all rows, then writes the page
python -m tests.docs.requirements_page --write --junit FILE  takes the results of runs with pytest --junit-xml=FILE

Words and places come from tests/docs/requirements.yaml; tests are found by their mark, or by their name.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

import yaml

from tests.docs.capacity_table import table
from tests.docs.pages import ROOT

PAGE = ROOT / "docs" / "requirements.md"
TABLE = Path(__file__).with_name("requirements.yaml")
MARK = "pytest.mark.requirement"
NAMED = re.compile(r"test_(?:(R[0-3])_(\d\d)|([CDG])(\d+))_")
SECTIONS = {
    "R0": "A sparse layer: router, capacity, balance loss",
    "R1": "A layer for users of a library, with diagnostics",
    "R2": "Attention whose experts are attentions",
    "R3": "A router and a layer for transformers",
    "C": "Where the sources disagree, and the reading taken",
    "D": "Defects of the sources that are not shared",
    "G": "Tables of numbers",
}
RESULTS = "Last results: "
INTRODUCTION = """\
# What is promised, and the tests that hold it

Four earlier systems promised what this one owes: a sparse layer with a capacity limit (R0), a layer API with \
diagnostics (R1), a mixture of attention experts (R2), and a router and layer for transformers (R3). Where they \
disagree with each other or with the papers, C says which reading is taken; D are their defects, G the numbers to \
check against. A row that is met in another way than it was asked says how, and why.

This page is made by `python -m tests.docs.requirements_page --write`, which runs the tests of every row.
"""


@dataclasses.dataclass(frozen=True)
class Row:
    """One promise.

    Attributes:
        asks: what must hold.
        where: files, names and keys that hold it.
        differs: how, and why, it is met otherwise than asked; empty where it is met as asked.
    """

    asks: str
    where: tuple[str, ...] = ()
    differs: str = ""


def read_table() -> dict[str, Row]:
    """The rows by id, in order."""
    rows = yaml.safe_load(TABLE.read_text())
    return {name: Row(**{**row, "where": tuple(row.get("where", ()))}) for name, row in rows.items()}


def rows_of_sources() -> dict[str, list[str]]:
    """Row -> node ids, read from the sources: a run may have collected a part of the tests only."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for name, node in tests_in(ast.parse(path.read_text())):
            for row in dict.fromkeys([*named_rows(node.name), *marked_rows(node)]):
                found[row].append(f"{path.relative_to(ROOT).as_posix()}::{name}")
    return found


def tests_in(parent: ast.Module | ast.ClassDef) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Tests of a module and of its classes, by their names below it: ``test_a``, ``TestB::test_c``."""
    for node in parent.body:
        if isinstance(node, ast.ClassDef):
            yield from ((f"{node.name}::{name}", test) for name, test in tests_in(node))
        elif isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node.name, node


def named_rows(test: str) -> list[str]:
    """The row that a test is named after.

    >>> named_rows("test_R1_35_diagnostics"), named_rows("test_D10_once")
    (['R1-35'], ['D10'])
    """
    match = NAMED.match(test)
    if match is None:
        return []
    source, number, letter, count = match.groups()
    return [f"{source}-{number}" if source else f"{letter}{count}"]


def marked_rows(node: ast.FunctionDef) -> Iterator[str]:
    """The rows of a test's marks."""
    for decorator in node.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == MARK:
            yield from (ast.literal_eval(row) for row in decorator.args)


def read_results(files: Sequence[Path]) -> dict[str, list[str]]:
    """Node id without parameters -> how each of its cases ended: ``pass``, ``fail`` or ``skip``; where several files
    have a test, as in the last of them."""
    results: dict[str, list[str]] = {}
    for file in files:
        results |= read_run(file)
    return results


def read_run(junit: Path) -> dict[str, list[str]]:
    """The same of one file."""
    ends: dict[str, list[str]] = defaultdict(list)
    for case in ElementTree.parse(junit).iter("testcase"):
        module, _, classes = re.fullmatch(r"([\w.]*?test_\w+)(\.(.+))?", case.attrib["classname"]).groups()
        place = "::".join([module.replace(".", "/") + ".py", *(classes or "").split(".")]).rstrip(":")
        tags = {child.tag for child in case}
        end = "fail" if tags & {"failure", "error"} else "skip" if "skipped" in tags else "pass"
        ends[f"{place}::{case.attrib['name'].partition('[')[0]}"].append(end)
    return ends


def result_of(tests: Sequence[str], results: Mapping[str, Sequence[str]]) -> str:
    """What stands in a row's last cell."""
    if not tests or any(test not in results for test in tests):
        return "not run"
    ends = [end for test in tests for end in results[test]]
    if "fail" in ends:
        return "**fail**"
    if "pass" not in ends:
        return "skipped"
    return f"pass, {ends.count('skip')} skipped" if "skip" in ends else "pass"


def text(results: Mapping[str, Sequence[str]] | None = None) -> str:
    """The page; without results their cells stay empty."""
    found, table_rows = rows_of_sources(), read_table()
    parts = [INTRODUCTION]
    if results is not None:
        ends = [result_of(found.get(name, ()), results).partition(",")[0] for name in table_rows]
        otherwise = sum(bool(row.differs) for row in table_rows.values())
        counted = ", ".join(f"{ends.count(end)} {end.strip('*')}" for end in dict.fromkeys(ends))
        parts.append(f"{RESULTS}{counted}, of {len(ends)} rows; {otherwise} are met otherwise.\n")
    for prefix, title in SECTIONS.items():
        rows = []
        for name, row in table_rows.items():
            if section_of(name) != prefix:
                continue
            asks = f"{row.asks}. *Met otherwise: {row.differs}.*" if row.differs else f"{row.asks}."
            where = ", ".join(f"`{place}`" for place in row.where)
            links = "<br>".join(link(test) for test in found.get(name, ()))
            end = "" if results is None else result_of(found.get(name, ()), results)
            rows.append([name, asks, where, links, end])
        parts.append(f"## {title}\n\n{table(['row', 'what must hold', 'where', 'tests', 'result'], rows)}")
    return "\n".join(parts)


def section_of(row: str) -> str:
    """The key of `SECTIONS`.

    >>> section_of("R1-35"), section_of("C10")
    ('R1', 'C')
    """
    return row[:2] if row.startswith("R") else row[0]


def link(test: str) -> str:
    """A test as a link to its file."""
    file, *_, name = test.split("::")
    folder, _, stem = file.removeprefix("tests/").removesuffix(".py").rpartition("/")
    return f"[{folder}/{stem.removeprefix('test_')}: {name.removeprefix('test_')}](../{file})"


def without_results(page: str) -> str:
    """The page with every result left out: what the sources alone decide."""
    page = re.sub(rf"^{RESULTS}.*\n\n", "", page, flags=re.MULTILINE)
    return re.sub(r"[^|]*\|$", " |", page, flags=re.MULTILINE)


def run_tests() -> dict[str, list[str]]:
    """Runs the tests of all rows, slow ones too."""
    tests = sorted({test for tests in rows_of_sources().values() for test in tests})
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "results.xml"
        subprocess.run([sys.executable, "-m", "pytest", *tests, f"--junit-xml={junit}"], cwd=ROOT, check=False)
        return read_run(junit)


def main() -> None:
    """Prints the page, or writes it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--junit", type=Path, nargs="+")
    args = parser.parse_args()
    if not args.write:
        print(text())
        return
    PAGE.write_text(text(read_results(args.junit) if args.junit else run_tests()), encoding="utf-8")


if __name__ == "__main__":
    main()
