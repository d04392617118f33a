"""Which of Slurm's daemons do not answer, from what sstat writes (Slurm 22.05, measured)."""

from __future__ import annotations

from launcher.dispatch.daemons import parse_answering, parse_silent

REFUSED = [
    (
        "sstat: error: slurm_job_step_stat: unknown return given from node2: 9001 rc = "
        "Communication connection failure\n"
    ),
    "sstat: error: problem getting step_layout for StepId=1.0: Communication connection failure\n",
]


def test_a_daemon_that_refuses_is_named() -> None:
    assert parse_silent(REFUSED) == {"node2"}


def test_the_nodes_of_steps_that_are_listed_have_answered() -> None:
    assert parse_answering(["1.batch|node1\n", "1.0|node[1-2],gpu07\n"]) == {
        "node1",
        "node2",
        "gpu07",
    }
    # With one of its two nodes silent, step 1.0 is not listed.
    assert parse_answering(["1.batch|node1\n"]) == {"node1"}
    assert parse_answering([]) == frozenset()


def test_what_else_sstat_complains_of_is_no_daemon() -> None:
    assert parse_silent(["sstat: error: No steps running for job 1\n"]) == frozenset()
    assert parse_silent([]) == frozenset()
