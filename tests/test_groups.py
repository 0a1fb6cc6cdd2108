"""`make test` gives work units to its workers: a file, or a case of a shared file."""

from types import SimpleNamespace

from conftest import (
    LONG_FILES,
    SHARED_FILES,
    UNITS_DURING_RUN,
    pytest_collection_modifyitems,
    requests_fixture,
    work_unit,
)

FAMILIES = SHARED_FILES[0]


def test_tests_with_the_same_fixtures_are_one_work_unit():
    assert work_unit("tests/a/test_b.py::test_c[d]") == work_unit("tests/a/test_b.py::test_e")
    assert work_unit(f"{FAMILIES}::test_a[opt-x]") == work_unit(f"{FAMILIES}::test_b[opt-x]")
    assert work_unit(f"{FAMILIES}::test_a[opt-x]") != work_unit(f"{FAMILIES}::test_a[bloom]")


def test_files_that_share_a_run_of_own_data_are_one_work_unit():
    names = ("test_api", "commands/test_serving", "commands/test_compiling")
    assert {work_unit(f"tests/{name}.py::test_a") for name in names} == {"own_run"}
    assert work_unit("tests/test_cli.py::test_a") == "tests/test_cli.py"


def test_long_units_come_first_and_one_of_them_runs_the_embedded_recipe(monkeypatch):
    """The other worker has no unit that waits for that run."""
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    files = ["tests/test_cli.py", "tests/test_api.py", *reversed(LONG_FILES)]
    items = [SimpleNamespace(nodeid=f"{file}::test_{n}") for file in files for n in (2, 1)]
    pytest_collection_modifyitems(items)
    order = list(dict.fromkeys(item.nodeid.partition("::")[0] for item in items))
    assert sorted(order) == sorted(files) and order[0] == LONG_FILES[0]
    assert [item.nodeid[-1] for item in items[:2]] == ["2", "1"]
    assert order[-1] == "tests/test_cli.py"
    first = next(n for n, file in enumerate(order[1:]) if requests_fixture(file, "tiny_run"))
    assert first >= UNITS_DURING_RUN


def test_the_named_files_exist(request):
    for file in (*SHARED_FILES, *LONG_FILES):
        assert (request.config.rootpath / file).is_file(), file
