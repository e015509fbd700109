"""The cluster that the tests of runs share."""

import pytest


@pytest.fixture(scope="session")
def client():
    """Of two workers with one thread each, in processes of their own."""
    from distributed import Client, LocalCluster

    with (
        LocalCluster(2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as connected,
    ):
        yield connected
