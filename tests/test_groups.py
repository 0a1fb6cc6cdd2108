"""`make test` gives groups of tests to its workers: a file, or a part that the file names."""


def test_every_test_is_in_one_group(request):
    """A test without a group could run on a worker that has to make its fixtures again."""
    for item in request.session.items:
        groups = [mark.args[0] for mark in item.iter_markers("xdist_group")]
        assert len(groups) == 1, item.nodeid
        if item.path == request.path:
            assert groups == [request.node.nodeid.partition("::")[0]]
