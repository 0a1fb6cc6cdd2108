"""`make test` gives work units to its workers: a file, or a case of a shared file."""

from conftest import LONG_FILES, SHARED_FILES, work_unit

FAMILIES = SHARED_FILES[0]


def test_tests_with_the_same_fixtures_are_one_work_unit():
    assert work_unit("tests/a/test_b.py::test_c[d]") == work_unit("tests/a/test_b.py::test_e")
    assert work_unit(f"{FAMILIES}::test_a[opt-x]") == work_unit(f"{FAMILIES}::test_b[opt-x]")
    assert work_unit(f"{FAMILIES}::test_a[opt-x]") != work_unit(f"{FAMILIES}::test_a[bloom]")


def test_files_that_share_a_run_of_own_data_are_one_work_unit():
    units = {
        work_unit(f"tests/{name}.py::test_a") for name in ("test_api", "commands/test_serving")
    }
    assert units == {"own_run"}
    assert work_unit("tests/test_cli.py::test_a") == "tests/test_cli.py"


def test_the_named_files_exist(request):
    for file in (*SHARED_FILES, *LONG_FILES):
        assert (request.config.rootpath / file).is_file(), file
