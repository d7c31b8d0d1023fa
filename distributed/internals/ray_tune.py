"""What the search needs of Ray Tune beyond its documented interface. Tested with Ray 2.60.

Each entry says what it does, why the documented way is not enough, and which test fails when Ray
changes it.

Does not import Ray, because Ray reads at its import whether it needs a token.
"""

import os

from distributed.internals.versions import untested

TESTED = "2.60"
"""Ray's version that everything here was tested with."""

ENVIRONMENT = {
    # Number of processes that Ray starts at the same time. Its default is the number of cores; a
    # trial has several small processes that mostly wait, and would start them one after the other.
    # No argument of ray.init sets it. test_a_killed_search_resumes_and_loses_nothing gets slow.
    "RAY_worker_maximum_startup_concurrency": "8",
    # No result.json, progress.csv and TensorBoard files per trial: search.json and MLflow have all
    # of this. No argument of RunConfig does this. test_a_search_leaves_what_is_needed.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # Accept a result without `psnr`: a trial may fail before its first validation. Otherwise a
    # trial would have to report an invented figure.
    # test_asha_stops_slow_trials_and_a_diverged_trial_fails_with_its_reason.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    # Print no table of trials: the search prints a line per event. `verbose=0` leaves its header.
    # Looks only; no test.
    "RAY_AIR_NEW_OUTPUT": "0",
    # Keep the working directory in a trial, so that relative paths mean the same as in the search.
    # No argument does this. test_mlflow_has_flat_trials_a_summary_and_the_champion.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


def configure() -> str:
    """Set the variables, before Ray starts; returns a warning where Ray has another version."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return untested("ray", TESTED, "pytest -m slow tests/test_search.py")


def this_node() -> str:
    """Ray's resource that only the node of this process has.

    A trial takes a part of it, so that it runs on the node of the search, where its lock, its log
    and a SQLite database are. Tune needs a placement group, which cannot name a node. Ray's manual
    shows this resource in examples only. test_a_search_leaves_what_is_needed.
    """
    import ray

    own = ray.get_runtime_context().get_node_id()
    (address,) = (n["NodeManagerAddress"] for n in ray.nodes() if n["NodeID"] == own)
    return f"node:{address}"
