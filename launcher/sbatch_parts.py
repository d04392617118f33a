"""The shell of job.sbatch that is the same for every run."""

from __future__ import annotations

from launcher.starter_lock import LOCK
from launcher.stop_file import STOP_FILE

JOB_SBATCH = "job.sbatch"
REQUEUE_MARKER = "requeue"
"""Left in the run directory by rank 0 when it was told to stop and has saved a checkpoint."""
IN_ALLOCATION_VARIABLE = "ZEROFIT_IN_ALLOCATION"
"""Set where the script is one command of somebody else's allocation: it requeues nothing."""
FIRST_PORT = 20_000
NUM_PORTS = 12_000
"""Ports end below 32768, where Linux's range for outgoing connections begins."""

RENDEZVOUS = (
    "# The ranks meet on the first host; without its name every host would wait for itself.",
    'hosts=$(scontrol show hostnames "${SLURM_JOB_NODELIST:?not inside a Slurm job}") || {',
    '  echo "error: scontrol cannot name the hosts of job $SLURM_JOB_ID" >&2',
    "  exit 1",
    "}",
    "MASTER_ADDR=${hosts%%$'\\n'*}",
    '[[ -n $MASTER_ADDR ]] || { echo "error: job $SLURM_JOB_ID has no hosts" >&2; exit 1; }',
    "# Two jobs must not share a port on a host.",
    f"MASTER_PORT=$(({FIRST_PORT} + SLURM_JOB_ID % {NUM_PORTS}))",
    "export MASTER_ADDR MASTER_PORT",
    'echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, rendezvous $MASTER_ADDR:$MASTER_PORT"',
)
ONLY_ONCE = (
    ': "${SLURM_JOB_ID:?not inside a Slurm job}"',
    'if grep -qs \'"state": "finished"\' status.json; then',
    '  echo "this run has finished: there is nothing to do"',
    "  exit 0",
    "fi",
    f"if [[ -z ${{{IN_ALLOCATION_VARIABLE}:-}} ]]; then",
    "  # One job at a time: Slurm says whether the one that holds `lock` still runs; any other",
    "  # holder shows signs of life.",
    """  me=$(printf '{"host": "%s", "pid": %d, "slurm_job": "%s", "since": "%s"}' \\""",
    '    "$HOSTNAME" $$ "$SLURM_JOB_ID" "$(date -u +%FT%TZ)")',
    f'  until (set -o noclobber; echo "$me" > {LOCK}) 2> /dev/null; do',
    rf"""    other=$(sed -n 's/.*"slurm_job": "\([0-9_]*\)".*/\1/p' {LOCK})""",
    '    state=$(squeue -h -j "${other:-0}" -o %T 2>&1) || true',
    f"    if [[ -z $other && -z $(find {LOCK} -mmin +2) ]] ||",
    '      [[ -n $other && $other != "$SLURM_JOB_ID" && -n $state && $state != PENDING &&',
    "        $state != *Invalid* ]]; then",
    f'      echo "error: this run is held by $(< {LOCK})" >&2',
    "      exit 1",
    "    fi",
    f"    rm -f {LOCK}",
    "  done",
    f"  trap 'rm -f {LOCK}; kill ${{timer:-}} 2> /dev/null || true' EXIT",
    "fi",
    f"rm -f {STOP_FILE} {REQUEUE_MARKER}",
    "",
)
STEPS = (
    "# Preemption sends SIGTERM to the steps alone.",
    "preempted() {",
    '  [[ $(scontrol show job -o "$SLURM_JOB_ID" 2> /dev/null) == *" PreemptTime="[0-9]* ]]',
    "}",
    "# A signal ends a wait, not the step.",
    "step=",
    "run() {",
    '  "$@" < /dev/null &',
    "  step=$!",
    '  code=0; wait "$step" || code=$?',
    '  while ((code > 128)) && kill -0 "$step" 2> /dev/null; do',
    '    code=0; wait "$step" || code=$?',
    "  done",
    "  step=",
    f'  ((code == 0)) || ! preempted || echo "preemption by Slurm" > {STOP_FILE}',
    "}",
    "",
)
NEXT_JOB = (
    "# The next job of the chain goes on from the newest checkpoint. Three jobs in a row that come",
    "# to no new one end the chain.",
    "newest() { ls -dv checkpoints/checkpoint-* 2> /dev/null | tail -n 1 || true; }",
    "before=$(newest)",
    "next_job() {",
    f"  [[ -z ${{{IN_ALLOCATION_VARIABLE}:-}} ]] || return 0",
    "  # What has made progress starts the count anew.",
    '  [[ $(newest) == "$before" ]] || rm -f idle-jobs',
    '  [[ $(newest) != "$before" ]] || echo "$SLURM_JOB_ID" >> idle-jobs',
    "  if [[ -e idle-jobs ]] && (($(wc -l < idle-jobs) >= 3)); then",
    '    echo "error: three jobs in a row have come to no new checkpoint" >&2',
    "    return 1",
    "  fi",
)
REQUEUE = (
    '  echo "asking Slurm to start job $SLURM_JOB_ID again"',
    '  scontrol requeue "$SLURM_JOB_ID"',
    "}",
)
RESUBMIT = (
    "  # singleton: when this one has ended, whatever it does until then.",
    f'  new=$(sbatch --parsable --dependency=singleton --job-name="$SLURM_JOB_NAME" {JOB_SBATCH})',
    """  sed -i 's/"job_id": "[0-9_]*"/"job_id": "'${new%%;*}'"/' job.json""",
    '  echo "the chain goes on as job $new"',
    "}",
)
ONE_TASK = "--nodes=1 --ntasks=1 --ntasks-per-node=1"
SHARING = "--overlap --mem=0"
"""A step that hangs on a lost node keeps CPUs and memory of the others."""
NODES_LEFT = (
    "# The nodes on which Slurm can start something; one that is lost is none of them.",
    "nodes_left() {",
    '  scontrol show hostnames "$(squeue -h -j "$SLURM_JOB_ID" -o %N)" |',
    f"    xargs -rP 64 -I% timeout 60 srun {SHARING} {ONE_TASK} \\",
    "      --nodelist=% printenv SLURMD_NODENAME 2> /dev/null | sort -V | paste -sd, || true",
    "}",
    "# When this script's own node is lost, Slurm lets the job go on, and nobody asks for another",
    "# start. So the last of the ranks' nodes looks whether this one is still the job's.",
    "keeper=",
    "keep() {",
    '  [[ -z $keeper ]] || kill "$keeper" 2> /dev/null || true',
    "  keeper=",
    '  [[ ${SLURMD_NODENAME:-${nodes##*,}} != "${nodes##*,}" ]] || return 0',
    f'  srun {SHARING} {ONE_TASK} --nodelist="${{nodes##*,}}" \\',
    "    bash -c 'while sleep 15; do",
    '      has=$(squeue -h -j "$SLURM_JOB_ID" -o %N) && [[ -n $has ]] || continue',
    '      has=$(scontrol show hostnames "$has") || continue',
    '      grep -qxF "$0" <<< "$has" || scontrol requeue "$SLURM_JOB_ID" ||',
    '        scancel "$SLURM_JOB_ID"',
    '    done\' "$SLURMD_NODENAME" < /dev/null &> /dev/null &',
    "  keeper=$!",
    "}",
    "",
)
ENDING = (
    f"((code == 0)) || ! preempted || touch {REQUEUE_MARKER}",
    f"[[ ! -e {REQUEUE_MARKER} ]] || next_job || code=1",
    'exit "$code"',
)
