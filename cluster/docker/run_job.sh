#!/bin/bash
# Runs a command as the entrypoint of a job, and again whenever it has stopped after saving (exit
# status 75), as a run does whose nodes are drained:
#
#     ray job submit -- run-job raytune pretrain /data/my.yaml
#
# Not again where the job is being stopped (`ray job stop`), or its head (`stop-jobs`). Every other
# status is the job's own.
set -u
FOLDER="${RAYTUNE_JOBS_DIR:-/tmp/raytune-jobs}"
STOPPED=75

mkdir -p -m 700 "$FOLDER"
: >"$FOLDER/$$.job"
trap 'rm -f "$FOLDER/$$.job"' EXIT
# The command gets the signal too: Ray sends it to every process of a job. Bash handles it when the
# command has ended.
stopping=
trap 'stopping=1' TERM

while [ ! -e "$FOLDER/stopping" ]; do
    "$@"
    status=$?
    if [ "$status" -ne "$STOPPED" ] || [ -n "$stopping" ]; then
        exit "$status"
    fi
    echo "run-job: stopped after saving, which the same command continues: $*" >&2
done
exit "$STOPPED"
