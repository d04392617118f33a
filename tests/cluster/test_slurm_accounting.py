"""Jobs that slurmctld has forgotten, looked up by sacct in a real slurmdbd with MariaDB.

Needs Debian's slurmdbd and mariadb-server, which tests/cluster/install.sh does not install.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_daemons import SLURM_PROGRAMS, Slurm
from slurm_runs import TINY, SlurmRuns
from virtual_hosts import PROGRAMS, VirtualCluster, missing_requirement

from launcher import run_dir as rd

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

DATABASE_PROGRAMS = ("mariadb-install-db", "mariadbd", "sacct", "sacctmgr", "slurmdbd")
_CONF = "AccountingStorageType=accounting_storage/slurmdbd\nAccountingStorageHost=head"
_DBD_CONF = """\
AuthType=auth/munge
DbdHost=head
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm
LogFile={folder}/slurmdbd.log
PidFile=/run/slurm/slurmdbd.pid
"""
_BOOT = """\
mkdir -p /run/mysqld
mariadbd --no-defaults --user=root --datadir={folder}/mariadb --skip-networking \
  --socket=/run/mysqld/mysqld.sock --innodb-buffer-pool-size=64M > {folder}/mariadb.log 2>&1 &
until [ -S /run/mysqld/mysqld.sock ]; do sleep 0.05; done
slurmdbd
until [ -s /run/slurm/slurmdbd.pid ]; do sleep 0.05; done
until sacctmgr --noheader show cluster test | grep -q test; do
  sacctmgr --immediate --quiet add cluster test > /dev/null || sleep 0.1
done
"""


@pytest.fixture
def accounted(tmp_path: Path) -> Iterator[VirtualCluster]:
    """Slurm with accounting on hosts of its own; the controller forgets jobs within two minutes."""
    reason = missing_requirement((*PROGRAMS, *SLURM_PROGRAMS, *DATABASE_PROGRAMS))
    if reason is not None:
        pytest.skip(f"no Slurm with accounting: {reason}")
    database = [f"--datadir={tmp_path}/mariadb", "--user=root", "--skip-test-db"]
    install = ["mariadb-install-db", "--no-defaults", "--auth-root-authentication-method=normal"]
    subprocess.run([*install, *database], check=True, capture_output=True)
    made = VirtualCluster(folder=tmp_path / "cluster", shared=(tmp_path,))
    made.folder.mkdir()
    try:
        made.up()
        dbd_conf = made.folder / "etc" / "slurm" / "slurmdbd.conf"
        dbd_conf.write_text(_DBD_CONF.format(folder=tmp_path))
        dbd_conf.chmod(0o600)
        boot = _BOOT.format(folder=tmp_path)
        Slurm(cluster=made, accounting=_CONF, head_boot=boot, min_job_age_seconds=2).up()
        yield made
    finally:
        made.down()


def test_how_jobs_ended_that_the_controller_has_forgotten_is_told_by_the_accounting(
    accounted: VirtualCluster, tmp_path: Path
) -> None:
    runs = SlurmRuns(cluster=accounted, folder=tmp_path)
    folders = {
        "finished": runs.submit("finished", "finish"),
        "failed": runs.submit("failed", "raise 1"),
        "killed": runs.submit("killed", "kill 1"),
        "late": runs.submit("late", "deaf", time="1", requeue=False),
        "cancelled": runs.submit("cancelled", "sleep", extra=["--begin=now+1hour"]),
        "asked later": runs.submit("asked later", "sleep", extra=["--begin=now+1hour"]),
    }
    (tmp_path / "tiny.yaml").write_text(TINY)
    submit = ["submit", "--array", "tiny.yaml", "tiny.yaml", "--output-dir", "sweep"]
    assert runs.zerofit(*submit, "slurm.extra=[--begin=now+1hour]").returncode == 0
    tasks = sorted(path.parent for path in (tmp_path / "sweep").glob(f"*/{rd.JOB}"))
    array = runs.job_id(tasks[0]).partition("_")[0]
    waiting = [runs.job_id(folders[name]) for name in ("cancelled", "asked later")]
    accounted.run("head", ["scancel", array, *waiting], check=True)

    def known() -> str:
        return accounted.run("head", ["squeue", "-h", "--states=all"], check=True).stdout

    # The minute of the limit, KillWait, and slurmctld's look at old jobs once a minute.
    runs.until(lambda: known() == "", seconds=600)
    seen = {
        name: runs.status(run_dir) for name, run_dir in folders.items() if name != "asked later"
    }
    assert {name: (state["state"], state["reason"]) for name, state in seen.items()} == {
        "finished": ("finished", None),
        "failed": ("failed", "rank 1 on node2 failed in phase forward: ValueError: deliberate"),
        "killed": ("failed", "rank 1 on node2 ended: Killed"),
        "late": ("killed", f"job {runs.job_id(folders['late'])}: the time limit was reached"),
        "cancelled": ("killed", f"job {waiting[0]}: it was cancelled (by root)"),
    }
    assert [runs.status(task)["reason"] for task in tasks] == [
        f"job {array}_{task}: it was cancelled (by root)" for task in (0, 1)
    ]
    assert "ValueError: deliberate" in runs.zerofit("logs", folders["failed"]).stdout
    # While the database is away nothing is known, and nothing is written.
    pid = accounted.run("head", ["cat", "/run/slurm/slurmdbd.pid"], check=True).stdout.strip()
    accounted.run("head", ["kill", pid], check=True)
    runs.until(lambda: accounted.run("head", ["kill", "-0", pid]).returncode != 0)
    away = runs.status(folders["asked later"])
    assert away["state"] == "unknown"
    assert "Problem talking to the database" in away["reason"]
    accounted.run("head", ["slurmdbd"], check=True)
    runs.until(lambda: runs.status(folders["asked later"])["state"] == "killed", seconds=60)
