"""`make test` gives work units to its workers: a file, or a case of a shared file."""

from conftest import SHARED_FILES, work_unit

FAMILIES = SHARED_FILES[0]


def test_tests_with_the_same_fixtures_are_one_work_unit():
    assert work_unit("tests/a/test_b.py::test_c[d]") == work_unit("tests/a/test_b.py::test_e")
    assert work_unit(f"{FAMILIES}::test_a[opt-x]") == work_unit(f"{FAMILIES}::test_b[opt-x]")
    assert work_unit(f"{FAMILIES}::test_a[opt-x]") != work_unit(f"{FAMILIES}::test_a[bloom]")


def test_the_shared_files_exist(request):
    for file in SHARED_FILES:
        assert (request.config.rootpath / file).is_file(), file
