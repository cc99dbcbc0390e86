import pod_jobs
import pytest


@pytest.fixture(scope="session")
def jobs(tmp_path_factory) -> pod_jobs.Jobs:
    return pod_jobs.Jobs(tmp_path_factory.mktemp("compiled"))
