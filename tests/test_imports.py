"""Imports run one way: a package knows those below it, and none above."""

import ast

import pytest
from scripts import ROOT

BELOW = [
    "modeling_dls", "datasets_scripts", "dls_training", "dls_sounds", "hub_cards", "dls_comparison",
    "train_npid", "train_classification",
]  # fmt: skip
PACKAGES = [name for name in BELOW if (ROOT / name).is_dir()]


def imported(module: str) -> set[str]:
    """The packages that a module's text imports, wherever in it; relative imports stay within one."""
    found = set()
    for node in ast.walk(ast.parse(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_no_package_imports_one_above_it(package):
    files = list((ROOT / package).rglob("*.py"))
    above = set(BELOW[BELOW.index(package) + 1 :])
    assert files and not {
        str(path.relative_to(ROOT)): wrong for path in files if (wrong := imported(path.read_text()) & above)
    }


def test_what_counts_as_an_import():
    text = "import hub_cards.card\nfrom .tasks import a\ndef f():\n    from dls_sounds.page import b, c\n"
    assert imported(text) == {"hub_cards", "dls_sounds"}
